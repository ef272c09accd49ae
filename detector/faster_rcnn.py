"""Faster R-CNN (Ren et al. 2015, arXiv 1506.01497) on a backbone cut at conv4_x, composed of torchvision's parts.

Letters: N images, A anchors an image, R regions, K classes with background, C4 and C5 channels of conv4_x, conv5_x.
"""

import inspect
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.rpn import RPNHead, concat_box_prediction_layers
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes

from backbones import Backbone, Preprocessing, create_backbone
from backbones.backbone import nearest
from backbones.fuse import fuse, use_winograd
from backbones.weights import DEFERRED

from .anchors import STRIDE, build_anchor_generator
from .config import ModelConfig
from .region_pool import CPU_REGIONS, SharedRegionPool

Targets = list[dict[str, Tensor]]


def network_size(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """(height, width) in pixels at which the network sees an image: short side min_size, long side <= max_size.

    The one place where that is computed, for images that the model resizes and for those that the loader does;
    the same numbers as torchvision's GeneralizedRCNNTransform.
    """
    scale = min(min_size / min(height, width), max_size / max(height, width))
    return max(1, math.floor(height * scale)), max(1, math.floor(width * scale))


class NetworkTransform(GeneralizedRCNNTransform):
    """torchvision's transform with a backbone's preprocessing, that leaves batches of our loader at their size.

    A target that has `original_size` belongs to an image that the loader has already resized.
    """

    def __init__(
        self, min_size: int, max_size: int, preprocessing: Preprocessing, size_divisible: int
    ) -> None:
        super().__init__(min_size, max_size, [], [], size_divisible=size_divisible)
        self.set_preprocessing(preprocessing)

    def set_preprocessing(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        self.image_mean, self.image_std = list(preprocessing.mean), list(preprocessing.std)

    def normalize(self, image: Tensor) -> Tensor:
        if self.preprocessing.channel_order == "bgr":
            image = image.flip(0)
        if self.preprocessing.scale != 1:
            image = image * self.preprocessing.scale
        return super().normalize(image)

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        if target is not None and "original_size" in target:
            return image, target
        old_size = tuple(image.shape[-2:])
        new_size = network_size(*old_size, self.min_size[-1], self.max_size)
        image = F.interpolate(image[None], size=new_size, mode="bilinear", align_corners=False)[0]
        if target is not None:
            target["boxes"] = resize_boxes(target["boxes"], old_size, new_size)
        return image, target


class SeededSampler(BalancedPositiveNegativeSampler):
    """torchvision's sampler of anchors or regions, drawing for each image from a key instead of the global state.

    With `keys` (one tuple of non-negative integers an image) the draw is a function of the key, whichever process
    or device makes it; without, it is torchvision's.
    """

    keys: Sequence[tuple[int, ...]] | None = None

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        if self.keys is None:
            return super().__call__(matched_idxs)
        masks = [self._sample(matched, key) for matched, key in zip(matched_idxs, self.keys, strict=True)]
        return [positive for positive, _ in masks], [negative for _, negative in masks]

    def _sample(self, matched: Tensor, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
        positive, negative = torch.where(matched >= 1)[0], torch.where(matched == 0)[0]
        num_positive = min(len(positive), int(self.batch_size_per_image * self.positive_fraction))
        num_negative = min(len(negative), self.batch_size_per_image - num_positive)
        masks = []
        for indices, count in ((positive, num_positive), (negative, num_negative)):
            chosen = torch.randperm(len(indices), generator=generator)[:count].to(matched.device)
            masks.append(torch.zeros_like(matched, dtype=torch.uint8).index_fill_(0, indices[chosen], 1))
        return masks[0], masks[1]


class Float32RPNHead(RPNHead):
    """torchvision's RPN head whose two outputs are float32 under autocast.

    bfloat16 leaves some 1500 distinct values among 6000 logits, too few to rank proposals by.
    """

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        hidden = [self.conv(feature) for feature in x]
        with torch.autocast(hidden[0].device.type, enabled=False):
            hidden = [h.to(self.cls_logits.weight.dtype) for h in hidden]
            return [self.cls_logits(h) for h in hidden], [self.bbox_pred(h) for h in hidden]


class Float32Predictor(FastRCNNPredictor):
    """torchvision's box predictor, in float32 under autocast."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.cls_score.weight.dtype))


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
        proposals, losses = self._evaluate_rpn(batch, features, targets)
        detections, roi_losses = self._evaluate_regions(features, proposals, batch.image_sizes, targets)
        return losses | roi_losses, self.transform.postprocess(detections, batch.image_sizes, original_sizes)

    def _evaluate_rpn(
        self, batch: ImageList, features: dict[str, Tensor], targets: Targets
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Test proposals, and the RPN's losses that torchvision computes in training mode only."""
        rpn, maps = self.rpn, list(features.values())
        objectness, deltas = rpn.head(maps)
        anchors = rpn.anchor_generator(batch, maps)
        objectness, deltas = concat_box_prediction_layers(objectness, deltas)  # (N*A, 1), (N*A, 4)
        decoded = rpn.box_coder.decode(deltas, anchors).view(len(anchors), -1, 4)  # (N, A, 4)
        proposals, _ = rpn.filter_proposals(decoded, objectness, batch.image_sizes, [len(anchors[0])])
        labels, matched = rpn.assign_targets_to_anchors(anchors, targets)
        wanted = rpn.box_coder.encode(matched, anchors)
        loss_objectness, loss_box = rpn.compute_loss(objectness, deltas, labels, wanted)
        return proposals, {"loss_objectness": loss_objectness, "loss_rpn_box_reg": loss_box}

    def _evaluate_regions(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        sizes: list[tuple[int, int]],
        targets: Targets,
    ) -> tuple[Targets, dict[str, Tensor]]:
        """Detections of the proposals, and the RoI losses of a sample of them and the ground truth."""
        heads = self.roi_heads
        gt_boxes = [t["boxes"].to(p.dtype) for t, p in zip(targets, proposals, strict=True)]
        candidates = heads.add_gt_proposals(proposals, gt_boxes)
        logits, deltas = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, candidates, sizes)))
        counts = [len(c) for c in candidates]
        is_proposal = torch.cat(
            [torch.arange(n, device=logits.device) < len(p) for n, p in zip(counts, proposals, strict=True)]
        )
        boxes, scores, labels = heads.postprocess_detections(
            logits[is_proposal], deltas[is_proposal], proposals, sizes
        )
        detections = [
            {"boxes": b, "labels": k, "scores": s} for b, k, s in zip(boxes, labels, scores, strict=True)
        ]
        matched, labels = heads.assign_targets_to_proposals(
            candidates, gt_boxes, [t["labels"] for t in targets]
        )
        sampled = heads.subsample(labels)
        matched_boxes = [
            (gt if len(gt) else gt.new_zeros(1, 4))[m[s]]
            for gt, m, s in zip(gt_boxes, matched, sampled, strict=True)
        ]
        wanted = heads.box_coder.encode(
            matched_boxes, [c[s] for c, s in zip(candidates, sampled, strict=True)]
        )
        labels = [k[s] for k, s in zip(labels, sampled, strict=True)]
        rows = torch.cat([s + sum(counts[:i]) for i, s in enumerate(sampled)])
        loss_classifier, loss_box = fastrcnn_loss(logits[rows], deltas[rows], labels, wanted)
        return detections, {"loss_classifier": loss_classifier, "loss_box_reg": loss_box}

    @torch.no_grad()
    def detect(self, images: list[Tensor], *, features: bool = False) -> list[dict[str, Tensor]]:
        """`self(images)`; with `features`, also the RoI head's vector of each detection, (M, C5), from the same trunk."""
        self._need_eval_mode("detect")
        original_sizes = [tuple(image.shape[-2:]) for image in images]
        batch, _ = self.transform(images)
        maps = {"0": self.backbone(batch.tensors)}
        proposals, _ = self.rpn(batch, maps)
        detections, _ = self.roi_heads(maps, proposals, batch.image_sizes)
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


