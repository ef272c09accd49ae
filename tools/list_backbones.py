"""List the backbones: channels of trunk and head, parameters, cost, weights, norms and preprocessing.

python tools/list_backbones.py
python tools/list_backbones.py "resnet*" "densenet*" --markdown
python tools/list_backbones.py resnet101 --size 600 1000 --json
python tools/list_backbones.py "timm/dla*"
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from backbones import IMAGENET, Preprocessing, list_backbones
from backbones.messages import nearest
from backbones.summary import Summary, summarize
from detector.command_line import exit_status, make_parser
from detector.tables import format_table

HEADER = ("name", "C4", "C5", "parameters, M", "trunk, GMAC", "head, GMAC", "weights", "norm", "image")
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
        default=(800, 1216),
        help="image, in pixels (default: 800 1216)",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="a table for a README")
    form.add_argument("--json", action="store_true", help="exact numbers")
    return exit_status(show, parser.parse_args())


def show(args: argparse.Namespace) -> int:
    """Print the table, and on standard error why a network cannot be cut. Returns the exit status: 1 if none can."""
    if min(args.size) < 32:
        raise ValueError(f"--size is {args.size[0]} {args.size[1]}; accepted: 32 pixels or more each")
    size, summaries = tuple(args.size), []
    for name in matching(args.patterns):
        try:
            summaries.append(summarize(name, size))
        except ValueError as error:
            print(f"{name}: {error}", file=sys.stderr)
    if not summaries:
        return 1
    if args.json:
        print(json.dumps([asdict(summary) for summary in summaries], indent=2))
        return 0
    rows = [row(summary) for summary in summaries]
    print(markdown_table(rows, HEADER) if args.markdown else format_table(rows, HEADER))
    print("", NOTE.format(*size), sep="\n")
    return 0


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
    texts = ("name", "weights", "norm", "image")
    lines = [header, ["---" if name in texts else "---:" for name in header], *rows]
    return "\n".join("| " + " | ".join("-" if c is None else str(c) for c in line) + " |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
