"""Detect objects in pictures, draw them, and write one JSON file.

python tools/infer.py --weights runs/shapes/best.safetensors datasets/shapes/val --output runs/shapes/drawings
python tools/infer.py --weights best.safetensors street.jpg "holiday/*.png" --score-thresh 0.3 --output found
python tools/infer.py --weights best.safetensors street.jpg model.box_nms_thresh=0.4 --output found
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from detector import Detections, Detector
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
    parser.add_argument("--weights", required=True, help="a checkpoint of train.py or convert_weights.py")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder for the drawings and detections.json"
    )
    parser.add_argument("--score-thresh", type=float, default=0.5, help="the lowest score kept (default 0.5)")
    parser.add_argument("--device", help=DEVICE_HELP)
    return exit_status(infer, parser.parse_intermixed_args())


def infer(args: argparse.Namespace) -> int:
    """Process every readable picture. Unreadable ones are named at the end, with exit status 1."""
    overrides, pictures = split_overrides(args.paths)
    paths = list_images(pictures)
    checkpoint = load_checkpoint(args.weights).with_overrides(overrides)
    detector = Detector.load(checkpoint, choose_device(args.device))
    drawings = drawing_paths(paths, Path(args.output))
    found, unreadable = [], []
    with Progress(len(paths), "infer") as progress:
        for path in paths:
            try:
                image = load_image(path)
            except ValueError as error:
                unreadable.append(str(error))
            else:
                detections = detector(image, score_thresh=args.score_thresh)
                save_drawing(image, detections, drawings[path])
                found.append(
                    {
                        "path": str(path),
                        "drawing": str(drawings[path]),
                        "height": image.shape[0],
                        "width": image.shape[1],
                        "detections": detections.to_dicts(),
                    }
                )
            progress.update(1)
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


def save_drawing(image: np.ndarray, found: Detections, path: Path) -> None:
    """Write the (H, W, 3) picture with its detections as a JPEG."""
    drawing = Image.fromarray(draw_boxes(image, found.boxes, found.labels, found.class_names, found.scores))
    write_atomically(path, lambda temporary: drawing.save(temporary, quality=92))


if __name__ == "__main__":
    sys.exit(main())
