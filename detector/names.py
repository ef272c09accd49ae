"""Names of the files and lines that are written for each picture, and names of strangers as they are shown."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

# File systems take names of 255 bytes. The rest is for a number, a suffix, and the name of a file that is being written.
_MAX_BYTES = 200

CONTROL = "[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
"""Characters that could move the cursor, end a line, turn the direction of writing, or that no encoding takes."""


def escaped(text: str, pattern: str = CONTROL) -> str:
    """The text with such characters as escapes, for example \\x1b."""
    return re.sub(pattern, lambda found: found[0].encode("unicode_escape").decode(), text)


def file_names(images: Sequence[Path]) -> dict[Path, str]:
    """A different name for each picture: its file name without suffix.

    Pictures of the same name get their folder's name in front, and then a number if they still agree. A name is cut
    after 200 bytes.
    """
    stems = Counter(image.stem for image in images)
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for image in images:
        base = image.stem if stems[image.stem] == 1 else f"{image.resolve().parent.name}_{image.stem}"
        if len(encoded := os.fsencode(base)) > _MAX_BYTES:
            base = encoded[:_MAX_BYTES].decode("utf-8", "ignore")
        name, number = base, 1
        while name in taken:
            number += 1
            name = f"{base}_{number}"
        names[image] = name
        taken.add(name)
    return names


def image_ids(images: Sequence[Path]) -> dict[Path, str]:
    """An id for each picture: the number at the end of its file name, as in COCO.

    If a name has no number, or two numbers agree, all ids are those of `file_names`, `escaped`.
    """
    numbers = [re.search(r"(\d+)$", image.stem) for image in images]
    ids = [str(int(number[1])) for number in numbers if number]
    if len(ids) == len(images) and len(set(ids)) == len(ids):
        return dict(zip(images, ids, strict=True))
    return {image: escaped(name) for image, name in file_names(images).items()}


def drawing_paths(images: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """The path of a JPEG in `folder` for each picture. ValueError: one would overwrite a picture."""
    drawings = {image: folder / f"{name}.jpg" for image, name in file_names(images).items()}
    if {image.resolve() for image in images} & {drawing.resolve() for drawing in drawings.values()}:
        raise ValueError(
            f"the drawings would overwrite the pictures in {folder}: give another --output folder"
        )
    return drawings
