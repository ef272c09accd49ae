"""torchvision's region proposal network, with Detectron2's conventions as options.

Letters: N images, A anchors an image, k anchors a position, M proposals of an image.
"""

from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.ops import nms

from .boxes import BoxCoder, clip_boxes
from .conventions import Conventions
from .losses import mean_losses, rpn_losses
from .sampling import SeededSampler, draw, match, padded


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
        boxes = clip_boxes(boxes.view(-1, 4), image_shapes, [logits.shape[1]] * len(logits))
        probabilities = logits.sigmoid()
        is_large = (boxes[:, 2:] - boxes[:, :2] >= self.min_size).all(dim=1).view_as(logits)
        is_kept = is_large & (probabilities >= self.score_thresh)
        scores = probabilities if self.conventions.rpn_rank_on == "sigmoid" else logits
        # All images are looked at together, because each look makes the host wait for a GPU.
        rows, counts = torch.where(is_kept.flatten())[0], is_kept.sum(dim=1).tolist()
        boxes, scores = boxes[rows].split(counts), scores.flatten()[rows].split(counts)
        found = [self._best(*image) for image in zip(boxes, scores, strict=True)]
        return [boxes for boxes, _ in found], [scores for _, scores in found]

    def _best(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """What NMS keeps of one image's boxes (M, 4) and scores (M,), at most `post_nms_top_n`."""
        kept = nms(boxes, scores, self.nms_thresh)[: self.post_nms_top_n()]
        return boxes[kept], scores[kept]

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """N x (A, 4) anchors -> labels N x (A,), 1.0, 0.0 or -1.0 between the thresholds, and objects N x (A, 4)."""
        objects = [target["boxes"] for target in targets]
        matches = match(self.proposal_matcher, objects, torch.stack(anchors))
        matched = padded(objects).gather(1, matches.clamp(min=0)[..., None].expand(-1, -1, 4))
        # -1 is background, and -2 neither.
        return list((matches + 1).clamp(max=1).float()), list(matched)

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Objectness and box loss of the anchors that the sampler draws; in evaluation, the mean of the images' own.

        objectness: (N * A, 1); pred_bbox_deltas: (N * A, 4); labels: N x (A,); regression_targets: N x (A, 4).
        """
        drawn = draw(self.fg_bg_sampler, labels)
        parts = [drawn[:2]] if self.training else drawn.by_image()
        asked_for = self.fg_bg_sampler.batch_size_per_image * len(labels) // len(parts)
        by_batch_size = self.conventions.rpn_loss_normalizer == "batch_size"
        logits, labels, wanted = objectness.flatten(), torch.cat(labels), torch.cat(regression_targets)
        return mean_losses(
            rpn_losses(
                logits[torch.cat(part)],
                labels[torch.cat(part)],
                pred_bbox_deltas[part[0]],
                wanted[part[0]],
                normalizer=asked_for if by_batch_size else sum(map(len, part)),
                beta=self.conventions.rpn_smooth_l1_beta,
            )
            for part in parts
        )
