"""Train a backbone, or a CIFAR ResNet, as a classifier. A backbone's weights go into `weights:` of a detector's recipe.

python tools/train_classifier.py configs/classify/shapes.yaml --output runs/classifier
python tools/train_classifier.py configs/classify/cifar10.yaml data.root=datasets/cifar-10-batches-bin --output runs/cifar10
python tools/train_classifier.py configs/classify/shapes.yaml --output runs/classifier --resume
python tools/train.py configs/bccd_resnet18.yaml model.backbone.weights=runs/objects/best.safetensors --output runs/bccd
"""

import sys

from detector.classify.config import ClassifierConfig
from detector.classify.measures import format_measures
from detector.classify.run import ClassifierRun
from detector.command_line import DEVICE_HELP, exit_status, make_parser
from detector.config import load_config
from detector.inference import choose_device


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("config", metavar="RECIPE", help="a YAML recipe, see configs/classify/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.lr=0.01")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the run's files")
    parser.add_argument("--resume", action="store_true", help="continue the run in DIR where it stopped")
    parser.add_argument("--device", help=DEVICE_HELP)
    return exit_status(train, parser.parse_intermixed_args())


def train(args) -> None:
    config = load_config(args.config, args.overrides, kind=ClassifierConfig)
    run = ClassifierRun(config, args.output, choose_device(args.device), resume=args.resume)
    if metrics := run.train():
        print(format_measures(metrics), f"of the weights after epoch {metrics['epoch']}", sep="\n")
    print(f"weights, curves and pictures are in {args.output}")


if __name__ == "__main__":
    sys.exit(main())
