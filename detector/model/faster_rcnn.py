"""Faster R-CNN (Ren et al. 2015, arXiv 1506.01497) on a backbone cut at conv4_x, composed of torchvision's parts.

Letters: N images, M boxes of an image, R regions, K classes with background, C4 and C5 channels of conv4_x, conv5_x.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList

from backbones import Backbone, Preprocessing
from backbones.regions import RegionPool

from ..draws import tagged
from ..settings import Count, Pixels, Positive, Probability, checked
from .anchors import STRIDE, MapAnchors, Numbers, check_anchor_sizes
from .boxes import check_targets
from .conventions import TORCHVISION, Conventions
from .network_input import NetworkTransform
from .proposals import Float32RPNHead, ProposalNetwork
from .roi_heads import BoxHeads, Classified, Float32Predictor

CROP_SIZE = 14

Targets = list[dict[str, Tensor]]
Sizes = list[tuple[int, int]]


@dataclass(frozen=True)
class Encoded:
    """A batch of N images at the network's size.

    batch: the padded images (N, 3, H, W), and the (height, width) of each without padding.
    features: the map, (N, C4, H/16, W/16). original_sizes: (height, width) of each image as given.
    targets: dicts with boxes (M, 4) at the network's size, or None.
    """

    batch: ImageList
    features: Tensor
    original_sizes: Sizes
    targets: Targets | None = None


@dataclass(frozen=True)
class Proposals:
    """boxes: N x (M, 4) xyxy at the network's size. losses: the RPN's two losses; empty without targets."""

    boxes: list[Tensor]
    losses: dict[str, Tensor]


class C4FasterRCNN(FasterRCNN):
    """torchvision's FasterRCNN in three steps: encode, propose, classify.

    `backbone` is the trunk, and `roi_heads.box_head` is the RoI head. State dicts have torchvision's names.
    """

    def __init__(
        self, transform: NetworkTransform, trunk: torch.nn.Module, rpn: ProposalNetwork, roi_heads: BoxHeads
    ) -> None:
        # FasterRCNN's constructor only builds the parts, which are given here.
        GeneralizedRCNN.__init__(self, trunk, rpn, roi_heads, transform)

    def encode(
        self, images: list[Tensor], targets: Targets | None = None, *, num_classes: int | None = None
    ) -> Encoded:
        """N x (3, H, W) images of any size, boxes (M, 4) in pixels -> a batch at the network's size, and its map.

        ValueError: as `check_targets` says.
        """
        if targets is not None:
            check_targets(targets, len(images), num_classes)
        of_image = targets or [{}] * len(images)
        sizes = [
            tuple(int(side) for side in target.get("original_size", image.shape[-2:]))
            for image, target in zip(images, of_image, strict=True)
        ]
        batch, targets = self.transform(images, targets)
        features = self.backbone(batch.tensors.to(next(self.backbone.parameters()).dtype))
        return Encoded(batch, features, sizes, targets)

    def propose(self, encoded: Encoded) -> Proposals:
        """The map (N, C4, h, w) -> N x (M, 4) proposals, and the RPN's losses if there are targets."""
        return Proposals(*self.rpn(encoded.batch, {"0": encoded.features}, encoded.targets))

    def classify(self, encoded: Encoded, boxes: list[Tensor]) -> Classified:
        """N x (M, 4) boxes at the network's size -> vectors (R, C5), class logits (R, K) and box deltas (R, 4K)."""
        return self.roi_heads(encoded.features, boxes, encoded.batch.image_sizes)

    def forward(
        self, images: list[Tensor], targets: Targets | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Return the four losses in training mode and detections in evaluation mode, as torchvision's model does.

        images: N x (3, H, W) float RGB in [0, 1]. targets: dicts of boxes (M, 4) xyxy in pixels, labels (M,) in 1..K-1.
        Detections: a dict an image of boxes (M, 4) xyxy in pixels of that image, labels (M,) and scores (M,).
        """
        if not self.training:
            encoded = self.encode(images)
            classified = self.classify(encoded, self.propose(encoded).boxes)
            return self.restore(self.roi_heads.detect(classified), encoded)
        if targets is None:
            raise ValueError("targets is None; in training mode each image needs a dict of boxes and labels")
        encoded = self.encode(images, targets, num_classes=self._num_classes)
        proposals = self.propose(encoded)
        candidates = self.roi_heads.with_ground_truth(proposals.boxes, encoded.targets)
        sample = self.roi_heads.sample(candidates, encoded.targets)
        classified = self.classify(encoded, sample.boxes)
        return self.roi_heads.losses(classified, sample) | proposals.losses

    @torch.no_grad()
    def detect(
        self,
        images: list[Tensor],
        *,
        vectors: bool = False,
        class_scores: bool = False,
        score_thresh: float | None = None,
        class_agnostic_nms: bool | None = None,
    ) -> list[dict[str, Tensor]]:
        """Detect as `forward` does in evaluation mode, without gradients; optionally return more.

        vectors: add the RoI head's vectors, (M, C5), pooled from the final boxes.
        class_scores: add the probabilities of all classes, (M, K), background first. They come from the proposals, as
        the scores do.
        score_thresh, class_agnostic_nms: values for this call; None: those of the model.
        A model in training mode is a RuntimeError.
        """
        self._need_eval_mode("detect")
        encoded = self.encode(images)
        classified = self.classify(encoded, self.propose(encoded).boxes)
        detections = self.roi_heads.detect(
            classified,
            class_scores=class_scores,
            score_thresh=score_thresh,
            class_agnostic_nms=class_agnostic_nms,
        )
        if vectors:
            final = self.classify(encoded, [d["boxes"] for d in detections])
            detections = [
                {**d, "vectors": v} for d, v in zip(detections, final.by_image("vectors"), strict=True)
            ]
        return self.restore(detections, encoded)

    @torch.no_grad()
    def evaluate(self, images: list[Tensor], targets: Targets) -> tuple[dict[str, Tensor], Targets]:
        """Compute losses and detections of a batch in one pass through trunk, RPN and RoI head.

        images and targets are as in `forward`. Proposals are made with the `rpn_*_test` settings. The RoI losses are
        those of a sample from proposals and ground truth. `seed_sampling` makes the samples repeatable.
        Detections are as in `forward`. A model in training mode is a RuntimeError.
        """
        self._need_eval_mode("evaluate")
        encoded = self.encode(images, targets, num_classes=self._num_classes)
        proposals = self.propose(encoded)
        candidates = self.roi_heads.with_ground_truth(proposals.boxes, encoded.targets)
        classified = self.classify(encoded, candidates)
        # The proposals of each image come before its objects.
        first, counts = accumulate((len(c) for c in candidates), initial=0), [len(p) for p in proposals.boxes]
        rows = [
            torch.arange(i, i + n, device=encoded.features.device)
            for i, n in zip(first, counts, strict=False)
        ]
        detections = self.roi_heads.detect(classified.take(torch.cat(rows), counts))
        sample = self.roi_heads.sample(candidates, encoded.targets)
        losses = self.roi_heads.losses(classified.take(sample.rows, [len(b) for b in sample.boxes]), sample)
        return proposals.losses | losses, self.restore(detections, encoded)

    @torch.no_grad()
    def region_vectors(self, images: list[Tensor], boxes: list[Tensor]) -> list[Tensor]:
        """N x (M, 4) boxes, xyxy in pixels of the given images -> the RoI head's vectors, N x (M, C5)."""
        self._need_eval_mode("region_vectors")
        encoded = self.encode(images, [{"boxes": b} for b in boxes])
        return self.classify(encoded, [t["boxes"] for t in encoded.targets]).by_image("vectors")

    def restore(self, detections: list[dict[str, Tensor]], encoded: Encoded) -> list[dict[str, Tensor]]:
        """Detections with boxes (M, 4) at the network's size -> the same in pixels of the original images."""
        return self.transform.postprocess(detections, encoded.batch.image_sizes, encoded.original_sizes)

    def seed_sampling(self, keys: Sequence[tuple[int, ...]] | None) -> None:
        """Draw anchors and regions from one key an image, from the next batch on.

        keys: a tuple of non-negative integers for each image of the batch; None: draw from the global random state.
        """
        samplers = {"anchors": self.rpn.fg_bg_sampler, "regions": self.roi_heads.fg_bg_sampler}
        for use, sampler in samplers.items():
            sampler.keys = None if keys is None else [tagged(use, *key) for key in keys]

    @property
    def preprocessing(self) -> Preprocessing:
        """What the weights expect of an image."""
        return self.transform.preprocessing

    @property
    def _num_classes(self) -> int:
        """K. A predictor that somebody put in place of ours need not tell it: then any label of 1 or more passes."""
        scorer = getattr(self.roi_heads.box_predictor, "cls_score", None)
        return getattr(scorer, "out_features", sys.maxsize)

    def _need_eval_mode(self, name: str) -> None:
        if self.training:
            raise RuntimeError(f"{name}() needs the model in evaluation mode: call model.eval() first")


@checked
def build_faster_rcnn(
    backbone: Backbone,
    num_classes: int,
    *,
    roi_pool: Literal["align", "max"] = "align",
    anchor_sizes: Numbers = (32, 64, 128, 256, 512),
    aspect_ratios: Numbers = (0.5, 1.0, 2.0),
    min_size: Pixels = 800,
    max_size: Pixels = 1333,
    rpn_pre_nms_top_n_train: Count = 2000,
    rpn_pre_nms_top_n_test: Count = 1000,
    rpn_post_nms_top_n_train: Count = 2000,
    rpn_post_nms_top_n_test: Count = 1000,
    rpn_nms_thresh: Probability = 0.7,
    rpn_fg_iou_thresh: Probability = 0.7,
    rpn_bg_iou_thresh: Probability = 0.3,
    rpn_batch_size_per_image: Count = 256,
    rpn_positive_fraction: Probability = 0.5,
    rpn_score_thresh: Probability = 0.0,
    box_score_thresh: Probability = 0.05,
    box_nms_thresh: Probability = 0.5,
    box_detections_per_img: Count = 100,
    box_fg_iou_thresh: Probability = 0.5,
    box_bg_iou_thresh: Probability = 0.5,
    box_batch_size_per_image: Count = 512,
    box_positive_fraction: Probability = 0.25,
    bbox_reg_weights: tuple[Positive, Positive, Positive, Positive] = (10.0, 10.0, 5.0, 5.0),
    class_agnostic_nms: bool = False,
    preprocessing: Preprocessing | None = None,
    conventions: Conventions = TORCHVISION,
) -> C4FasterRCNN:
    """Compose the detector: trunk, RPN on conv4_x, 14x14 regions of conv4_x, conv5_x with pooling, two predictors.

    num_classes: K, with background. roi_pool: "align" (He et al. 2017) or "max" (the paper's RoIPool).
    anchor_sizes: square roots of areas, in pixels of the resized image; aspect_ratios: height / width.
    min_size, max_size: the short side and the bound of the long side after resizing, in pixels.
    rpn_*, box_*, bbox_reg_weights: torchvision's arguments of the same names, with its defaults.
    class_agnostic_nms: a detection suppresses those of other classes too.
    preprocessing: channel order, scale, mean and deviation of the trunk's input; None: the backbone's own.
    conventions: `Conventions`, or the name of a set, "torchvision" or "detectron2".

    Trunk and RoI head are the backbone's own modules, not copies. An unknown argument is a TypeError, and a wrong
    value is a ValueError.
    """
    if not isinstance(num_classes, int) or num_classes < 2:
        raise ValueError(
            f"num_classes is {num_classes!r}; accepted: 2 or more, since label 0 is background "
            "(one class of objects makes num_classes=2)"
        )
    check_anchor_sizes(anchor_sizes, min_size, max_size)
    _check_thresholds("rpn", rpn_fg_iou_thresh, rpn_bg_iou_thresh)
    _check_thresholds("box", box_fg_iou_thresh, box_bg_iou_thresh)
    trunk, roi_head = backbone.trunk, backbone.roi_head
    return C4FasterRCNN(
        NetworkTransform(min_size, max_size, preprocessing or backbone.preprocessing, conventions),
        trunk,
        ProposalNetwork(
            MapAnchors(anchor_sizes, aspect_ratios, conventions),
            Float32RPNHead(trunk.out_channels, len(anchor_sizes) * len(aspect_ratios)),
            conventions,
            fg_iou_thresh=rpn_fg_iou_thresh,
            bg_iou_thresh=rpn_bg_iou_thresh,
            batch_size_per_image=rpn_batch_size_per_image,
            positive_fraction=rpn_positive_fraction,
            pre_nms_top_n={"training": rpn_pre_nms_top_n_train, "testing": rpn_pre_nms_top_n_test},
            post_nms_top_n={"training": rpn_post_nms_top_n_train, "testing": rpn_post_nms_top_n_test},
            nms_thresh=rpn_nms_thresh,
            score_thresh=rpn_score_thresh,
        ),
        BoxHeads(
            RegionPool(
                CROP_SIZE,
                sampling_ratio=conventions.roi_align_sampling_ratio,
                stride=STRIDE,
                aligned=conventions.roi_align_aligned,
                mode=roi_pool,
            ),
            roi_head,
            Float32Predictor(roi_head.out_channels, num_classes),
            conventions,
            fg_iou_thresh=box_fg_iou_thresh,
            bg_iou_thresh=box_bg_iou_thresh,
            batch_size_per_image=box_batch_size_per_image,
            positive_fraction=box_positive_fraction,
            bbox_reg_weights=bbox_reg_weights,
            score_thresh=box_score_thresh,
            nms_thresh=box_nms_thresh,
            detections_per_img=box_detections_per_img,
            class_agnostic_nms=class_agnostic_nms,
        ),
    )


def _check_thresholds(part: str, foreground: float, background: float) -> None:
    """Raise a ValueError if a box could be foreground and background at once."""
    if foreground < background:
        raise ValueError(
            f"{part}_fg_iou_thresh is {foreground} and {part}_bg_iou_thresh is {background}; "
            "accepted: a foreground's threshold that is not below the background's"
        )
