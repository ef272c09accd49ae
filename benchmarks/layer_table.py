"""Print networks stage by stage, as Table 1 of He et al. 2015 (arXiv 1512.03385) does.

python benchmarks/layer_table.py resnet101 cifar_resnet110
python benchmarks/layer_table.py resnet18 --size 600 1000 --json
"""

import argparse
import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

# The package `benchmarks` is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backbones import Backbone, cifar_resnet, create_backbone
from backbones.densenet import DenseLayer
from backbones.inception import Inception
from backbones.residual import ResidualBlock
from backbones.summary import count_parameters, multiply_accumulates
from benchmarks.receptive_field import ReachMode
from detector.command_line import exit_status, make_parser
from detector.tables import format_table

CIFAR = re.compile(r"cifar_resnet(\d+)")
HEADER = ("stage", "layers", "blocks", "output", "parameters", "MMAC", "receptive field", "stride")
IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class StageRow:
    """One row of the table.

    layers: the convolutions of each block, or of a stem, such as "1x1 64, 3x3 64, 1x1 256"; None: not known.
    blocks: the number of blocks; None where there are none, or they are not known, as in networks cut by tracing.
    output: channels, height and width.
    macs: multiply-accumulates.
    receptive_field: pixels of the image along its height; None: all of them.
    depth: convolutions and linear layers on the longest path from the image.
    """

    stage: str
    layers: str | None
    blocks: int | None
    output: tuple[int, ...]
    parameters: int
    macs: int
    receptive_field: int | None
    stride: int | None
    depth: int


def layer_table(network: Backbone | nn.Sequential, image_size: tuple[int, int]) -> list[StageRow]:
    """The stages of a backbone, with a classifier of 1000 classes, or those of a CIFAR network.

    The network may be on the meta device, which computes no numbers. image_size: height and width.
    """
    image = torch.zeros(1, 3, *image_size, device=next(network.parameters()).device)
    was_training = network.training
    network.eval()
    with torch.no_grad(), ReachMode(image):
        rows = _rows(_stages(network), image)
    network.train(was_training)
    return rows


def _rows(stages: dict[str, nn.Module], features: Tensor) -> list[StageRow]:
    rows = []
    for name, stage in stages.items():
        macs = multiply_accumulates(stage, features)
        features = stage(features)
        reach, size = features.reach, (*features.shape[1:], 1, 1)[:3]
        stride = None if reach.pooled else reach.stride
        found = _layers(stage), len(_blocks(stage)) or None, size, count_parameters(stage), macs
        rows.append(StageRow(name, *found, reach.rows, stride, reach.layers))
    return rows


def _stages(network: Backbone | nn.Sequential) -> dict[str, nn.Module]:
    """The modules of each row, in order."""
    if isinstance(network, Backbone):
        modules = (*network.trunk.stages, network.roi_head.stage5)
        stages = {"conv1" if k == 1 else f"conv{k}_x": stage for k, stage in enumerate(modules, start=1)}
        classifier = nn.Linear(network.roi_head.out_channels, IMAGENET_CLASSES)
        classifier.to(next(network.parameters()).device)
    else:
        stages = dict(network.named_children())
        classifier = stages.pop("fc")
        del stages["pool"], stages["flatten"]
    return stages | {"pool": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), "fc": classifier}


def _blocks(stage: nn.Module) -> list[nn.Module]:
    """The blocks of a stage. Those of a network that is cut by tracing are not known."""
    return [
        module for module in stage.modules() if isinstance(module, (ResidualBlock, DenseLayer, Inception))
    ]


def _layers(stage: nn.Module) -> str | None:
    """The convolutions of the last block's branch, or those of a stage without blocks."""
    return ", ".join(map(_text, _convs([stage, *_blocks(stage)][-1]))) or None


def _convs(block: nn.Module) -> list[nn.Conv2d]:
    return [layer for layer in getattr(block, "branch", block).children() if isinstance(layer, nn.Conv2d)]


