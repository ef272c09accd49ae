"""Convert checkpoints of other programs. Their files are read without running code from them.

Each kind of file has one module here.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from backbones.messages import check_choice

from ..checkpoint import refuse_training_state
from .classifier import convert_classifier, is_resnet_classifier
from .converted import Converted
from .detectron2 import convert_detectron2, is_detectron2
from .mmdetection import convert_mmdetection, is_mmdetection
from .msra import convert_msra, is_msra
from .read import ForeignFile, read_foreign
from .refused import REASONS, refuse_jwyang

# For each program: how its files are recognised by the names of their tensors (None: not guessed), the converter, and
# the converter's options. timm's ResNets have torchvision's names and are taken for torchvision's.
_SOURCES: dict[str, tuple[Callable[[set[str]], bool] | None, Callable[..., Converted], tuple[str, ...]]] = {
    "detectron2": (is_detectron2, convert_detectron2, ("class_names", "overrides", "settings")),
    "msra": (is_msra, convert_msra, ()),
    "mmdetection": (is_mmdetection, convert_mmdetection, ("class_names", "overrides")),
    "jwyang": (None, refuse_jwyang, ()),
    "torchvision": (is_resnet_classifier, convert_classifier, ("backbone",)),
    "timm": (None, convert_classifier, ("backbone",)),
}
SOURCES = tuple(_SOURCES)


def guess_source(file: ForeignFile, *, is_classifier: bool = False) -> str:
    """Guess the program that wrote a file, by the names of its tensors.

    is_classifier: an unknown file is a classifier, for which "torchvision" is returned. ValueError: no program is
    recognised, the file cannot be converted, or it is a checkpoint of this project already.
    """
    names = set(file.tensors)
    if {"backbone.stage1.conv1.weight", "rpn.head.cls_logits.weight"} <= names:
        raise ValueError(f"{file.path} is a checkpoint of this program already")
    for prefixes, reason in REASONS.items():
        if any(name.startswith(prefixes) for name in names):
            raise ValueError(f"{file.path}: {reason}")
    for source, (recognise, _, _) in _SOURCES.items():
        if recognise is not None and recognise(names):
            return source
    if is_classifier:
        return "torchvision"
    first = ", ".join(list(file.tensors)[:3])
    raise ValueError(
        f"{file.path}: its tensors ({first}, ...) are of no program that is known; accepted: --from {', '.join(SOURCES)}"
    )


def convert_file(path: str | Path, source: str | None = None, **options: Any) -> tuple[str, Converted]:
    """Read and convert a checkpoint. Returns its source and the result. The source is guessed if it is None.

    options, of which empty ones and None count as not given:
        class_names, overrides: tuples of texts, for a detector.
        settings: of Detectron2's config, for its detectors.
        backbone: for a classifier that is not a ResNet, the name of its network.
    ValueError: the file cannot be converted, or an option does not belong to its kind.
    """
    if source is not None:
        check_choice("source", source, SOURCES)
    refuse_training_state(path)
    file = read_foreign(path)
    if source is None:
        source = guess_source(file, is_classifier=options.get("backbone") is not None)
    given = {name: value for name, value in options.items() if value}
    _, convert, accepted = _SOURCES[source]
    if wrong := [name for name in given if name not in accepted]:
        kinds = ", ".join(accepted) or "none"
        raise ValueError(f"{path} is of {source}: it takes no {' and '.join(wrong)}; accepted: {kinds}")
    converted = convert(file, **given)
    # A classifier's network is read once more, which says what was stripped.
    notes = (file.note,) if file.note and "backbone" not in accepted else ()
    return source, replace(converted, notes=notes + converted.notes)
