"""torchvision's RoI heads, which turn regions into detections and losses, with Detectron2's conventions as options.

Letters: N images, R regions, K classes with background, M detections of an image.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import batched_nms, box_iou

from .boxes import BoxCoder, clip_boxes
from .conventions import Conventions
from .losses import mean_losses, region_losses
from .sampling import SeededSampler, draw, match, padded

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

    def take(self, rows: Tensor, counts: list[int]) -> "Classified":
        """Select the boxes, and their outputs, of (S,) ascending rows, so many of each image."""
        boxes = list(torch.cat(self.boxes)[rows].split(counts))
        return Classified(boxes, self.image_sizes, self.vectors[rows], self.logits[rows], self.deltas[rows])


@dataclass(frozen=True)
class Sample:
    """S regions of N images to learn from.

    rows: (S,) ascending, into the candidates of all images; boxes: N x (S_i, 4); labels: (S,), 0 is background.
    wanted: (S, 4) box deltas from the sampled boxes to the matched objects.
    """

    rows: Tensor
    boxes: list[Tensor]
    labels: Tensor
    wanted: Tensor


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

    @torch.no_grad()
    def sample(self, candidates: list[Tensor], targets: Targets) -> Sample:
        """Match N x (M, 4) candidates to the targets, and draw a balanced sample."""
        gt_boxes = [t["boxes"].to(c.dtype) for t, c in zip(targets, candidates, strict=True)]
        matched, labels = self.assign_targets_to_proposals(
            candidates, gt_boxes, [t["labels"] for t in targets]
        )
        drawn = draw(self.fg_bg_sampler, labels)
        rows = torch.cat(drawn[:2]).sort().values
        counts = np.add(drawn.num_positive, drawn.num_negative).tolist()
        objects = torch.cat([own[index] for own, index in zip(padded(gt_boxes), matched, strict=True)])[rows]
        boxes = torch.cat(candidates)[rows]
        wanted = self.box_coder.encode_single(objects, boxes)
        return Sample(rows, list(boxes.split(counts)), torch.cat(labels)[rows], wanted)

    def assign_targets_to_proposals(
        self, proposals: list[Tensor], gt_boxes: list[Tensor], gt_labels: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """N x (M, 4) proposals -> matched objects N x (M,), and labels N x (M,): 0 is background, -1 is neither."""
        matches = match(self.proposal_matcher, gt_boxes, padded(proposals))
        # -1 is background, and -2 neither.
        index = matches.clamp(min=0)
        labels = torch.where(matches >= 0, padded(gt_labels).gather(1, index), matches + 1)
        sizes = [len(p) for p in proposals]
        return tuple([row[:n] for row, n in zip(rows, sizes, strict=True)] for rows in (index, labels))

    def losses(self, classified: Classified, sample: Sample) -> dict[str, Tensor]:
        """The RoI heads' two losses; in evaluation, the mean of the images' own.

        `classified` holds the outputs for the boxes of `sample`, in the same order.
        """
        counts = [len(sample.rows)] if self.training else classified.counts
        columns = (classified.logits, classified.deltas, sample.labels, sample.wanted)
        parts = zip(*(values.split(counts) for values in columns), strict=True)
        beta = self.conventions.box_smooth_l1_beta
        classifier, box = mean_losses(region_losses(*part, beta) for part in parts)
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
        scores = F.softmax(classified.logits, -1)
        # Without any box, torchvision's shape differs.
        decoded = self.box_coder.decode(classified.deltas, classified.boxes).view(*scores.shape, 4)
        selected = self.select(
            decoded, scores, classified.counts, classified.image_sizes, score_thresh, class_agnostic_nms
        )
        return [
            {"boxes": boxes, "labels": labels, "scores": own}
            | ({"class_scores": scores[rows]} if class_scores else {})
            for boxes, own, labels, rows in selected
        ]

    def select(
        self,
        boxes: Tensor,
        scores: Tensor,
        counts: list[int],
        sizes: Sizes,
        score_thresh: float | None = None,
        class_agnostic_nms: bool | None = None,
    ) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Select each image's detections from (R, K, 4) boxes and (R, K) scores, best first.

        counts: boxes of each image; sizes: the (height, width) that they are clipped to.
        Returns boxes (M, 4), scores (M,), labels (M,) and rows (M,) for each image; a row indexes the R boxes.
        """
        thresh = self.score_thresh if score_thresh is None else score_thresh
        agnostic = self.class_agnostic_nms if class_agnostic_nms is None else class_agnostic_nms
        num_foreground = scores.shape[1] - 1
        boxes, scores = clip_boxes(boxes[:, 1:], sizes, counts), scores[:, 1:]
        is_kept = scores > thresh
        # If it is 0, NetworkTransform.postprocess drops the empty boxes.
        if self.conventions.box_min_size > 0:
            is_kept &= (boxes[..., 2:] - boxes[..., :2] >= self.conventions.box_min_size).all(dim=2)
        # All images are looked at together, because each look makes the host wait for a GPU.
        kept = torch.where(is_kept.flatten())[0]
        boxes, scores = boxes.reshape(-1, 4)[kept], scores.reshape(-1)[kept]
        labels, rows = kept % num_foreground + 1, kept // num_foreground
        groups = torch.zeros_like(labels) if agnostic else labels
        num_kept = torch.stack([image.sum() for image in is_kept.split(counts)]).tolist()
        columns = (values.split(num_kept) for values in (boxes, scores, labels, rows, groups))
        return [self._best(*image) for image in zip(*columns, strict=True)]

    def _best(
        self, boxes: Tensor, scores: Tensor, labels: Tensor, rows: Tensor, groups: Tensor
    ) -> tuple[Tensor, ...]:
        """The rows that NMS within `groups` keeps of one image's boxes (M, 4) and (M,) scores, labels and rows."""
        order = self._suppress(boxes, scores, groups)
        return boxes[order], scores[order], labels[order], rows[order]

    def _suppress(self, boxes: Tensor, scores: Tensor, groups: Tensor) -> Tensor:
        """The rows of (M, 4) boxes that NMS within `groups` (M,) keeps, best first, at most `detections_per_img`.

        Boxes of lower scores never suppress any of higher ones. So the best go first, and the next, without those that
        the kept ones suppress, only where too few survive: NMS takes memory with the square of their number.
        """
        if len(scores) <= _MOST_AT_ONCE:
            return batched_nms(boxes, scores, groups, self.nms_thresh)[: self.detections_per_img]
        kept = torch.empty(0, dtype=torch.int64, device=scores.device)
        for rows in scores.argsort(descending=True, stable=True).split(_MOST_AT_ONCE):
            suppressed = box_iou(boxes[kept], boxes[rows]) > self.nms_thresh
            rows = rows[~(suppressed & (groups[kept][:, None] == groups[rows])).any(dim=0)]
            best = rows[batched_nms(boxes[rows], scores[rows], groups[rows], self.nms_thresh)]
            kept = torch.cat([kept, best])[: self.detections_per_img]
            if len(kept) == self.detections_per_img:
                break
        return kept
