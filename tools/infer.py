"""Detect objects in pictures: draws them and writes one JSON.

python tools/infer.py --weights runs/shapes/best.safetensors datasets/shapes/val --output runs/shapes/drawings
python tools/infer.py --weights best.safetensors street.jpg "holiday/*.png" --score-thresh 0.3 --output found
python tools/infer.py --weights best.safetensors street.jpg model.box_nms_thresh=0.4 --output found
"""

import argparse
import sys
from pathlib import Path

from PIL import Image

from detector import Detector
from detector.checkpoint import load_checkpoint
from detector.command_line import DEVICE_HELP, PATHS_HELP, exit_status, make_parser, report_skipped
from detector.config import split_overrides
from detector.data.images import list_images, load_image
from detector.files import write_atomically, write_json
from detector.inference import choose_device
from detector.names import drawing_paths
from detector.progress import Progress
from detector.visualize import draw_boxes


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("paths", nargs="+", metavar="PATH", help=PATHS_HELP)
    parser.add_argument("--weights", required=True, help="a checkpoint of tools/train.py")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder for the drawings and detections.json"
    )
    parser.add_argument("--score-thresh", type=float, default=0.5, help="the lowest score kept (default 0.5)")
    parser.add_argument("--device", help=DEVICE_HELP)
    return exit_status(infer, parser.parse_intermixed_args())


def infer(args: argparse.Namespace) -> int:
    """Every readable picture is done; unreadable ones are named at the end, with exit status 1."""
    overrides, pictures = split_overrides(args.paths)
    paths = list_images(pictures)
    checkpoint = load_checkpoint(args.weights).with_overrides(overrides)
    detector = Detector.load(checkpoint, choose_device(args.device))
    drawings = drawing_paths(paths, Path(args.output))
    found, unreadable = [], []
    with Progress(len(paths), "infer") as progress:
        for path in paths:
            progress.update(1)
            try:
                image = load_image(path)
            except ValueError as error:
                unreadable.append(str(error))
                continue
            detections = detector(image, score_thresh=args.score_thresh)
            drawing = draw_boxes(
                image, detections.boxes, detections.labels, detector.class_names, detections.scores
            )
            write_atomically(
                drawings[path], lambda temporary, d=drawing: Image.fromarray(d).save(temporary, quality=92)
            )
            found.append(
                {
                    "path": str(path),
                    "drawing": str(drawings[path]),
                    "height": image.shape[0],
                    "width": image.shape[1],
                    "detections": detections.to_dicts(),
                }
            )
    write_json(
        Path(args.output) / "detections.json",
        {"weights": args.weights, "class_names": detector.class_names, "images": found},
        indent=1,
    )
    count = sum(len(entry["detections"]) for entry in found)
    print(
        f"{count} objects in {len(found)} of {len(paths)} pictures; drawings and detections.json are in {args.output}"
    )
    return report_skipped(unreadable)


if __name__ == "__main__":
    sys.exit(main())