def _text(conv: nn.Conv2d) -> str:
    """A convolution as "3x3 64", with its groups as "3x3 128 C=32"."""
    groups = f" C={conv.groups}" if conv.groups > 1 else ""
    return f"{'x'.join(map(str, conv.kernel_size))} {conv.out_channels}{groups}"


def count_layers(rows: list[StageRow]) -> str:
    """The layers with weights on the longest path, as the paper counts them: "1 + 3 x (3 + 4 + 23 + 3) + 1 = 101".

    Where the blocks differ in their layers, the terms are the stages' layers.
    """
    before = [0, *(row.depth for row in rows)]
    added = [row.depth - start for row, start in zip(rows, before, strict=False)]
    each = {layers / row.blocks for row, layers in zip(rows, added, strict=True) if row.blocks}
    terms = [str(layers) for layers in added if layers]
    if len(each) == 1:
        blocks = [str(row.blocks) for row in rows if row.blocks]
        first = next(i for i, row in enumerate(rows) if row.blocks)
        terms[first : first + len(blocks)] = [f"{each.pop():g} x ({' + '.join(blocks)})"]
    return f"{' + '.join(terms)} = {rows[-1].depth}"


def bottleneck_weights(network: nn.Module) -> tuple[int, int, int] | None:
    """Channels and weights of the first bottleneck that keeps its size, and the weights of two 3x3 layers so wide.

    None: the network has no such block.
    """
    for block in network.modules():
        convs = _convs(block) if isinstance(block, ResidualBlock) else []
        if len(convs) == 3 and convs[0].in_channels == (channels := convs[-1].out_channels):
            return channels, sum(conv.weight.numel() for conv in convs), 2 * 9 * channels**2
    return None


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("names", nargs="+", help="backbones, and cifar_resnet20 and so on")
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        metavar=("HEIGHT", "WIDTH"),
        help="image, in pixels (default: 224 224, and 32 32 for CIFAR networks)",
    )
    parser.add_argument("--json", action="store_true", help="exact numbers")
    return exit_status(show, parser.parse_args())


def show(args: argparse.Namespace) -> None:
    if args.size and min(args.size) < 32:
        raise ValueError(f"--size is {args.size[0]} {args.size[1]}; accepted: 32 pixels or more each")
    tables = {}
    for name in args.names:
        size = tuple(args.size or ((32, 32) if CIFAR.fullmatch(name) else (224, 224)))
        network = network_of(name)
        tables[name] = layer_table(network, size)
        if not args.json:
            print(f"{name}, image of {size[0]}x{size[1]} pixels", "", sep="\n")
            print_layers(tables[name], network)
    if args.json:
        print(json.dumps({name: list(map(asdict, rows)) for name, rows in tables.items()}, indent=2))


def network_of(name: str) -> nn.Module:
    """The network with this name, without numbers in its weights."""
    depth = CIFAR.fullmatch(name)
    with torch.device("meta"):
        return cifar_resnet(int(depth[1])) if depth else create_backbone(name)


def print_layers(rows: list[StageRow], network: nn.Module) -> None:
    cells = [stage_row(row) for row in rows]
    totals = f"{sum(row.parameters for row in rows):,}", f"{sum(row.macs for row in rows) / 1e6:,.1f}"
    cells.append(("total", None, None, None, *totals, None, None))
    print(format_table(cells, HEADER))
    print("", f"layers with weights: {count_layers(rows)}", sep="\n")
    if found := bottleneck_weights(network):
        channels, own, plain = found
        print(f"a bottleneck of {channels} channels: {own:,} weights; two 3x3 layers so wide: {plain:,}")
    print()


def stage_row(row: StageRow) -> tuple[object, ...]:
    size = "x".join(map(str, row.output))
    costs = f"{row.parameters:,}", f"{row.macs / 1e6:,.1f}"
    return row.stage, row.layers, row.blocks, size, *costs, row.receptive_field, row.stride


if __name__ == "__main__":
    sys.exit(main())
