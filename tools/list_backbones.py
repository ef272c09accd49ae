"""List the backbones: channels of trunk and head, parameters, cost, weights, norms and preprocessing.

python tools/list_backbones.py
python tools/list_backbones.py "resnet*" "densenet*" --markdown
python tools/list_backbones.py resnet101 --size 600 1000 --json
python tools/list_backbones.py "timm/dla*"
python tools/list_backbones.py resnet101 cifar_resnet110 --layers
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import TypeVar

import torch

from backbones import IMAGENET, Preprocessing, cifar_resnet, create_backbone, list_backbones
from backbones.layer_table import StageRow, bottleneck_weights, count_layers, layer_table
from backbones.messages import nearest
from backbones.summary import Summary, summarize
from detector.command_line import exit_status, make_parser
from detector.tables import format_table

T = TypeVar("T")
HEADER = ("name", "C4", "C5", "parameters, M", "trunk, GMAC", "head, GMAC", "weights", "norm", "image")
CIFAR = re.compile(r"cifar_resnet(\d+)")
STAGE_HEADER = ("stage", "layers", "blocks", "output", "parameters", "MMAC", "receptive field", "stride")
NOTE = (
    "parameters: trunk and head, without a classifier. trunk: an image of {}x{} pixels. head: a region. "
    "image: the preprocessing for random weights; published weights bring their own."
)


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("patterns", nargs="*", default=["*"], help="names, with * and ? (default: all)")
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        metavar=("HEIGHT", "WIDTH"),
        help="image, in pixels (default: 800 1216; with --layers 224 224, and 32 32 for CIFAR networks)",
    )
    parser.add_argument(
        "--layers",
        action="store_true",
        help="the stages of each network, as the ResNet paper's Table 1; takes cifar_resnet20 and so on, too",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="a table for a README")
    form.add_argument("--json", action="store_true", help="exact numbers")
    return exit_status(show, parser.parse_args())


def show(args: argparse.Namespace) -> int:
    """Print the table. Returns the exit status: 1 if none of the networks can be cut."""
    if args.size and min(args.size) < 32:
        raise ValueError(f"--size is {args.size[0]} {args.size[1]}; accepted: 32 pixels or more each")
    if args.layers:
        return show_layers(args)
    size = tuple(args.size or (800, 1216))
    summaries = list(for_all(matching(args.patterns), lambda name: summarize(name, size)).values())
    if not summaries:
        return 1
    if args.json:
        print(json.dumps([asdict(summary) for summary in summaries], indent=2))
        return 0
    rows = [row(summary) for summary in summaries]
    print(markdown_table(rows, HEADER) if args.markdown else format_table(rows, HEADER))
    print("", NOTE.format(*size), sep="\n")
    return 0


def show_layers(args: argparse.Namespace) -> int:
    """Print the stages of each network. Returns the exit status, as `show` does."""
    names: list[str] = []
    for pattern in args.patterns:
        names += [pattern] if CIFAR.fullmatch(pattern) else matching([pattern])
    networks = for_all(dict.fromkeys(names), network_of)
    tables = {}
    for name, network in networks.items():
        size = tuple(args.size or ((32, 32) if CIFAR.fullmatch(name) else (224, 224)))
        tables[name] = layer_table(network, size)
        if not args.json:
            print(f"{name}, image of {size[0]}x{size[1]} pixels", "", sep="\n")
            print_layers(tables[name], network, args.markdown)
    if args.json:
        print(json.dumps({name: list(map(asdict, rows)) for name, rows in tables.items()}, indent=2))
    return 0 if tables else 1


def network_of(name: str) -> torch.nn.Module:
    """The network with this name, without numbers in its weights."""
    depth = CIFAR.fullmatch(name)
    with torch.device("meta"):
        return cifar_resnet(int(depth[1])) if depth else create_backbone(name)


def print_layers(rows: list[StageRow], network: torch.nn.Module, markdown: bool) -> None:
    cells = [stage_row(row) for row in rows]
    totals = f"{sum(row.parameters for row in rows):,}", f"{sum(row.macs for row in rows) / 1e6:,.1f}"
    cells.append(("total", None, None, None, *totals, None, None))
    print(markdown_table(cells, STAGE_HEADER) if markdown else format_table(cells, STAGE_HEADER))
    print("", f"layers with weights: {count_layers(rows)}", sep="\n")
    if found := bottleneck_weights(network):
        channels, own, plain = found
        print(f"a bottleneck of {channels} channels: {own:,} weights; two 3x3 layers so wide: {plain:,}")
    print()


def stage_row(row: StageRow) -> tuple[object, ...]:
    size = "x".join(map(str, row.output))
    costs = f"{row.parameters:,}", f"{row.macs / 1e6:,.1f}"
    return row.stage, row.layers, row.blocks, size, *costs, row.receptive_field, row.stride


def matching(patterns: list[str]) -> list[str]:
    """Names that match any pattern; "timm/dla*" and "torchvision/*" are networks that are cut by tracing.

    ValueError: nothing matches a pattern.
    """
    names: list[str] = []
    for pattern in patterns:
        found = list_backbones(pattern)
        if not found:
            raise ValueError(f"no backbone is named {pattern!r}; {nearest(pattern, list_backbones())}")
        names += [name for name in found if name not in names]
    return names


def for_all(names: Iterable[str], make: Callable[[str], T]) -> dict[str, T]:
    """make(name) for all networks that can be built. For each other one, a line on standard error says why."""
    made = {}
    for name in names:
        try:
            made[name] = make(name)
        except ValueError as error:
            print(f"{name}: {error}", file=sys.stderr)
    return made


def row(summary: Summary) -> tuple[object, ...]:
    return (
        summary.name,
        summary.c4,
        summary.c5,
        f"{summary.parameters / 1e6:.2f}",
        f"{summary.trunk_macs / 1e9:.2f}",
        f"{summary.head_macs / 1e9:.3f}",
        ", ".join(summary.weights) or None,
        ", ".join(summary.norms) or None,
        describe(summary.preprocessing),
    )


def describe(preprocessing: Preprocessing) -> str:
    """Preprocessing as short text."""
    if preprocessing == IMAGENET:
        return "ImageNet"
    mean, std = (" ".join(f"{v:g}" for v in values) for values in (preprocessing.mean, preprocessing.std))
    return f"({preprocessing.channel_order} * {preprocessing.scale:g} - ({mean})) / ({std})"


def markdown_table(rows: list[tuple[object, ...]], header: Sequence[str]) -> str:
    """Rows as a table of a README. The columns of numbers are to the right."""
    texts = ("name", "weights", "norm", "image", "stage", "layers", "output")
    lines = [header, ["---" if name in texts else "---:" for name in header], *rows]
    return "\n".join("| " + " | ".join("-" if c is None else str(c) for c in line) + " |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
