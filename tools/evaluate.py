"""Evaluate a detector, or stored detections, on a data set.

python tools/evaluate.py --weights runs/shapes/best.safetensors --output runs/shapes/eval
python tools/evaluate.py --weights best.safetensors --config configs/voc_resnet101.yaml data.root=/data --output eval
torchrun --nproc-per-node 8 tools/evaluate.py --weights best.safetensors --output eval
python tools/evaluate.py --detections detections.json --config configs/bccd_resnet18.yaml --output eval
"""

import argparse
import sys
from pathlib import Path

from detector import processes
from detector.checkpoint import load_checkpoint
from detector.command_line import DEVICE_HELP, exit_status, make_parser
from detector.config import load_config
from detector.data.sources import build_dataset
from detector.describe import problem_lines
from detector.evaluate import Evaluation, score
from detector.evaluation.coco import format_coco, load_results
from detector.evaluation.voc import format_voc
from detector.files import write_json
from detector.inference import choose_device
from detector.model.speed import apply_speed


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example data.root=/data/voc")
    parser.add_argument("--weights", help="a checkpoint of train.py or convert_weights.py")
    parser.add_argument(
        "--detections", metavar="FILE", help="score this file (COCO's results format), without a model"
    )
    parser.add_argument("--config", help="a recipe whose data to use (default: the checkpoint's)")
    parser.add_argument("--split", choices=("train", "val", "test"), default="val")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder for metrics.json and detections.json"
    )
    parser.add_argument("--device", help=DEVICE_HELP)
    return exit_status(evaluate, parser.parse_intermixed_args())


def evaluate(args: argparse.Namespace) -> None:
    if (args.weights is None) == (args.detections is None):
        raise ValueError("give either --weights or --detections")
    if args.detections is not None and args.config is None:
        raise ValueError("--detections needs --config, which says what data to score against")
    checkpoint = None if args.weights is None else load_checkpoint(args.weights)
    # The model is the checkpoint's, and so are the overrides of model.*, such as model.box_score_thresh.
    overrides = args.overrides
    if args.config is None:
        checkpoint = checkpoint.with_overrides(overrides)
        config = checkpoint.config
    else:
        of_model = [o for o in overrides if checkpoint is not None and o.startswith(("model.", "model="))]
        checkpoint = checkpoint.with_overrides(of_model) if of_model else checkpoint
        config = load_config(args.config, [o for o in overrides if o not in of_model])
    names = None if checkpoint is None else checkpoint.class_names
    dataset = build_dataset(config.data, args.split, names, check_pictures=checkpoint is not None)
    print(f"{args.split}: {len(dataset)} images, {sum(dataset.box_counts().values())} boxes")
    for line in problem_lines(dataset):
        print(line)
    losses, output = {}, Path(args.output)
    if checkpoint is None:
        results = load_results(args.detections, dataset.to_coco())
    else:
        device = choose_device(args.device)
        config = config.model_copy(update={"model": checkpoint.config.model})
        model = apply_speed(checkpoint.build(), config.speed).to(device)
        evaluation = Evaluation(dataset, config, device)
        results, losses = evaluation.run(model)
        dataset = evaluation.readable
    if not processes.is_main():
        return
    if checkpoint is not None:
        # With annotations, a folder's data set would be found in it.
        named = {section: v for section, v in dataset.to_coco().items() if section != "annotations"}
        write_json(output / "images.json", named, indent=1)
        write_json(output / "detections.json", results)
    metrics = score(dataset, results, config.model.box_detections_per_img)
    left_out = {"left_out": dataset.left_out} if dataset.left_out else {}
    write_json(output / "metrics.json", {**metrics, "losses": losses, **left_out}, indent=2)
    print(format_coco(metrics), format_voc(metrics["voc"]), sep="\n\n")
    if left_out:
        count, total = len(dataset.left_out), len(dataset) + len(dataset.left_out)
        print(f"\n{count} of {total} pictures could not be used and are left out of these numbers")
    print(f"\nmetrics and detections are in {output}")


if __name__ == "__main__":
    sys.exit(main())
