"""The C4 detector as Detectron2 computes it, op for op, of torch and torchvision.ops alone: the tests' second route.

It reads Detectron2's names and shares no code with the project. Letters: A anchors, R regions, K foreground classes.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, nms, roi_align

DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
MEAN = (103.530, 116.280, 123.675)  # BGR, 0..255
CLAMP = math.log(1000 / 16)
RPN, ROI = (1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)  # weights of the box coder
SIZES, RATIOS, STRIDE = (32, 64, 128, 256, 512), (0.5, 1.0, 2.0), 16


def frozen_norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    weight, bias, mean, var = (
        state[f"{name}.{p}"] for p in ("weight", "bias", "running_mean", "running_var")
    )
    if not x.requires_grad:
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=1e-5)
    scale = weight * (var + 1e-5).rsqrt()
    shift = bias - mean * scale
    return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


def conv_norm(x: Tensor, state: dict[str, Tensor], name: str, stride: int = 1) -> Tensor:
    weight = state[f"{name}.weight"]
    x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
    return frozen_norm(x, state, f"{name}.norm")


def stage(x: Tensor, state: dict[str, Tensor], name: str, blocks: int, stride: int) -> Tensor:
    for i in range(blocks):
        block, step = f"{name}.{i}", stride if i == 0 else 1
        y = F.relu_(conv_norm(x, state, f"{block}.conv1", step))
        y = F.relu_(conv_norm(y, state, f"{block}.conv2"))
        y = conv_norm(y, state, f"{block}.conv3")
        y += conv_norm(x, state, f"{block}.shortcut", step) if i == 0 else x
        x = F.relu_(y)
    return x


def trunk(images: Tensor, state: dict[str, Tensor], depth: int) -> Tensor:
    """(N, 3, H, W) normalised BGR -> conv4_x."""
    x = F.relu_(conv_norm(images, state, "backbone.stem.conv1", 2))
    x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
    for k, blocks in enumerate(DEPTHS[depth][:3]):
        x = stage(x, state, f"backbone.res{k + 2}", blocks, stride=1 if k == 0 else 2)
    return x


def rpn_head(features: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Objectness (N, A, h, w) and deltas (N, 4A, h, w)."""
    rpn = "proposal_generator.rpn_head"

    def conv(x: Tensor, name: str, padding: int) -> Tensor:
        return F.conv2d(x, state[f"{rpn}.{name}.weight"], state[f"{rpn}.{name}.bias"], padding=padding)

    hidden = F.relu(conv(features, "conv", 1))
    return conv(hidden, "objectness_logits", 0), conv(hidden, "anchor_deltas", 0)


def anchors(height: int, width: int) -> Tensor:
    """(h * w * A, 4) of a map, in the order (y, x, size, ratio)."""
    cells = []
    for size in SIZES:
        for ratio in RATIOS:
            w = math.sqrt(size**2 / ratio)
            h = ratio * w
            cells.append([-w / 2, -h / 2, w / 2, h / 2])
    y, x = torch.meshgrid(torch.arange(height) * 16.0, torch.arange(width) * 16.0, indexing="ij")
    shifts = torch.stack([x, y, x, y], dim=-1).view(-1, 1, 4)
    return (shifts + torch.tensor(cells)).view(-1, 4)


def decode(deltas: Tensor, boxes: Tensor, weights: tuple[float, ...]) -> Tensor:
    """(R, 4K) deltas of (R, 4) boxes -> (R, K, 4) boxes."""
    size, corner = boxes[:, 2:] - boxes[:, :2], boxes[:, :2]
    center = corner + 0.5 * size
    d = deltas.view(len(boxes), -1, 4)
    move = torch.stack([d[..., 0] / weights[0], d[..., 1] / weights[1]], -1)
    grow = torch.stack([d[..., 2] / weights[2], d[..., 3] / weights[3]], -1).clamp(max=CLAMP)
    middle, extent = move * size[:, None] + center[:, None], grow.exp() * size[:, None]
    return torch.cat([middle - 0.5 * extent, middle + 0.5 * extent], dim=-1)


def encode(wanted: Tensor, boxes: Tensor, weights: tuple[float, ...]) -> Tensor:
    size, wanted_size = boxes[:, 2:] - boxes[:, :2], wanted[:, 2:] - wanted[:, :2]
    move = (wanted[:, :2] + 0.5 * wanted_size - (boxes[:, :2] + 0.5 * size)) / size
    return torch.cat([move, (wanted_size / size).log()], dim=1) * torch.tensor(weights)


