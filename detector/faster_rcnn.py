"""Faster R-CNN (Ren et al. 2015, arXiv 1506.01497) on a backbone cut at conv4_x, composed of torchvision's parts.

Letters: N images, A anchors an image, R regions, K classes with background, C4 and C5 channels of conv4_x, conv5_x.
"""

import inspect
from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN

from backbones import Backbone, Preprocessing, create_backbone
from backbones.backbone import nearest
from backbones.folding import set_folding
from backbones.fuse import fuse, use_winograd
from backbones.weights import DEFERRED

from .anchors import STRIDE, build_anchor_generator
from .config import ModelConfig
from .conventions import Conventions
from .network_input import NetworkTransform
from .proposals import Float32RPNHead, ProposalNetwork
from .region_pool import CPU_REGIONS, SharedRegionPool
from .roi_heads import BoxHeads, Float32Predictor

Targets = list[dict[str, Tensor]]


class C4FasterRCNN(FasterRCNN):
    """torchvision's FasterRCNN whose evaluation gives losses and detections from one pass.

    `backbone` is the trunk, `roi_heads.box_head` the RoI head: torchvision's names, so state dicts read as theirs.
    """

    def seed_sampling(self, keys: Sequence[tuple[int, ...]] | None) -> None:
        """Draw the anchors and regions of each image of the next batches from its key (None: the global state)."""
        for stream, sampler in enumerate((self.rpn.fg_bg_sampler, self.roi_heads.fg_bg_sampler)):
            sampler.keys = None if keys is None else [(*key, stream) for key in keys]

    @torch.no_grad()
    def evaluate(self, images: list[Tensor], targets: Targets) -> tuple[dict[str, Tensor], Targets]:
        """Losses and detections of a batch from one pass of trunk, RPN and RoI head.

        The proposals are those of the test settings; the RoI losses are of a sample of them and of the ground truth.
        `seed_sampling` makes both samples repeatable. Boxes come back in pixels of the original images.
        """
        self._need_eval_mode("evaluate")
        original_sizes = [
            tuple(int(s) for s in target.get("original_size", image.shape[-2:]))
            for image, target in zip(images, targets, strict=True)
        ]
        batch, targets = self.transform(images, targets)
        features = {"0": self.backbone(batch.tensors)}
        proposals, losses = self.rpn.evaluate(batch, features, targets)
        detections, roi_losses = self.roi_heads.evaluate(features, proposals, batch.image_sizes, targets)
        return losses | roi_losses, self.transform.postprocess(detections, batch.image_sizes, original_sizes)

    @torch.no_grad()
    def detect(
        self, images: list[Tensor], *, features: bool = False, class_scores: bool = False
    ) -> list[dict[str, Tensor]]:
        """`self(images)`, and what is asked for beside it, from the same pass of the trunk.

        features: the RoI head's vector of each detection's box, (M, C5). class_scores: the probabilities of all
        classes, (M, K), background first, of the proposal that each detection came from.
        """
        self._need_eval_mode("detect")
        original_sizes = [tuple(image.shape[-2:]) for image in images]
        batch, _ = self.transform(images)
        maps = {"0": self.backbone(batch.tensors)}
        proposals, _ = self.rpn(batch, maps)
        detections = self.roi_heads.detect(maps, proposals, batch.image_sizes, class_scores=class_scores)
        if features:
            vectors = self._vectors(maps, [d["boxes"] for d in detections], batch.image_sizes)
            detections = [{**d, "features": v} for d, v in zip(detections, vectors, strict=True)]
        return self.transform.postprocess(detections, batch.image_sizes, original_sizes)

    @torch.no_grad()
    def region_features(self, images: list[Tensor], boxes: list[Tensor]) -> list[Tensor]:
        """The RoI head's vectors, (M, C5) an image, of boxes (M, 4) xyxy in pixels of the given images."""
        self._need_eval_mode("region_features")
        batch, targets = self.transform(images, [{"boxes": b} for b in boxes])
        maps = {"0": self.backbone(batch.tensors)}
        return self._vectors(maps, [t["boxes"] for t in targets], batch.image_sizes)

    def _vectors(
        self, maps: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]
    ) -> list[Tensor]:
        heads = self.roi_heads
        return list(heads.box_head(heads.box_roi_pool(maps, boxes, sizes)).split([len(b) for b in boxes]))

    def _need_eval_mode(self, name: str) -> None:
        if self.training:
            raise RuntimeError(f"{name}() needs the model in evaluation mode: call model.eval() first")


# What build_faster_rcnn sets itself, so that nobody passes it a second time.
_COMPOSED = {
    *("self", "backbone", "num_classes", "image_mean", "image_std", "rpn_anchor_generator", "rpn_head"),
    *("box_roi_pool", "box_head", "box_predictor", "kwargs"),
}
_CONVENTIONS = {field.name for field in fields(Conventions)}


