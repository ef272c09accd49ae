"""Train a detector.

python tools/train.py configs/shapes.yaml --output runs/shapes
python tools/train.py configs/voc_resnet101.yaml data.root=/data/VOCdevkit train.batch_size=4 --output runs/voc
python tools/train.py configs/shapes.yaml --output runs/shapes --resume
python tools/train.py configs/detectron2_resnet50_c4.yaml --start-from r50_c4.safetensors --output runs/tuned
"""

import argparse
import sys

from detector.config import load_config
from detector.engine import NonFiniteLossError
from detector.inference import choose_device
from detector.run import Interrupted, train


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="a YAML recipe, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.lr=0.01")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the run's files")
    parser.add_argument("--resume", action="store_true", help="continue the run in DIR where it stopped")
    parser.add_argument(
        "--start-from",
        metavar="FILE",
        help="a detector's checkpoint; what fits is kept, classes by their names",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: the GPU where there is one)")
    args = parser.parse_intermixed_args()
    try:
        config = load_config(args.config, args.overrides)
        device = choose_device(args.device)
        metrics = train(config, args.output, device, resume=args.resume, start_from_path=args.start_from)
    except Interrupted as stop:
        print(stop)
        return 130
    except (ValueError, OSError, TypeError, NonFiniteLossError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if metrics:
        name = config.train.best_metric
        print(f"best {name} {metrics[name]:.3f} (AP50 {metrics['AP50']:.3f}) after epoch {metrics['epoch']}")
    print(f"weights, curves and pictures are in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
