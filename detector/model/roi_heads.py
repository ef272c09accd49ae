"""torchvision's RoI heads, which turn regions into detections and losses, with Detectron2's conventions as options.

Letters: N images, R regions, K classes with background, M detections of an image.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes

from .boxes import BoxCoder
from .conventions import Conventions
from .losses import region_losses
from .sampling import SeededSampler, draw

# Detections that NMS looks at in one go.
_MOST_AT_ONCE = 10_000

Sizes = list[tuple[int, int]]
Targets = list[dict[str, Tensor]]


class Float32Predictor(FastRCNNPredictor):
    """torchvision's box predictor, in float32 under autocast."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(R, C5) vectors -> class logits (R, K) and box deltas (R, 4K)."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.cls_score.weight.dtype))


@dataclass(frozen=True)
class Classified:
    """The outputs of the RoI heads for the boxes of N images.

    boxes: N x (R_i, 4) xyxy at the network's size; image_sizes: (height, width) of each image.
    vectors: (R, C5), from the RoI head; logits: (R, K); deltas: (R, 4K). Rows are in the order of the boxes.
    """

    boxes: list[Tensor]
    image_sizes: Sizes
    vectors: Tensor
    logits: Tensor
    deltas: Tensor

    @property
    def counts(self) -> list[int]:
        """The number of boxes in each image."""
        return [len(b) for b in self.boxes]

    def by_image(self, name: str) -> list[Tensor]:
        """Split the field `name` by image: `vectors` (R, C5) -> N x (R_i, C5)."""
        return list(getattr(self, name).split(self.counts))

    def take(self, indices: list[Tensor]) -> "Classified":
        """Select boxes, and their outputs, by N x (S_i,) indices into the boxes of each image."""
        first = [0, *accumulate(self.counts)]
        rows = torch.cat([start + i for start, i in zip(first, indices, strict=False)])
        boxes = [b[i] for b, i in zip(self.boxes, indices, strict=True)]
        tensors = (self.vectors[rows], self.logits[rows], self.deltas[rows])
        return Classified(boxes, self.image_sizes, *tensors)


@dataclass(frozen=True)
class Sample:
    """Regions to learn from, for each of N images.

    rows: N x (S_i,) indices into the candidates; boxes: N x (S_i, 4); labels: N x (S_i,), 0 is background.
    wanted: N x (S_i, 4) box deltas from the sampled boxes to the matched objects.
    """

    rows: list[Tensor]
    boxes: list[Tensor]
    labels: list[Tensor]
    wanted: tuple[Tensor, ...]


