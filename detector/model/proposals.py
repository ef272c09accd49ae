"""torchvision's region proposal network, with Detectron2's conventions as options.

Letters: N images, A anchors an image, k anchors a position, M proposals of an image.
"""

from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.ops import clip_boxes_to_image, nms

from .boxes import BoxCoder
from .conventions import Conventions
from .losses import rpn_losses
from .sampling import AnchorMatcher, SeededSampler, draw


class Float32RPNHead(RPNHead):
    """torchvision's RPN head whose two outputs are float32 under autocast.

    bfloat16 leaves about 1500 distinct values among 6000 logits, too few to rank proposals by.
    """

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps (N, C4, h, w) -> for each map, objectness logits (N, k, h, w) and box deltas (N, 4k, h, w)."""
        hidden = [self.conv(feature) for feature in x]
        with torch.autocast(hidden[0].device.type, enabled=False):
            hidden = [h.to(self.cls_logits.weight.dtype) for h in hidden]
            return [self.cls_logits(h) for h in hidden], [self.bbox_pred(h) for h in hidden]


class ProposalNetwork(RegionProposalNetwork):
    """torchvision's RPN on one map, under `conventions`.

    `options` are the keyword arguments of torchvision's RegionProposalNetwork.
    """

    def __init__(
        self, anchors: AnchorGenerator, head: RPNHead, conventions: Conventions, **options: Any
    ) -> None:
        super().__init__(anchors, head, **options)
        sampler = self.fg_bg_sampler
        self.fg_bg_sampler = SeededSampler(sampler.batch_size_per_image, sampler.positive_fraction)
        self.proposal_matcher = AnchorMatcher(options["fg_iou_thresh"], options["bg_iou_thresh"], True)
        self.box_coder = BoxCoder(self.box_coder.weights)
        # With a least size of 0, torchvision would keep empty boxes.
        self.min_size = conventions.rpn_min_size or torch.finfo(torch.float32).tiny
        self.conventions = conventions

    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The map (N, C4, h, w) -> N x (M, 4) proposals, and the two losses if targets are given.

        torchvision computes the losses in training mode only. This class computes them in evaluation mode too.
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
        """(N, A, 4) decoded boxes and (N * A, 1) logits -> N x (M, 4) boxes and N x (M,) scores, best first.

        Scores are sigmoids, or logits under `rpn_rank_on: logits`.
        """
        logits = objectness.detach().reshape(len(proposals), -1)
        logits, order = logits.topk(min(self.pre_nms_top_n(), logits.shape[1]), dim=1)
        boxes = proposals.gather(1, order[..., None].expand(-1, -1, 4))
        selected = [self.select(*image) for image in zip(boxes, logits, image_shapes, strict=True)]
        return [boxes for boxes, _ in selected], [scores for _, scores in selected]

    def select(self, boxes: Tensor, logits: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The best (k, 4) boxes and (k,) logits of one image -> (M, 4) proposals and their (M,) scores, best first.

        Clip to `size` (height, width), drop small and improbable boxes, then apply NMS.
        """
        boxes, probabilities = clip_boxes_to_image(boxes, size), logits.sigmoid()
        is_large = (boxes[:, 2:] - boxes[:, :2] >= self.min_size).all(dim=1)
        # One look at both conditions: each makes the host wait for a GPU.
        kept = torch.where(is_large & (probabilities >= self.score_thresh))[0]
        scores = (probabilities if self.conventions.rpn_rank_on == "sigmoid" else logits)[kept]
        boxes = boxes[kept]
        kept = nms(boxes, scores, self.nms_thresh)[: self.post_nms_top_n()]
        return boxes[kept], scores[kept]

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Objectness and box loss of the anchors that the sampler draws.

        objectness: (N * A, 1); pred_bbox_deltas: (N * A, 4); labels: N x (A,); regression_targets: N x (A, 4).
        """
        drawn = draw(self.fg_bg_sampler, labels)
        first = range(0, len(labels) * len(labels[0]), len(labels[0]))
        positive, negative = (
            torch.cat([rows + start for rows, start in zip(of_kind, first, strict=True)])
            for of_kind in zip(*drawn, strict=True)
        )
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