def rpn_rows(objectness: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of one image in the order of its anchors: (h * w * A,), (h * w * A, 4)."""
    by_anchor = deltas[0].unflatten(0, (-1, 4))  # (A, 4, h, w)
    return objectness[0].permute(1, 2, 0).flatten(), by_anchor.permute(2, 3, 0, 1).reshape(-1, 4)


def propose(
    logits: Tensor, boxes: Tensor, size: tuple[int, int], pre: int, post: int
) -> tuple[Tensor, Tensor]:
    """The best proposals of an image and their logits."""
    logits, order = logits.detach().topk(min(pre, len(logits)))
    boxes = clip_boxes_to_image(boxes.detach()[order], size)
    kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    boxes, logits = boxes[kept], logits[kept]
    kept = nms(boxes, logits, 0.7)[:post]
    return boxes[kept], logits[kept]


def crops(features: Tensor, boxes: Tensor) -> Tensor:
    return roi_align(features, [boxes], 14, 1 / STRIDE, sampling_ratio=0, aligned=True)


def res5(regions: Tensor, state: dict[str, Tensor]) -> Tensor:
    return stage(regions, state, "roi_heads.res5", 3, stride=2)


def predict(pooled: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits (R, K + 1), background last, and deltas (R, 4K)."""
    head = "roi_heads.box_predictor"
    return tuple(
        F.linear(pooled, state[f"{head}.{name}.weight"], state[f"{head}.{name}.bias"])
        for name in ("cls_score", "bbox_pred")
    )


def detect(
    logits: Tensor, deltas: Tensor, proposals: Tensor, size: tuple[int, int], original_size: tuple[int, int]
) -> dict[str, Tensor]:
    """Boxes in pixels of the original image, scores, classes 0..K-1."""
    scores = F.softmax(logits, dim=-1)[:, :-1]
    boxes = clip_boxes_to_image(decode(deltas, proposals, ROI), size)
    rows, classes = (scores > 0.05).nonzero(as_tuple=True)
    boxes, scores = boxes[rows, classes], scores[rows, classes]
    kept = batched_nms(boxes, scores, classes, 0.5)[:100]
    scale = torch.tensor([original_size[1] / size[1], original_size[0] / size[0]] * 2)
    boxes = clip_boxes_to_image(boxes[kept] * scale, original_size)
    whole = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    return {"boxes": boxes[whole], "scores": scores[kept][whole], "classes": classes[kept][whole]}


def match(
    boxes: Tensor, targets: Tensor, low: float, high: float, low_quality: bool
) -> tuple[Tensor, Tensor]:
    """Index of the best target of each box, and 1, 0 or -1: positive, negative, ignored."""
    overlaps = box_iou(targets, boxes)
    best, matched = overlaps.max(dim=0)
    labels = torch.full_like(matched, -1)
    labels[best < low] = 0
    labels[best >= high] = 1
    if low_quality:
        labels[(overlaps == overlaps.max(dim=1, keepdim=True).values).any(dim=0)] = 1
    return matched, labels


def sample_first(labels: Tensor, number: int, fraction: float) -> tuple[Tensor, Tensor]:
    """Indices of the positives (1) and negatives (0) of a sample: the lowest of each."""
    positive = (labels == 1).nonzero().flatten()[: int(number * fraction)]
    return positive, (labels == 0).nonzero().flatten()[: number - len(positive)]


def losses(
    image: Tensor,
    targets: Tensor,
    classes: Tensor,
    state: dict[str, Tensor],
    depth: int,
    num_regions: int = 512,
) -> dict[str, Tensor]:
    """The four losses of one (1, 3, H, W) image with targets (M, 4) and classes 0..K-1, under first-k sampling."""
    size = tuple(image.shape[-2:])
    features = trunk(image, state, depth)
    logits, deltas = rpn_rows(*rpn_head(features, state))
    priors = anchors(*features.shape[-2:])
    matched, labels = match(priors, targets, 0.3, 0.7, low_quality=True)
    positive, negative = sample_first(labels, 256, 0.5)
    sampled = torch.cat([positive, negative]).sort().values
    wanted = encode(targets[matched], priors, RPN)
    objectness = F.binary_cross_entropy_with_logits(logits[sampled], labels[sampled].float(), reduction="sum")
    found = {
        "loss_objectness": objectness / 256,
        "loss_rpn_box_reg": (deltas[positive] - wanted[positive]).abs().sum() / 256,
    }
    decoded = decode(deltas.detach(), priors, RPN)[:, 0]
    proposals = torch.cat([propose(logits, decoded, size, 12000, 2000)[0], targets])
    matched, labels = match(proposals, targets, 0.5, 0.5, low_quality=False)
    positive, negative = sample_first(labels, num_regions, 0.25)
    regions = torch.cat([positive, negative])
    num_classes = len(state["roi_heads.box_predictor.cls_score.bias"]) - 1
    labels = torch.where(labels == 1, classes[matched], num_classes)[regions]
    scores, deltas = predict(res5(crops(features, proposals[regions]), state).mean(dim=(2, 3)), state)
    of_class = deltas.view(len(regions), -1, 4)[range(len(positive)), labels[: len(positive)]]
    wanted = encode(targets[matched[positive]], proposals[positive], ROI)
    return found | {
        "loss_classifier": F.cross_entropy(scores, labels),
        "loss_box_reg": (of_class - wanted).abs().sum() / len(regions),
    }
