"""Check pictures and annotations before a training.

python tools/check_data.py configs/bccd_resnet18.yaml data.root=datasets/bccd
python tools/check_data.py my_folder --output found
python tools/check_data.py my_recipe.yaml --fix clean

Exit status: 0, nothing worse than notes; 1, warnings; 2, errors, or the data cannot be read.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from detector.command_line import DEVICE_HELP, exit_status, make_parser
from detector.config import Config, load_config, parse_config
from detector.data.find import FORMATS, find_data, is_recipe
from detector.doctor.anchors import describe_objects
from detector.doctor.check import examine
from detector.doctor.cost import describe_cost, time_step
from detector.doctor.findings import exit_status_of, format_findings
from detector.doctor.fix import write_clean
from detector.doctor.sheet import save_sheet
from detector.files import mark_output, write_json
from detector.inference import choose_device


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument(
        "data", metavar="RECIPE_OR_DATA", help="a YAML recipe, a folder of pictures, or an annotation file"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example data.root=/data/voc")
    parser.add_argument(
        "--format", choices=tuple(FORMATS), help="where a folder has annotations of several formats"
    )
    parser.add_argument("--output", metavar="DIR", help="folder for findings.json and worst.jpg")
    parser.add_argument("--fix", metavar="DIR", help="folder for clean annotations; pictures are not changed")
    parser.add_argument("--time", action="store_true", help="try a training step, for its time and memory")
    parser.add_argument("--device", help=DEVICE_HELP)
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument(
        "--headers-only", action="store_true", help="read the pictures' sizes, not their pixels"
    )
    depth.add_argument("--no-pictures", action="store_true", help="check the annotations alone")
    return exit_status(check, parser.parse_intermixed_args(), failed=2)


def check(args: argparse.Namespace) -> int:
    if args.fix and args.no_pictures:
        raise ValueError("--fix reads the pictures, so it takes no --no-pictures")
    config = _config(args.data, args.overrides, args.format)
    pictures = "none" if args.no_pictures else "headers" if args.headers_only else "decode"
    found = examine(config, pictures=pictures)
    print(format_findings(found.findings))
    if found.anchors is not None:
        print("", describe_objects(found.anchors), describe_cost(found.parts, config), sep="\n")
        if args.time:
            print(time_step(found.parts, config, choose_device(args.device)))
    if args.output:
        folder = Path(args.output)
        mark_output(folder)
        write_json(folder / "findings.json", [asdict(finding) for finding in found.findings], indent=1)
        drawn = save_sheet(folder / "worst.jpg", found.findings, found.parts, found.opened)
        print(f"\n{'findings.json and worst.jpg are' if drawn else 'findings.json is'} in {folder}")
    if args.fix:
        told = write_clean(Path(args.fix), config.data.root, found.parts, found.opened)
        print("", *told, f"clean annotations are in {args.fix}; use its data.yaml in a recipe", sep="\n")
    return exit_status_of(found.findings)


def _config(path: str, overrides: list[str], format: str | None) -> Config:
    """The recipe, or one made of a folder, with the default model."""
    if is_recipe(path):
        return load_config(path, overrides)
    found = find_data(path, format)
    print(*found.remarks, sep="\n")
    data = {"root": str(found.root), **found.splits}
    return parse_config({"model": {"backbone": "resnet50"}, "data": data}, overrides, source=path)


if __name__ == "__main__":
    sys.exit(main())
