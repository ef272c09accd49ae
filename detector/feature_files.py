"""Region features on disk: one .npz per picture, or the TSV file of bottom-up attention.

Both continue where a run stopped.
"""

import base64
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from .features import RegionFeatures
from .files import write_atomically
from .names import file_names, image_ids

# The columns of bottom-up attention's files (Anderson et al. 2018, arXiv 1707.07998). The files have no header.
TSV_FIELDS = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")


class NpzFolder:
    """One .npz per picture: the arrays of `RegionFeatures`, with image_size (height, width), and the picture's path."""

    def __init__(self, folder: str | Path, images: Sequence[Path]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.files = {image: self.folder / f"{name}.npz" for image, name in file_names(images).items()}

    def is_done(self, image: Path) -> bool:
        """Whether the picture has its file already. ValueError: the file is of another picture."""
        file = self.files[image]
        if not file.exists():
            return False
        with np.load(file) as stored:
            if str(stored["path"]) != str(image):
                raise ValueError(
                    f"{file} is of {stored['path']}, not of {image}: give another --output folder"
                )
        return True

    def write(self, image: Path, regions: RegionFeatures) -> None:
        arrays = {name: v.numpy() for name, v in vars(regions).items() if isinstance(v, Tensor)}
        arrays |= {"image_size": np.array(regions.image_size), "path": np.array(str(image))}
        write_atomically(self.files[image], lambda temporary: np.savez(temporary, **arrays))


class TsvFile:
    """One line per picture: id, width, height, number of boxes, boxes (M, 4) and features (M, C5).

    Boxes and features are float32 in base64.
    """

    def __init__(self, path: str | Path, images: Sequence[Path]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        self.ids = image_ids(images)
        self.done: set[str] = set()
        end = 0
        with open(self.path, "r+b") as file:
            for line in file:
                # A stopped run may have left half a line, which is the last.
                if line.endswith(b"\n"):
                    self.done.add(line.split(b"\t", 1)[0].decode())
                    end += len(line)
            file.truncate(end)

    def is_done(self, image: Path) -> bool:
        return self.ids[image] in self.done

    def write(self, image: Path, regions: RegionFeatures) -> None:
        height, width = regions.image_size
        arrays = (regions.boxes.numpy(), regions.features.numpy())
        texts = [base64.b64encode(np.ascontiguousarray(a, np.float32)).decode("ascii") for a in arrays]
        row = (self.ids[image], width, height, len(regions.boxes), *texts)
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            file.write("\t".join(map(str, row)) + "\n")
        self.done.add(self.ids[image])
