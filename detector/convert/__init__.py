"""Checkpoints of other programs as ours: one small file a source, the file read without running code from it."""

from collections.abc import Callable
from pathlib import Path

from backbones.messages import check_choice

from .classifier import convert_classifier, is_resnet_classifier
from .converted import Converted
from .detectron2 import convert_detectron2, is_detectron2
from .mmdetection import convert_mmdetection, is_mmdetection
from .msra import convert_msra, is_msra
from .read import ForeignFile, read_foreign
from .refused import reason, refuse

Recognise = Callable[[set[str]], bool] | None
# Whether a file is of a program by the names of its tensors (None: it must be said), the converter, and its options.
# torchvision's and timm's ResNets have the same names.
_SOURCES: dict[str, tuple[Recognise, Callable[..., Converted], tuple[str, ...]]] = {
    "detectron2": (is_detectron2, convert_detectron2, ("class_names", "overrides")),
    "msra": (is_msra, convert_msra, ()),
    "mmdetection": (is_mmdetection, convert_mmdetection, ("class_names", "overrides")),
    "jwyang": (None, refuse, ()),
    "torchvision": (is_resnet_classifier, convert_classifier, ("backbone",)),
    "timm": (None, convert_classifier, ("backbone",)),
}
SOURCES = tuple(_SOURCES)


def guess_source(file: ForeignFile, *, is_classifier: bool = False) -> str:
    """The program that wrote the file, by the names of its tensors; other classifiers than ResNets say that they are."""
    names = set(file.tensors)
    if {"backbone.stage1.conv1.weight", "rpn.head.cls_logits.weight"} <= names:
        raise ValueError(f"{file.path} is a checkpoint of this program already")
    why_not = reason(names)
    if why_not is not None:
        raise ValueError(f"{file.path}: {why_not}")
    for source, (recognise, _, _) in _SOURCES.items():
        if recognise is not None and recognise(names):
            return source
    if is_classifier:
        return "torchvision"
    first = ", ".join(list(file.tensors)[:3])
    raise ValueError(
        f"{file.path}: its tensors ({first}, ...) are of no program that is known; accepted: --from {', '.join(SOURCES)}"
    )


def convert_file(
    path: str | Path,
    source: str | None = None,
    *,
    class_names: tuple[str, ...] | None = None,
    overrides: tuple[str, ...] = (),
    backbone: str | None = None,
) -> tuple[str, Converted]:
    """Read and convert a checkpoint; gives the source too, which is guessed when it is None.

    class_names, overrides: of a detector. backbone: the name of a classifier's network where it is no ResNet.
    """
    if source is not None:
        check_choice("source", source, SOURCES)
    file = read_foreign(path)
    if source is None:
        source = guess_source(file, is_classifier=backbone is not None)
    options = {"class_names": class_names, "overrides": overrides, "backbone": backbone}
    given = {name: value for name, value in options.items() if value}
    _, convert, accepted = _SOURCES[source]
    if wrong := [name for name in given if name not in accepted]:
        kind = "a detector, whose network is read from it" if "class_names" in accepted else "a classifier"
        raise ValueError(f"{path} is {kind}, of {source}: it takes no {' and '.join(wrong)}")
    return source, convert(file, **given)
