"""Train a detector.

python tools/train.py configs/shapes.yaml --output runs/shapes
python tools/train.py configs/voc_resnet101.yaml data.root=/data/VOCdevkit train.batch_size=4 --output runs/voc
python tools/train.py configs/shapes.yaml --output runs/shapes --resume
python tools/train.py configs/detectron2_resnet50_c4.yaml --start-from r50_c4.safetensors --output runs/tuned
"""

import argparse
import sys

from detector.command_line import DEVICE_HELP, exit_status, make_parser
from detector.config import load_config
from detector.inference import choose_device
from detector.run import Run
from detector.stop import Interrupted
from detector.tables import format_cell


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("config", help="a YAML recipe, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.lr=0.01")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the run's files")
    parser.add_argument("--resume", action="store_true", help="continue the run in DIR where it stopped")
    parser.add_argument(
        "--start-from",
        metavar="FILE",
        help="a detector's checkpoint; weights that fit are kept, classes by their names",
    )
    parser.add_argument("--device", help=DEVICE_HELP)
    return exit_status(train, parser.parse_intermixed_args())


def train(args: argparse.Namespace) -> int:
    config, device = load_config(args.config, args.overrides), choose_device(args.device)
    run = Run(config, args.output, device, resume=args.resume, start_from_path=args.start_from)
    try:
        metrics = run.train()
    except Interrupted as stop:
        print(stop)
        return 130
    except KeyboardInterrupt:
        print("stopped at once; continue with --resume")
        return 130
    if metrics:
        name = config.train.best_metric
        print(
            f"best {name} {format_cell(metrics[name])} (AP50 {format_cell(metrics['AP50'])}) after epoch {metrics['epoch']}"
        )
    print(f"weights, curves and pictures are in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
