"""One detector in every form that is timed: "stock", composed of torchvision's parts, and ours.

All forms have the same random weights, proposals (`ForcedProposals`) and image sizes. Batch norm's statistics are those
of noise pictures, so that activations keep their scale. Stock is as a user composes it: eager, contiguous, and with
torchvision's pool.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from backbones import create_backbone
from backbones.backbone import CROP
from backbones.resnet import TORCHVISION_NAMES
from backbones.weights import DEFERRED, load_into
from detector.model.faster_rcnn import build_faster_rcnn
from detector.model.speed import Speed, apply_speed, compile_model, optimize

from .settings import DTYPES, Settings, Size

INFERENCE_FORMS = ("stock", "stock_channels_last", "ours", "ours_direct", "ours_optimized", "ours_compiled")


def random_weights(name: str) -> dict[str, Tensor]:
    """A torchvision network's seeded random weights, with batch norm's statistics of noise pictures."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = _stock_network(name, nn.BatchNorm2d).train()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                # The statistics are the plain mean of the batches.
                module.momentum = None
        with torch.no_grad():
            network(torch.randn(2, 3, 128, 128))
    return network.state_dict()


def _stock_network(name: str, norm: Callable[[int], nn.Module]) -> nn.Module:
    if not name.startswith("resnet"):
        raise ValueError(f"backbone is {name!r}; accepted: torchvision's resnet18, 34, 50, 101, 152")
    network = torchvision.models.get_model(name, weights=None, norm_layer=norm)
    network.out_channels, network.fc = network.fc.in_features, nn.Identity()
    return network


def build_form(
    form: str, settings: Settings, weights: dict[str, Tensor], *, training: bool = False, **options: object
) -> FasterRCNN:
    """Build the detector in one form, in evaluation or training mode. options: arguments of FasterRCNN.

    In training, batch norm, the stem and conv2_x are frozen. Optimised forms are cast to `settings.dtype`; the others
    run under autocast.
    """
    if form.startswith("stock"):
        model = stock_detector(settings, weights, training, **options)
    else:
        model = _our_detector(settings, weights, training, form == "ours_checkpointed", **options)
    _seed_outputs(model)
    model = model.to(settings.device).train(training)
    if form in ("ours_direct", "ours_optimized", "ours_compiled"):
        model = optimize(model, winograd=form != "ours_direct", dtype=DTYPES[settings.dtype] or torch.float32)
    if form == "ours_compiled":
        compile_model(model)
    return model if form == "stock" else model.to(memory_format=torch.channels_last)


def stock_detector(
    settings: Settings, weights: dict[str, Tensor] | None, frozen: bool, **options: object
) -> FasterRCNN:
    """torchvision's FasterRCNN with a ResNet that is cut after layer3.

    weights: None keeps the network's own random ones. frozen: batch norm, the stem and layer1 are frozen.
    """
    network = _stock_network(settings.backbone, FrozenBatchNorm2d if frozen else nn.BatchNorm2d)
    if weights is not None:
        network.load_state_dict(weights)
    stem = (network.conv1, network.bn1, network.relu, network.maxpool, network.layer1)
    trunk = nn.Sequential(*stem, network.layer2, network.layer3)
    trunk.out_channels = network.layer4[0].conv1.in_channels
    if frozen:
        for module in stem:
            module.requires_grad_(False)
    return FasterRCNN(
        trunk,
        rpn_anchor_generator=AnchorGenerator(((32, 64, 128, 256, 512),), ((0.5, 1.0, 2.0),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], CROP, 2),
        box_head=nn.Sequential(network.layer4, network.avgpool, nn.Flatten(1)),
        box_predictor=FastRCNNPredictor(network.out_channels, settings.num_classes),
        **options,
    )


def _our_detector(
    settings: Settings, weights: dict[str, Tensor], frozen: bool, checkpointing: bool, **options: object
) -> FasterRCNN:
    norm = {"norm": "frozen", "frozen_stages": 2} if frozen else {}
    backbone = create_backbone(settings.backbone, weights=DEFERRED, **norm)
    load_into(backbone, weights, TORCHVISION_NAMES, source="the stock network")
    model = build_faster_rcnn(backbone, settings.num_classes, **options)
    return apply_speed(model, Speed(activation_checkpointing=checkpointing))


@torch.no_grad()
def _seed_outputs(model: FasterRCNN) -> None:
    """Give RPN and predictor the same small random weights in every form."""
    generator = torch.Generator().manual_seed(1)
    for parameter in (*model.rpn.head.parameters(), *model.roi_heads.box_predictor.parameters()):
        parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))


class ForcedProposals:
    """Replaces the RPN's proposals by `count` seeded boxes per image, since those of random weights are few and alike.

    The RPN's own filter still runs, so that its time counts. In training, torch's seed is set too, so that every form
    samples the same anchors and regions.
    """

    def __init__(self, rpn: nn.Module) -> None:
        self.rpn, self.count = rpn, 0
        self._filter = rpn.filter_proposals
        self._boxes: dict[tuple, Tensor] = {}
        rpn.filter_proposals = self

    def __call__(
        self,
        proposals: Tensor,
        objectness: Tensor,
        image_shapes: list[Size],
        num_anchors_per_level: list[int],
    ) -> tuple[list[Tensor], list[Tensor]]:
        _, scores = self._filter(proposals, objectness, image_shapes, num_anchors_per_level)
        if self.rpn.training:
            torch.manual_seed(0)
        return [self._of(i, tuple(s), proposals.device) for i, s in enumerate(image_shapes)], scores

    def _of(self, image: int, shape: Size, device: torch.device) -> Tensor:
        key = image, shape, self.count
        if key not in self._boxes:
            self._boxes[key] = random_boxes(self.count, shape, seed=image).to(device)
        return self._boxes[key]


def random_boxes(count: int, size: Size, seed: int) -> Tensor:
    """(count, 4) float32 xyxy boxes within the image.

    The sides are from 16 to 512 pixels, uniform in their logarithm, and at most 0.9 of the image's.
    """
    rng = np.random.default_rng(seed)
    limit = 0.9 * np.array(size[::-1])
    sides = np.minimum(np.exp(rng.uniform(math.log(16), math.log(512), (count, 2))), limit)
    corners = rng.uniform(0, 1, (count, 2)) * (np.array(size[::-1]) - sides)
    return torch.from_numpy(np.concatenate([corners, corners + sides], axis=1).astype(np.float32))


def set_case(model: FasterRCNN, size: Size, count: int) -> None:
    """Make the model keep images of `size` at that size, and make its `ForcedProposals` give `count` per image."""
    model.transform.min_size, model.transform.max_size = (min(size),), max(size)
    model.rpn.filter_proposals.count = count


def make_images(settings: Settings, size: Size) -> list[Tensor]:
    """A batch of seeded noise images (3, H, W) in [0, 1]."""
    generator = torch.Generator().manual_seed(2)
    return [torch.rand(3, *size, generator=generator).to(settings.device) for _ in range(settings.batch)]
