"""Write the region features of many pictures to files.

A stopped extraction continues where it was. Under torchrun, the processes share the pictures.
"""

import hashlib
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from . import processes
from .ahead import ahead
from .checkpoint import Checkpoint, load_checkpoint
from .data.images import load_or_reason
from .feature_files import NpzFolder, TsvFile
from .features import extract_regions, read_boxes
from .files import read_json, write_json
from .inference import Detector, choose_device, to_tensor
from .progress import Progress

FORMATS = ("npz", "tsv")


def extract_features(
    weights_path: str,
    images: Sequence[Path],
    output: str,
    *,
    overrides: Sequence[str] = (),
    regions: str = "detections",
    boxes_path: str | None = None,
    format: str | None = None,
    batch_size: int = 1,
    device: str | None = None,
) -> list[str]:
    """Write the vectors of each picture's regions. Returns a sentence for each picture that cannot be read.

    regions, boxes_path: as in `extract_regions` and `read_boxes`. overrides: key=value settings of the recipe.
    format: "npz" or "tsv"; None chooses "tsv" if `output` ends in .tsv, else "npz". batch_size: pictures at once.
    ValueError: `output` holds features of other settings, or is a file where a folder is needed, or the reverse.
    """
    is_npz = (format or ("tsv" if Path(output).suffix == ".tsv" else "npz")) == "npz"
    checkpoint = load_checkpoint(weights_path).with_overrides(overrides)
    boxes = None if boxes_path is None else read_boxes(boxes_path, images)
    chosen_device = choose_device(device)
    _check_settings(Path(output), is_npz, _settings(checkpoint, weights_path, regions, boxes_path))
    files = _open_files(Path(output), is_npz, images)
    mine = processes.share(images)
    todo = [image for image in mine if not files.is_done(image)]
    if len(todo) < len(mine):
        print(f"{len(mine) - len(todo)} of {len(mine)} pictures are done already", flush=True)
    detector = Detector.load(checkpoint, chosen_device)
    unreadable: list[str] = []
    with Progress(len(todo), "extract", enabled=processes.is_main()) as progress:
        # Threads decode the next pictures while the network runs.
        loaded = zip(todo, ahead(load_or_reason, todo), strict=True)
        while chunk := list(islice(loaded, batch_size)):
            unreadable += [reason for _, reason in chunk if isinstance(reason, str)]
            read = {image: pixels for image, pixels in chunk if not isinstance(pixels, str)}
            tensors = {image: to_tensor(pixels).to(detector.device) for image, pixels in read.items()}
            given = None if boxes is None else [boxes[image].to(detector.device) for image in tensors]
            found = extract_regions(detector.model, list(tensors.values()), regions, given) if tensors else []
            for image, of_image in zip(tensors, found, strict=True):
                files.write(image, of_image)
            progress.update(len(chunk))
    print(f"{len(todo) - len(unreadable)} pictures' features are in {output}", flush=True)
    return unreadable


def _open_files(output: Path, is_npz: bool, images: Sequence[Path]) -> NpzFolder | TsvFile:
    """The files that this process writes. Names depend on all pictures, so every process chooses the same ones."""
    if is_npz:
        return NpzFolder(output, images)
    rank, count = processes.rank(), processes.world_size()
    return TsvFile(output if count == 1 else output.with_suffix(f".{rank}of{count}.tsv"), images)


def _settings(
    checkpoint: Checkpoint, weights_path: str, regions: str, boxes_path: str | None
) -> dict[str, Any]:
    """The settings that the vectors depend on, and the class names of their labels."""

    def sha256(path: str) -> str:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()

    return {
        "weights_sha256": sha256(weights_path),
        "model": checkpoint.config.model.model_dump(mode="json"),
        "regions": regions if boxes_path is None else "boxes",
        "boxes_sha256": None if boxes_path is None else sha256(boxes_path),
        "class_names": ["background", *checkpoint.class_names],
    }


def _check_settings(output: Path, is_npz: bool, settings: dict[str, Any]) -> None:
    """Write the settings beside the features. ValueError: other settings are there already."""
    if output.exists() and output.is_dir() != is_npz:
        raise ValueError(f"--output {output}: {'a folder' if is_npz else 'a file'} is needed")
    path = output / "extraction.json" if is_npz else output.with_suffix(".json")
    if not path.exists():
        return write_json(path, settings, indent=1)
    before = read_json(path)
    other = [name for name, value in settings.items() if before.get(name) != value]
    if other:
        raise ValueError(
            f"{path} is of an extraction with other settings ({', '.join(other)}): give another --output"
        )
