"""Train a detector, from a recipe or straight from a folder of annotated pictures.

python tools/train.py my_folder --output runs/mine --minutes 30
python tools/train.py configs/shapes.yaml --output runs/shapes
python tools/train.py configs/voc_resnet101.yaml data.root=/data/VOCdevkit train.batch_size=4 --output runs/voc
python tools/train.py configs/shapes.yaml --output runs/shapes --resume
python tools/train.py configs/detectron2_resnet50_c4.yaml --start-from r50_c4.safetensors --output runs/tuned
torchrun --nproc-per-node 8 tools/train.py configs/coco_resnet50.yaml data.root=/data/coco --output runs/coco
"""

import argparse
import sys
from pathlib import Path

import torch

from detector import processes
from detector.choose.recipe import Choice, choose_recipe
from detector.command_line import DEVICE_HELP, exit_status, make_parser
from detector.config import load_config
from detector.data.find import FORMATS, is_recipe
from detector.inference import choose_device
from detector.run import Run
from detector.tables import format_cell
from detector.training_run import refuse_old_run


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument(
        "config",
        metavar="RECIPE_OR_DATA",
        help="a YAML recipe, see configs/; or a folder of annotated pictures or an annotation file, whose recipe is chosen",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.lr=0.01")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the run's files")
    parser.add_argument("--resume", action="store_true", help="continue the run in DIR where it stopped")
    parser.add_argument(
        "--start-from",
        metavar="FILE",
        help="a detector's checkpoint; weights that fit are kept, classes by their names",
    )
    parser.add_argument("--device", help=DEVICE_HELP)
    own = parser.add_argument_group("for a folder or an annotation file")
    own.add_argument("--minutes", type=float, help="the time that choosing, training and evaluating may take")
    own.add_argument(
        "--format", choices=tuple(FORMATS), help="where a folder has annotations of several formats"
    )
    own.add_argument("--offline", action="store_true", help="download no published weights")
    return exit_status(train, parser.parse_intermixed_args())


def train(args: argparse.Namespace) -> None:
    device = choose_device(args.device)
    datasets = None
    if is_recipe(args.config):
        config = load_config(args.config, args.overrides)
    elif args.resume:
        config = load_config(Path(args.output) / "config.yaml", args.overrides)
    else:
        config, _, datasets = choose(args, device)
    options = {"resume": args.resume, "start_from_path": args.start_from, "datasets": datasets}
    metrics = Run(config, args.output, device, **options).train()
    if metrics:
        name = config.train.best_metric
        print(
            f"best {name} {format_cell(metrics[name])} (AP50 {format_cell(metrics['AP50'])}) after epoch {metrics['epoch']}"
        )
    print(f"weights, curves and pictures are in {args.output}")


def choose(args: argparse.Namespace, device: torch.device) -> Choice:
    """Choose a recipe for the pictures that `args` names, and say why."""
    refuse_old_run(args.output)
    options = {name: getattr(args, name) for name in ("overrides", "format", "minutes", "offline")}
    options["num_processes"] = processes.world_size()
    choice = processes.from_main(lambda: choose_recipe(args.config, args.output, device, **options))
    print("chosen:", *(f"- {reason}" for reason in choice.reasons), sep="\n", flush=True)
    print(f"the whole recipe is in {Path(args.output) / 'config.yaml'}; key=value changes any part of it")
    return choice


if __name__ == "__main__":
    sys.exit(main())