class BoxHeads(RoIHeads):
    """torchvision's RoIHeads without masks and keypoints, under `conventions`.

    The forward pass classifies boxes. Sampling, losses and detections are separate methods.
    `options` are the keyword arguments of torchvision's RoIHeads.
    class_agnostic_nms: a box suppresses those of other classes too.
    """

    def __init__(
        self,
        pool: nn.Module,
        head: nn.Module,
        predictor: nn.Module,
        conventions: Conventions,
        *,
        class_agnostic_nms: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(pool, head, predictor, **options)
        sampler = self.fg_bg_sampler
        self.fg_bg_sampler = SeededSampler(sampler.batch_size_per_image, sampler.positive_fraction)
        self.box_coder = BoxCoder(self.box_coder.weights)
        self.conventions, self.class_agnostic_nms = conventions, class_agnostic_nms

    def forward(self, features: Tensor, boxes: list[Tensor], image_sizes: Sizes) -> Classified:
        """The map (N, C4, h, w) and N x (R_i, 4) boxes -> vectors (R, C5), class logits (R, K), box deltas (R, 4K)."""
        vectors = self.box_head(self.box_roi_pool(features, boxes, image_sizes))
        return Classified(boxes, image_sizes, vectors, *self.box_predictor(vectors))

    def with_ground_truth(self, proposals: list[Tensor], targets: Targets) -> list[Tensor]:
        """Append the G ground-truth boxes of each image: N x (M, 4) proposals -> N x (M + G, 4)."""
        return self.add_gt_proposals(
            proposals, [t["boxes"].to(p.dtype) for t, p in zip(targets, proposals, strict=True)]
        )

    def sample_for_training(self, proposals: list[Tensor], targets: Targets) -> Sample:
        """Draw a balanced sample from N x (M, 4) proposals and the ground truth."""
        return self.sample(self.with_ground_truth(proposals, targets), targets)

    @torch.no_grad()
    def sample(self, candidates: list[Tensor], targets: Targets) -> Sample:
        """Match N x (M, 4) candidates to the targets, and draw a balanced sample."""
        gt_boxes = [t["boxes"].to(c.dtype) for t, c in zip(targets, candidates, strict=True)]
        matched, labels = self.assign_targets_to_proposals(
            candidates, gt_boxes, [t["labels"] for t in targets]
        )
        rows = [torch.cat(drawn).sort().values for drawn in draw(self.fg_bg_sampler, labels)]
        matched_boxes = [
            (gt if len(gt) else gt.new_zeros(1, 4))[m[s]]
            for gt, m, s in zip(gt_boxes, matched, rows, strict=True)
        ]
        boxes, labels = ([v[s] for v, s in zip(values, rows, strict=True)] for values in (candidates, labels))
        return Sample(rows, boxes, labels, self.box_coder.encode(matched_boxes, boxes))

    def losses(self, classified: Classified, sample: Sample) -> dict[str, Tensor]:
        """The RoI heads' two losses. `classified` holds the outputs for the boxes of `sample`, in the same order."""
        classifier, box = region_losses(
            classified.logits,
            classified.deltas,
            torch.cat(sample.labels),
            torch.cat(list(sample.wanted)),
            self.conventions.box_smooth_l1_beta,
        )
        return {"loss_classifier": classifier, "loss_box_reg": box}

    def detect(
        self,
        classified: Classified,
        *,
        class_scores: bool = False,
        score_thresh: float | None = None,
        class_agnostic_nms: bool | None = None,
    ) -> list[dict[str, Tensor]]:
        """The detections of each image, best first: boxes (M, 4), labels (M,), scores (M,).

        class_scores: add the probabilities of all classes, (M, K).
        score_thresh, class_agnostic_nms: values for this call; None: those of the heads.
        """
        # (R, K, 4)
        decoded = self.box_coder.decode(classified.deltas, classified.boxes).split(classified.counts)
        scores = F.softmax(classified.logits, -1).split(classified.counts)
        detections = []
        for image in zip(decoded, scores, classified.image_sizes, strict=True):
            boxes, own, labels, rows = self.select(*image, score_thresh, class_agnostic_nms)
            found = {"boxes": boxes, "labels": labels, "scores": own}
            detections.append(found | ({"class_scores": image[1][rows]} if class_scores else {}))
        return detections

    def select(
        self,
        boxes: Tensor,
        scores: Tensor,
        size: tuple[int, int],
        score_thresh: float | None = None,
        class_agnostic_nms: bool | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Select one image's detections from (R, K, 4) boxes and (R, K) scores, best first.

        Returns boxes (M, 4), scores (M,), labels (M,) and rows (M,); a row indexes the R boxes.
        `size` is the (height, width) that boxes are clipped to.
        """
        thresh = self.score_thresh if score_thresh is None else score_thresh
        agnostic = self.class_agnostic_nms if class_agnostic_nms is None else class_agnostic_nms
        num_foreground = scores.shape[1] - 1
        boxes = clip_boxes_to_image(boxes, size)[:, 1:].reshape(-1, 4)
        scores = scores[:, 1:].reshape(-1)
        kept = torch.where(scores > thresh)[0]
        # If it is 0, NetworkTransform.postprocess drops the empty boxes.
        if self.conventions.box_min_size > 0:
            kept = kept[remove_small_boxes(boxes[kept], self.conventions.box_min_size)]
        boxes, scores = boxes[kept], scores[kept]
        labels, rows = kept % num_foreground + 1, kept // num_foreground
        groups = torch.zeros_like(labels) if agnostic else labels
        order = self._suppress(boxes, scores, groups)
        return boxes[order], scores[order], labels[order], rows[order]

    def _suppress(self, boxes: Tensor, scores: Tensor, groups: Tensor) -> Tensor:
        """The rows of (M, 4) boxes that NMS within `groups` (M,) keeps, best first, at most `detections_per_img`.

        Boxes of lower scores never suppress any of higher ones. So the best go first, and more only where too few
        survive: NMS takes memory with the square of their number.
        """
        if len(scores) <= _MOST_AT_ONCE:
            return batched_nms(boxes, scores, groups, self.nms_thresh)[: self.detections_per_img]
        count = _MOST_AT_ONCE
        while True:
            best = scores.topk(min(count, len(scores))).indices
            kept = batched_nms(boxes[best], scores[best], groups[best], self.nms_thresh)[
                : self.detections_per_img
            ]
            if len(kept) == self.detections_per_img or count >= len(scores):
                return best[kept]
            count *= 2