def build_faster_rcnn(
    backbone: Backbone,
    num_classes: int,
    *,
    roi_pool: str = "align",
    anchor_sizes: Sequence[float] = (32, 64, 128, 256, 512),
    aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
    min_size: int = 800,
    max_size: int = 1333,
    shared_projection: bool = True,
    activation_checkpointing: bool = False,
    **options: object,
) -> C4FasterRCNN:
    """Compose the detector: trunk, RPN on conv4_x, 14x14 regions of it, conv5_x and pooling, two predictors.

    num_classes: K, with background. roi_pool: "align" (He et al. 2017) or "max" (the paper's RoIPool).
    anchor_sizes: pixels of the resized image. min_size, max_size: short side and bound of the long side after
    resizing. shared_projection: run the 1x1 convolutions that open conv5_x on the shared map (the same result).
    activation_checkpointing: recompute activations in the backward pass, less memory for more time.
    options: torchvision's FasterRCNN's own keyword arguments; an unknown one is an error.
    """
    stock = [p for p in inspect.signature(FasterRCNN.__init__).parameters if p not in _COMPOSED]
    ours = [p for p, v in inspect.signature(build_faster_rcnn).parameters.items() if v.kind is v.KEYWORD_ONLY]
    for option in options:
        if option not in stock:
            accepted = sorted({*stock, *ours})
            raise TypeError(f"build_faster_rcnn has no argument {option!r}; {nearest(option, accepted)}")
    if not isinstance(num_classes, int) or num_classes < 2:
        raise ValueError(
            f"num_classes is {num_classes!r}; accepted: 2 or more, since label 0 is background "
            "(one class of objects makes num_classes=2)"
        )
    if not 0 < min_size <= max_size:
        raise ValueError(f"min_size {min_size} and max_size {max_size}: accepted: 0 < min_size <= max_size")
    trunk, roi_head = backbone.trunk, backbone.roi_head
    roi_head.shared_projection = shared_projection
    trunk.activation_checkpointing = roi_head.activation_checkpointing = activation_checkpointing
    anchors = build_anchor_generator(anchor_sizes, aspect_ratios, min_size, max_size)
    model = C4FasterRCNN(
        trunk,
        min_size=min_size,
        max_size=max_size,
        rpn_anchor_generator=anchors,
        rpn_head=Float32RPNHead(trunk.out_channels, anchors.num_anchors_per_location()[0]),
        box_roi_pool=SharedRegionPool(14, sampling_ratio=2, stride=STRIDE, mode=roi_pool),
        box_head=roi_head,
        box_predictor=Float32Predictor(roi_head.out_channels, num_classes),
        **options,
    )
    model.transform = NetworkTransform(min_size, max_size, backbone.preprocessing, size_divisible=32)
    for part in (model.rpn, model.roi_heads):
        sampler = part.fg_bg_sampler
        part.fg_bg_sampler = SeededSampler(sampler.batch_size_per_image, sampler.positive_fraction)
    return model


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
    model: nn.Module = build_faster_rcnn(backbone, num_classes, **settings)
    return model.to(memory_format=torch.channels_last)
