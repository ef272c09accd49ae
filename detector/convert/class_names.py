"""Names of the classes of published detectors, which their files do not hold."""

import json
from collections.abc import Sequence
from pathlib import Path


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


# In the order of their labels: COCO's by category id, VOC's by name.
COCO = _names(
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,"
    "refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
)
VOC = _names(
    "aeroplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,diningtable,dog,horse,motorbike,person,pottedplant,"
    "sheep,sofa,train,tvmonitor"
)
_BY_COUNT = {len(COCO): COCO, len(VOC): VOC}


def read_class_names(path: str | Path) -> tuple[str, ...]:
    """Foreground names in the order of their labels, from a JSON list or from a text file with one a line."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of class names {path}")
    text = path.read_text(encoding="utf-8")
    try:
        names = json.loads(text)
    except ValueError:
        names = [line.strip() for line in text.splitlines() if line.strip()]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} holds no class names; accepted: one a line, or a JSON list of them")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{path} names {twice[0]!r} twice")
    return tuple(names)


def choose_class_names(count: int, *candidates: Sequence[str] | None) -> tuple[str, ...]:
    """The first list that is given, which must have `count` names; without one, COCO's 80 or VOC's 20."""
    given = next((tuple(names) for names in candidates if names), _BY_COUNT.get(count))
    if given is None:
        raise ValueError(
            f"the detector has {count} classes, whose names its file does not hold: give them with --class-names FILE"
        )
    if len(given) != count:
        raise ValueError(f"the detector has {count} classes; {len(given)} names were given")
    return given
