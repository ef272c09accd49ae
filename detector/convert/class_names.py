"""Class names of published detectors, whose files do not hold them."""

import json
from collections.abc import Sequence
from pathlib import Path

from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights
from torchvision.models.segmentation import FCN_ResNet50_Weights

# In the order of their labels: COCO's by category id, VOC's by name. torchvision's lists have background and gaps too.
_GAPS = ("__background__", "N/A")
COCO = tuple(c for c in FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"] if c not in _GAPS)
VOC = tuple(c for c in FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1.meta["categories"] if c not in _GAPS)
_BY_COUNT = {len(COCO): COCO, len(VOC): VOC}


def read_class_names(path: str | Path) -> tuple[str, ...]:
    """Read foreground names in the order of their labels, from a JSON list or a text file with one name per line.

    FileNotFoundError: there is no file. ValueError: it holds no names, or one twice.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of class names {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        names = [line.strip() for line in text.splitlines() if line.strip()]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} holds no class names; accepted: one a line, or a JSON list of them")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{path} names {twice[0]!r} twice")
    return tuple(names)


def choose_class_names(count: int, *candidates: Sequence[str] | None) -> tuple[str, ...]:
    """The first list of names that is given; if none is, COCO's 80 or VOC's 20, by `count`.

    ValueError: the list does not have `count` names, or no list is known.
    """
    given = next((tuple(names) for names in candidates if names), _BY_COUNT.get(count))
    if given is None:
        raise ValueError(
            f"the detector has {count} classes, whose names its file does not hold: give them with --class-names FILE"
        )
    if len(given) != count:
        raise ValueError(f"the detector has {count} classes; {len(given)} names were given")
    return given
