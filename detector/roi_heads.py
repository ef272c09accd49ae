"""From regions to detections and losses: torchvision's RoI heads, with Detectron2's conventions as options.

Letters: N images, R regions, K classes with background, M detections of an image.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes

from .losses import region_losses
from .sampling import SeededSampler

Sizes = list[tuple[int, int]]


class Float32Predictor(FastRCNNPredictor):
    """torchvision's box predictor, in float32 under autocast."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.cls_score.weight.dtype))


class BoxHeads(RoIHeads):
    """torchvision's RoI heads for boxes alone, made from stock ones; `Conventions` describes the options.

    class_agnostic_nms: a box suppresses those of other classes too.
    """

    def __init__(
        self, stock: RoIHeads, *, min_size: float, smooth_l1_beta: float, class_agnostic_nms: bool = False
    ) -> None:
        matcher, sampler = stock.proposal_matcher, stock.fg_bg_sampler
        super().__init__(
            stock.box_roi_pool,
            stock.box_head,
            stock.box_predictor,
            matcher.high_threshold,
            matcher.low_threshold,
            sampler.batch_size_per_image,
            sampler.positive_fraction,
            stock.box_coder.weights,
            stock.score_thresh,
            stock.nms_thresh,
            stock.detections_per_img,
        )
        self.fg_bg_sampler = SeededSampler(sampler.batch_size_per_image, sampler.positive_fraction)
        self.min_size, self.smooth_l1_beta = min_size, smooth_l1_beta
        self.class_agnostic_nms = class_agnostic_nms

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: Sizes,
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections in evaluation mode, the two losses in training mode; the other is empty."""
        if not self.training:
            return self.detect(features, proposals, image_shapes), {}
        proposals, _, labels, wanted = self.select_training_samples(proposals, targets)
        logits, deltas = self.predict(features, proposals, image_shapes)
        return [], self.losses(logits, deltas, labels, wanted)

    def predict(
        self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: Sizes
    ) -> tuple[Tensor, Tensor]:
        """Class logits (R, K) and box deltas (R, 4K) of the boxes of all images."""
        return self.box_predictor(self.box_head(self.box_roi_pool(features, boxes, image_shapes)))

    def losses(
        self, logits: Tensor, deltas: Tensor, labels: list[Tensor], wanted: list[Tensor]
    ) -> dict[str, Tensor]:
        classifier, box = region_losses(
            logits, deltas, torch.cat(labels), torch.cat(list(wanted)), self.smooth_l1_beta
        )
        return {"loss_classifier": classifier, "loss_box_reg": box}

    def detect(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: Sizes,
        *,
        class_scores: bool = False,
    ) -> list[dict[str, Tensor]]:
        """The detections of each image: boxes, labels, scores, and where asked class_scores (M, K), background first."""
        logits, deltas = self.predict(features, proposals, image_shapes)
        found = self.postprocess_detections(logits, deltas, proposals, image_shapes)
        names = ("boxes", "scores", "labels", "rows")
        detections = [dict(zip(names, image, strict=True)) for image in zip(*found, strict=True)]
        for detection, own in zip(detections, logits.split([len(p) for p in proposals]), strict=True):
            rows = detection.pop("rows")
            if class_scores:
                detection["class_scores"] = F.softmax(own[rows], -1)
        return detections

    def evaluate(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: Sizes,
        targets: list[dict[str, Tensor]],
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections of the proposals, and the losses of a sample of them and the ground truth."""
        gt_boxes = [t["boxes"].to(p.dtype) for t, p in zip(targets, proposals, strict=True)]
        candidates = self.add_gt_proposals(proposals, gt_boxes)
        logits, deltas = self.predict(features, candidates, image_shapes)
        counts = [len(c) for c in candidates]
        is_proposal = torch.cat(
            [torch.arange(n, device=logits.device) < len(p) for n, p in zip(counts, proposals, strict=True)]
        )
        boxes, scores, labels, _ = self.postprocess_detections(
            logits[is_proposal], deltas[is_proposal], proposals, image_shapes
        )
        detections = [
            {"boxes": b, "labels": k, "scores": s} for b, k, s in zip(boxes, labels, scores, strict=True)
        ]
        matched, labels = self.assign_targets_to_proposals(
            candidates, gt_boxes, [t["labels"] for t in targets]
        )
        sampled = self.subsample(labels)
        matched_boxes = [
            (gt if len(gt) else gt.new_zeros(1, 4))[m[s]]
            for gt, m, s in zip(gt_boxes, matched, sampled, strict=True)
        ]
        wanted = self.box_coder.encode(
            matched_boxes, [c[s] for c, s in zip(candidates, sampled, strict=True)]
        )
        labels = [k[s] for k, s in zip(labels, sampled, strict=True)]
        rows = torch.cat([s + sum(counts[:i]) for i, s in enumerate(sampled)])
        return detections, self.losses(logits[rows], deltas[rows], labels, wanted)

    def postprocess_detections(
        self, class_logits: Tensor, box_regression: Tensor, proposals: list[Tensor], image_shapes: Sizes
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """torchvision's boxes, scores and labels of each image, and the row of the proposal each comes from."""
        counts = [len(p) for p in proposals]
        boxes = self.box_coder.decode(box_regression, proposals).split(counts)  # (R, K, 4)
        scores = F.softmax(class_logits, -1).split(counts)
        images = zip(boxes, scores, image_shapes, strict=True)
        return tuple(map(list, zip(*(self.select(*image) for image in images), strict=True)))

    def select(self, boxes: Tensor, scores: Tensor, size: tuple[int, int]) -> tuple[Tensor, ...]:
        """Boxes, scores, labels and rows of the detections among (R, K, 4) boxes with (R, K) scores."""
        num_foreground = scores.shape[1] - 1
        boxes = clip_boxes_to_image(boxes, size)[:, 1:].reshape(-1, 4)
        scores = scores[:, 1:].reshape(-1)
        kept = torch.where(scores > self.score_thresh)[0]
        if self.min_size > 0:  # else empty ones leave last: NetworkTransform.postprocess
            kept = kept[remove_small_boxes(boxes[kept], self.min_size)]
        boxes, scores = boxes[kept], scores[kept]
        labels, rows = kept % num_foreground + 1, kept // num_foreground
        groups = torch.zeros_like(labels) if self.class_agnostic_nms else labels
        order = batched_nms(boxes, scores, groups, self.nms_thresh)[: self.detections_per_img]
        return boxes[order], scores[order], labels[order], rows[order]
