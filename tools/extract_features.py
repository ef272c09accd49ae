"""Vectors of the regions of pictures (2048-d of a ResNet-50), with boxes, scores and class posteriors.

python tools/extract_features.py --weights r50_c4.safetensors photos --output features
python tools/extract_features.py --weights best.safetensors photos --boxes boxes.json --output features
python tools/extract_features.py --weights best.safetensors photos --regions proposals --output features.tsv
python tools/extract_features.py --weights best.safetensors photos model.box_score_thresh=0 \\
    model.box_detections_per_img=36 model.class_agnostic_nms=true --output features_36.tsv
torchrun --nproc-per-node 8 tools/extract_features.py --weights best.safetensors photos --output features

npz: a folder with an .npz a picture: boxes (M, 4) xyxy, features (M, C5), scores, labels, class_scores (M, K),
image_size (height, width), path; extraction.json beside them names the labels.
tsv: bottom-up attention's file for captioning and question answering, which such programs read: image_id, image_w,
image_h, num_boxes, boxes, features, the last two base64 of float32, without a header. It has no scores.

A stopped run continues where it was. Under torchrun each process takes its share of the pictures; in the TSV format
each writes a file of its own, FILE.0of8.tsv, to be joined with cat.
"""

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detector import Detector
from detector.checkpoint import Checkpoint, load_checkpoint
from detector.config import split_overrides
from detector.data import list_images, load_image
from detector.feature_files import NpzFolder, TsvFile
from detector.features import REGIONS, extract_regions, read_boxes
from detector.files import write_json
from detector.inference import choose_device, to_tensor
from detector.progress import Progress

FORMATS = ("npz", "tsv")


def main() -> int:
    args = parse_arguments()
    try:
        return extract(args)
    except (ValueError, OSError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="pictures, folders, or patterns such as 'a/*.jpg'; also key=value, a setting of the recipe",
    )
    parser.add_argument("--weights", required=True, help="a checkpoint of train.py or convert_weights.py")
    parser.add_argument("--output", required=True, metavar="DIR_OR_FILE", help="a folder, or FILE.tsv")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--regions", choices=REGIONS, default="detections", help="the detector's own (default)"
    )
    which.add_argument("--boxes", metavar="FILE.json", help='{"a.jpg": [[x1, y1, x2, y2], ...], ...}, pixels')
    parser.add_argument("--format", choices=FORMATS, help="default: tsv where the output ends so, else npz")
    parser.add_argument(
        "--batch", type=int, default=1, help="pictures at once; padding moves the last digits (default 1)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: the GPU where there is one)")
    return parser.parse_intermixed_args()


def extract(args: argparse.Namespace) -> int:
    """Every readable picture is done; unreadable ones are named at the end, with exit status 1."""
    if args.batch < 1:
        raise ValueError(f"--batch is {args.batch}; accepted: 1 or more")
    overrides, pictures = split_overrides(args.paths)
    images = list_images(pictures)
    checkpoint = load_checkpoint(args.weights).with_overrides(overrides)
    boxes = None if args.boxes is None else read_boxes(args.boxes, images)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(args.device or local_device())
    check_settings(args, settings_of(args, checkpoint))
    files = open_files(args, images, rank, world_size)
    mine = images[rank::world_size]
    todo = [image for image in mine if not files.is_done(image)]
    if rank == 0 and len(todo) < len(mine):
        print(f"{len(mine) - len(todo)} of {len(mine)} pictures are done already", flush=True)
    detector = Detector.from_checkpoint(checkpoint, device)
    unreadable: list[str] = []
    with Progress(len(todo), "extract", enabled=rank == 0) as progress:
        for start in range(0, len(todo), args.batch):
            chunk = todo[start : start + args.batch]
            extract_batch(detector, chunk, args.regions, boxes, files, unreadable)
            progress.update(len(chunk))
    print(f"{len(todo) - len(unreadable)} pictures' features are in {args.output}", flush=True)
    for message in unreadable:
        print(f"skipped: {message}", file=sys.stderr)
    return 1 if unreadable else 0


def extract_batch(
    detector: Detector,
    images: list[Path],
    regions: str,
    boxes: dict[Path, Tensor] | None,
    files: NpzFolder | TsvFile,
    unreadable: list[str],
) -> None:
    tensors: dict[Path, Tensor] = {}
    for image in images:
        try:
            tensors[image] = to_tensor(load_image(image)).to(detector.device)
        except ValueError as error:
            unreadable.append(str(error))
    if not tensors:
        return
    given = None if boxes is None else [boxes[image].to(detector.device) for image in tensors]
    found = extract_regions(detector.model, list(tensors.values()), regions, given)
    for image, of_image in zip(tensors, found, strict=True):
        files.write(image, of_image)


def open_files(
    args: argparse.Namespace, images: list[Path], rank: int, world_size: int
) -> NpzFolder | TsvFile:
    """Where this process writes. Names are of all pictures, so that they are the same in every process."""
    if format_of(args) == "npz":
        return NpzFolder(args.output, images)
    path = Path(args.output)
    return TsvFile(path if world_size == 1 else path.with_suffix(f".{rank}of{world_size}.tsv"), images)


def format_of(args: argparse.Namespace) -> str:
    return args.format or ("tsv" if Path(args.output).suffix == ".tsv" else "npz")


def settings_of(args: argparse.Namespace, checkpoint: Checkpoint) -> dict[str, Any]:
    """What the vectors depend on, and the names of their labels."""
    digest = hashlib.sha256(Path(args.weights).read_bytes()).hexdigest()
    boxes = None if args.boxes is None else hashlib.sha256(Path(args.boxes).read_bytes()).hexdigest()
    return {
        "weights_sha256": digest,
        "model": checkpoint.config.model.model_dump(mode="json"),
        "regions": args.regions if args.boxes is None else "boxes",
        "boxes_sha256": boxes,
        "class_names": ["background", *checkpoint.class_names],
    }


def check_settings(args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Write the settings beside the features; refuse to mix features of different ones."""
    is_npz, output = format_of(args) == "npz", Path(args.output)
    if output.exists() and output.is_dir() != is_npz:
        raise ValueError(f"--output {output}: {'a folder' if is_npz else 'a file'} is needed")
    path = output / "extraction.json" if is_npz else output.with_suffix(".json")
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        other = [name for name, value in settings.items() if before.get(name) != value]
        if other:
            raise ValueError(
                f"{path} is of an extraction with other settings ({', '.join(other)}): give another --output"
            )
    else:
        write_json(path, settings, indent=1)


def local_device() -> str | None:
    """Of torchrun's processes on one machine, each its own GPU."""
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if rank is not None and torch.cuda.is_available() else None


if __name__ == "__main__":
    sys.exit(main())