def build_faster_rcnn(
    backbone: Backbone,
    num_classes: int,
    *,
    roi_pool: str = "align",
    anchor_sizes: Sequence[float] = (32, 64, 128, 256, 512),
    aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
    min_size: int = 800,
    max_size: int = 1333,
    preprocessing: Preprocessing | None = None,
    class_agnostic_nms: bool = False,
    shared_projection: bool = True,
    sparse_roi_align: bool = True,
    fold_norms: bool = True,
    activation_checkpointing: bool = False,
    **options: object,
) -> C4FasterRCNN:
    """Compose the detector: trunk, RPN on conv4_x, 14x14 regions of it, conv5_x and pooling, two predictors.

    num_classes: K, with background. roi_pool: "align" (He et al. 2017) or "max" (the paper's RoIPool).
    anchor_sizes: pixels of the resized image. min_size, max_size: short side and bound of the long side after
    resizing. preprocessing: what the trunk expects of an image, where that is not what its weights say.
    class_agnostic_nms: a detection suppresses those of other classes too.
    shared_projection: run the 1x1 convolutions that open conv5_x on the shared map; sparse_roi_align: RoIAlign as a sparse
    product on a CPU; fold_norms: frozen norms as part of their convolutions in training (all the same, to rounding).
    activation_checkpointing: recompute activations in the backward pass, less memory for more time.
    options: the fields of `Conventions`, and torchvision's FasterRCNN's own keyword arguments; an unknown one is an error.
    """
    conventions = Conventions(**{k: v for k, v in options.items() if k in _CONVENTIONS})
    stock = {k: v for k, v in options.items() if k not in _CONVENTIONS}
    _check_arguments(stock, num_classes, min_size, max_size)
    trunk, roi_head = backbone.trunk, backbone.roi_head
    roi_head.shared_projection = shared_projection
    for part in (trunk, roi_head):
        set_folding(part, fold_norms)
    trunk.activation_checkpointing = roi_head.activation_checkpointing = activation_checkpointing
    anchors = build_anchor_generator(
        anchor_sizes,
        aspect_ratios,
        min_size,
        max_size,
        stride=conventions.anchor_stride,
        rounding=conventions.anchor_rounding,
        order=conventions.anchor_order,
    )
    model = C4FasterRCNN(
        trunk,
        min_size=min_size,
        max_size=max_size,
        rpn_anchor_generator=anchors,
        rpn_head=Float32RPNHead(trunk.out_channels, anchors.num_anchors_per_location()[0]),
        box_roi_pool=SharedRegionPool(
            14,
            sampling_ratio=conventions.roi_align_sampling_ratio,
            stride=STRIDE,
            aligned=conventions.roi_align_aligned,
            mode=roi_pool,
            sparse=sparse_roi_align,
        ),
        box_head=roi_head,
        box_predictor=Float32Predictor(roi_head.out_channels, num_classes),
        **stock,
    )
    model.transform = NetworkTransform(
        min_size,
        max_size,
        preprocessing or backbone.preprocessing,
        conventions.size_divisible,
        resize=conventions.resize,
        resize_rounding=conventions.resize_rounding,
        drop_empty=conventions.box_min_size == 0,
    )
    model.rpn = ProposalNetwork(
        model.rpn,
        min_size=conventions.rpn_min_size,
        rank_on=conventions.rpn_rank_on,
        smooth_l1_beta=conventions.rpn_smooth_l1_beta,
        loss_normalizer=conventions.rpn_loss_normalizer,
    )
    model.roi_heads = BoxHeads(
        model.roi_heads,
        min_size=conventions.box_min_size,
        smooth_l1_beta=conventions.box_smooth_l1_beta,
        class_agnostic_nms=class_agnostic_nms,
    )
    return model


def _check_arguments(stock: dict[str, object], num_classes: int, min_size: int, max_size: int) -> None:
    """Refuse what torchvision would drop in silence or fail on later."""
    theirs = [p for p in inspect.signature(FasterRCNN.__init__).parameters if p not in _COMPOSED]
    ours = [p for p, v in inspect.signature(build_faster_rcnn).parameters.items() if v.kind is v.KEYWORD_ONLY]
    for option in stock:
        if option not in theirs:
            accepted = sorted({*theirs, *ours, *_CONVENTIONS})
            raise TypeError(f"build_faster_rcnn has no argument {option!r}; {nearest(option, accepted)}")
    if not isinstance(num_classes, int) or num_classes < 2:
        raise ValueError(
            f"num_classes is {num_classes!r}; accepted: 2 or more, since label 0 is background "
            "(one class of objects makes num_classes=2)"
        )
    if not 0 < min_size <= max_size:
        raise ValueError(f"min_size {min_size} and max_size {max_size}: accepted: 0 < min_size <= max_size")


def optimize(model: C4FasterRCNN, *, winograd: bool = True) -> C4FasterRCNN:
    """A copy for inference, equal to rounding; the model as trained stays as it is.

    Batch norms are folded into convolutions, layouts are channels-last, and on a CPU the 3x3 convolutions of the RoI
    head become Winograd products where that is measured to be faster (`winograd=False` where two evaluations must
    agree to the last bit, whatever a clock said).
    """
    fast: C4FasterRCNN = fuse(model)
    if winograd and next(fast.parameters()).device.type == "cpu":
        use_winograd(fast.roi_heads.box_head.stage5, CPU_REGIONS)
    return fast.to(memory_format=torch.channels_last)


def compile_model(model: C4FasterRCNN) -> None:
    """Run trunk and head through torch.compile from now on, with sizes as symbols: one compilation for all images.

    torch makes exceptions, each compiled once when it first occurs: batches of several images, the image that comes
    first where it is square, fewer than 16 regions.
    """
    model.backbone.compile(dynamic=True)
    for block in model.roi_heads.box_head.stage5[1:]:
        block.compile(dynamic=True)


def build_model(config: ModelConfig, num_classes: int, *, load_weights: bool = True) -> C4FasterRCNN:
    """The detector that a configuration describes, in channels-last layout.

    load_weights: False where a checkpoint's weights follow, so that nothing is fetched to be overwritten.
    """
    options = dict(config.backbone)
    if not load_weights:
        options["weights"] = DEFERRED
    backbone = create_backbone(options.pop("name"), **options)
    settings = config.model_dump(exclude={"backbone"}, exclude_none=True)
    if config.preprocessing is not None:
        settings["preprocessing"] = Preprocessing(**settings["preprocessing"])
    model: nn.Module = build_faster_rcnn(backbone, num_classes, **settings)
    return model.to(memory_format=torch.channels_last)
