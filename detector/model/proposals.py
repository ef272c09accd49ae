"""The region proposal network: torchvision's, with Detectron2's conventions as options.

Letters: N images, A anchors an image.
"""

from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.ops import clip_boxes_to_image, nms, remove_small_boxes

from .conventions import Conventions
from .losses import rpn_losses
from .sampling import SeededSampler


class Float32RPNHead(RPNHead):
    """torchvision's RPN head whose two outputs are float32 under autocast.

    bfloat16 leaves some 1500 distinct values among 6000 logits, too few to rank proposals by.
    """

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        hidden = [self.conv(feature) for feature in x]
        with torch.autocast(hidden[0].device.type, enabled=False):
            hidden = [h.to(self.cls_logits.weight.dtype) for h in hidden]
            return [self.cls_logits(h) for h in hidden], [self.bbox_pred(h) for h in hidden]


class ProposalNetwork(RegionProposalNetwork):
    """torchvision's RPN on one map under `conventions`; `options` are the arguments of torchvision's, by name."""

    def __init__(
        self, anchors: AnchorGenerator, head: RPNHead, conventions: Conventions, **options: Any
    ) -> None:
        super().__init__(anchors, head, **options)
        sampler = self.fg_bg_sampler
        self.fg_bg_sampler = SeededSampler(sampler.batch_size_per_image, sampler.positive_fraction)
        # torchvision keeps empty boxes where the least size is 0.
        self.min_size = conventions.rpn_min_size or torch.finfo(torch.float32).tiny
        self.conventions = conventions

    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The map (N, C4, h, w) -> boxes (M, 4) of each image, and the two losses where there are targets.

        torchvision's gives losses in training mode only; ours gives them in evaluation too.
        """
        maps = list(features.values())
        objectness, deltas = self.head(maps)
        anchors = self.anchor_generator(images, maps)
        # (N * A, 1) and (N * A, 4)
        objectness, deltas = concat_box_prediction_layers(objectness, deltas)
        # (N, A, 4)
        decoded = self.box_coder.decode(deltas.detach(), anchors).view(len(anchors), -1, 4)
        proposals, _ = self.filter_proposals(decoded, objectness, images.image_sizes, [len(anchors[0])])
        if targets is None:
            return proposals, {}
        labels, matched = self.assign_targets_to_anchors(anchors, targets)
        wanted = self.box_coder.encode(matched, anchors)
        loss_objectness, loss_box = self.compute_loss(objectness, deltas, labels, wanted)
        return proposals, {"loss_objectness": loss_objectness, "loss_rpn_box_reg": loss_box}

    def filter_proposals(
        self,
        proposals: Tensor,
        objectness: Tensor,
        image_shapes: list[tuple[int, int]],
        num_anchors_per_level: list[int],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """(N, A, 4) decoded boxes and (N * A, 1) logits -> boxes and scores of each image, by descending score.

        Scores are sigmoids, or logits where those rank.
        """
        if self.conventions.rpn_rank_on == "sigmoid":
            return super().filter_proposals(proposals, objectness, image_shapes, num_anchors_per_level)
        logits = objectness.detach().reshape(len(proposals), -1)
        selected = [self.select(*image) for image in zip(proposals, logits, image_shapes, strict=True)]
        return [boxes for boxes, _ in selected], [scores for _, scores in selected]

    def select(self, boxes: Tensor, logits: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The best of (A, 4) boxes by their (A,) logits: top, clip, drop the small and the unlikely, NMS."""
        logits, order = logits.topk(min(self.pre_nms_top_n(), len(logits)))
        boxes = clip_boxes_to_image(boxes[order], size)
        kept = remove_small_boxes(boxes, self.min_size)
        kept = kept[logits[kept].sigmoid() >= self.score_thresh]
        boxes, logits = boxes[kept], logits[kept]
        kept = nms(boxes, logits, self.nms_thresh)[: self.post_nms_top_n()]
        return boxes[kept], logits[kept]

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Losses of a sample of the (N * A, 1) logits and (N * A, 4) deltas; labels of each image are (A,)."""
        positive, negative = (torch.where(torch.cat(masks))[0] for masks in self.fg_bg_sampler(labels))
        sampled = torch.cat([positive, negative])
        asked_for = self.fg_bg_sampler.batch_size_per_image * len(labels)
        return rpn_losses(
            objectness.flatten()[sampled],
            torch.cat(labels)[sampled],
            pred_bbox_deltas[positive],
            torch.cat(regression_targets)[positive],
            normalizer=asked_for if self.conventions.rpn_loss_normalizer == "batch_size" else len(sampled),
            beta=self.conventions.rpn_smooth_l1_beta,
        )
