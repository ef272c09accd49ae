"""Detect objects in pictures, draw them, and write them as JSON: detections.json in COCO's results format, and images.json.

python tools/infer.py --weights runs/shapes/best.safetensors datasets/shapes/val --output runs/shapes/drawings
python tools/infer.py --weights best.safetensors street.jpg "holiday/*.png" --score-thresh 0.3 --output found
python tools/infer.py --weights best.safetensors street.jpg model.box_nms_thresh=0.4 --output found
torchrun --nproc-per-node 8 tools/infer.py --weights best.safetensors photos --output found
"""

import argparse
import sys
from collections import Counter, deque
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from detector import Detections, Detector, processes
from detector.ahead import ahead
from detector.checkpoint import load_checkpoint
from detector.command_line import DEVICE_HELP, PATHS_HELP, exit_status, make_parser, report_skipped
from detector.config import split_overrides
from detector.data.images import list_images, load_or_reason
from detector.engine import coco_results
from detector.files import mark_output, write_atomically, write_json
from detector.inference import DTYPES, choose_device
from detector.names import drawing_paths
from detector.progress import Progress
from detector.stop import StopSignal
from detector.visualize import draw_image, load_font

_GPU_BATCH = 8
# Threads that decode, and as many that draw. A GPU waits for two of them.
_CPU_THREADS, _GPU_THREADS = 2, 8


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("paths", nargs="+", metavar="PATH", help=PATHS_HELP)
    parser.add_argument("--weights", required=True, help="a checkpoint of train.py or convert_weights.py")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder for the drawings and detections.json"
    )
    parser.add_argument("--score-thresh", type=float, default=0.5, help="keep higher scores (default 0.5)")
    parser.add_argument("--font", metavar="FILE", help="of class names (default: one that has their letters)")
    parser.add_argument(
        "--batch-size", type=int, help=f"pictures at once (default {_GPU_BATCH} on a GPU, else 1)"
    )
    parser.add_argument("--device", help=DEVICE_HELP)
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of trunk and RoI head; bf16 is faster on a GPU"
    )
    return exit_status(infer, parser.parse_intermixed_args())


def infer(args: argparse.Namespace) -> int:
    """Process every readable picture. Unreadable ones are named at the end, with exit status 1.

    detections.json and images.json are written in any case, with the pictures that are done.
    """
    overrides, pictures = split_overrides(args.paths)
    unlisted: list[str] = []
    unreadable: list[str] = []
    passed_over: Counter[str] = Counter()
    paths = list_images(pictures, unlisted, passed_over)
    if passed_over and processes.is_main():
        listed = ", ".join(f"{count} {kind}" for kind, count in passed_over.most_common())
        print(f"passed over: {listed}")
    checkpoint = load_checkpoint(args.weights).with_overrides(overrides)
    load_font("".join(checkpoint.class_names), 10, args.font)
    detector = Detector.load(checkpoint, choose_device(args.device), dtype=args.dtype)
    on_gpu = detector.device.type == "cuda"
    batch_size = args.batch_size or (_GPU_BATCH if on_gpu else 1)
    num_threads = _GPU_THREADS if on_gpu else _CPU_THREADS
    drawings = drawing_paths(paths, Path(args.output))
    mark_output(args.output)
    ids = {path: number for number, path in enumerate(paths, start=1)}
    mine = processes.share(paths)
    found: list[dict[str, Any]] = []
    with Progress(len(mine), "infer", enabled=processes.is_main()) as progress, StopSignal() as stop:
        try:
            # Decoding, network and drawing run side by side.
            read = takewhile(
                lambda _: not stop.asked, zip(mine, ahead(load_or_reason, mine, num_threads), strict=True)
            )
            waiting: deque[tuple[int, Path, Path, np.ndarray]] = deque()

            def readable() -> Iterator[np.ndarray]:
                for path, image in read:
                    if isinstance(image, str):
                        unreadable.append(image)
                        progress.update(1)
                    else:
                        waiting.append((ids[path], drawings[path], path, image))
                        yield image

            options = {"batch_size": batch_size, "num_threads": num_threads}
            stream = detector.stream(readable(), score_thresh=args.score_thresh, **options)
            done = ((*waiting.popleft(), detections, args.font) for detections in stream)
            for entry in ahead(lambda each: draw(*each), done, num_threads):
                found.append(entry)
                progress.update(1)
        except KeyboardInterrupt:
            print("stopped at once")
        finally:
            # The others never come to a process that failed.
            if sys.exc_info()[0] is None:
                found, unreadable = (sum(processes.gather(each), []) for each in (found, unreadable))
            found.sort(key=lambda entry: entry["id"])
            results = [result for entry in found for result in entry.pop("results")]
            if processes.is_main():
                classes = [{"id": label, "name": name} for label, name in enumerate(detector.class_names, 1)]
                content = {"weights": args.weights, "images": found, "categories": classes}
                write_json(Path(args.output) / "images.json", content, indent=1)
                write_json(Path(args.output) / "detections.json", results)
    unreadable = unlisted + unreadable
    skipped = f", {len(unreadable)} skipped" if unreadable else ""
    print(
        f"{len(results)} objects in {len(found)} of {len(paths)} pictures{skipped}; "
        f"drawings and detections.json are in {args.output}"
    )
    status = report_skipped(unreadable if processes.is_main() else [])
    return 130 if stop.asked else status


def draw(
    number: int, drawing: Path, path: Path, image: np.ndarray, found: Detections, font: str | None
) -> dict[str, Any]:
    """Write the (H, W, 3) picture with its detections. Returns its entry in images.json, with its `results`."""
    save_drawing(image, found, drawing, font)
    return {
        "id": number,
        "file_name": str(path),
        "height": image.shape[0],
        "width": image.shape[1],
        "drawing": str(drawing),
        "results": coco_results(vars(found), number, list(range(1, len(found.class_names) + 1))),
    }


def save_drawing(image: np.ndarray, found: Detections, path: Path, font_path: str | None = None) -> None:
    """Write the (H, W, 3) picture with its detections as a JPEG."""
    drawn = draw_image(image, found.boxes, found.labels, found.class_names, found.scores, font_path)
    write_atomically(path, lambda temporary: drawn.save(temporary, quality=92))


if __name__ == "__main__":
    sys.exit(main())
