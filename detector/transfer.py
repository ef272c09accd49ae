"""Start a training from another detector's weights: keep what fits, and report what is new.

The predictor's rows are matched by the names of their classes, whatever their order. Background's row is always kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backbones.messages import misfit

from .checkpoint import Checkpoint
from .config import ModelConfig
from .model.faster_rcnn import C4FasterRCNN

_PREDICTOR = "roi_heads.box_predictor."
_RPN_OUTPUTS = ("rpn.head.cls_logits.", "rpn.head.bbox_pred.")
# Frozen norms have no such counter.
_COUNTER = "num_batches_tracked"
# Left out of the comparison of settings: these only change what is returned, or are compared on their own.
_FREE = ("backbone", "preprocessing", "class_agnostic_nms", "conventions")


@dataclass(frozen=True)
class Start:
    """The result of `start_from`.

    kept, new: names of tensors. kept_classes, new_classes: names of classes. other_settings: a text for each setting
    that differs from the checkpoint's.
    """

    kept: tuple[str, ...]
    new: tuple[str, ...]
    kept_classes: tuple[str, ...]
    new_classes: tuple[str, ...]
    other_settings: tuple[str, ...]

    def describe(self) -> str:
        lines = [f"kept: {len(self.kept)} tensors: " + self._parts(self.kept)]
        if self.new:
            lines.append(f"new: {', '.join(self.new)}")
        kept, new = ", ".join(self.kept_classes) or "none", ", ".join(self.new_classes) or "none"
        lines += [f"classes kept by name: {kept}", f"new classes: {new}"]
        if self.other_settings:
            lines.append("not as the weights were trained: " + "; ".join(self.other_settings))
        return "\n".join(lines)

    @staticmethod
    def _parts(names: Sequence[str]) -> str:
        parts = {"backbone": "trunk", "rpn": "RPN", "roi_heads": "RoI head and predictor"}
        counts = {label: sum(n.startswith(f"{part}.") for n in names) for part, label in parts.items()}
        return ", ".join(f"{label} {count}" for label, count in counts.items() if count)


def start_from(
    model: C4FasterRCNN, config: ModelConfig, class_names: Sequence[str], checkpoint: Checkpoint
) -> Start:
    """Copy a checkpoint's weights into `model` where they fit, and set the preprocessing that they expect.

    Trunk and RoI head must fit whole, otherwise a ValueError is raised. The RPN's two output layers are kept if the
    anchors have the same order, aspect ratios and number of sizes. The predictor's rows are kept for background and
    for classes of the same name.
    """
    wanted, given = model.state_dict(), checkpoint.state_dict
    _refuse_other_network(wanted, given, config, checkpoint.config.model)
    fitting = {
        name: given[name]
        for name in wanted
        if not name.startswith(_PREDICTOR) and name in given and given[name].shape == wanted[name].shape
    }
    if not _same_anchors(config, checkpoint.config.model):
        fitting = {name: value for name, value in fitting.items() if not name.startswith(_RPN_OUTPUTS)}
    common = [name for name in class_names if name in checkpoint.class_names]
    predictor = _predictor_rows(wanted, given, class_names, checkpoint.class_names)
    model.load_state_dict({**wanted, **fitting, **predictor})
    model.transform.set_preprocessing(checkpoint.preprocessing)
    new = tuple(n for n in wanted if n not in fitting and n not in predictor and not n.endswith(_COUNTER))
    return Start(
        (*fitting, *predictor),
        new,
        tuple(common),
        tuple(name for name in class_names if name not in common),
        _other_settings(config, checkpoint.config.model),
    )


def _refuse_other_network(
    wanted: dict[str, Tensor], given: dict[str, Tensor], config: ModelConfig, theirs: ModelConfig
) -> None:
    networks = (
        {
            name: value
            for name, value in state.items()
            if name.startswith(("backbone.", "roi_heads.box_head."))
        }
        for state in (wanted, given)
    )
    if differences := misfit(*networks):
        raise ValueError(
            f"the weights to start from are of {theirs.backbone['name']}, the recipe's backbone is "
            f"{config.backbone['name']}; {differences}"
        )


def _same_anchors(one: ModelConfig, other: ModelConfig) -> bool:
    return (
        one.conventions.anchor_order == other.conventions.anchor_order
        and one.aspect_ratios == other.aspect_ratios
        and len(one.anchor_sizes) == len(other.anchor_sizes)
    )


def _predictor_rows(
    wanted: dict[str, Tensor], given: dict[str, Tensor], class_names: Sequence[str], theirs: Sequence[str]
) -> dict[str, Tensor]:
    """The predictor's tensors: cls_score (K, C5) and (K,), bbox_pred (4K, C5) and (4K,).

    Rows of background and of classes that both have come from `given`, the others from `wanted`.
    """
    pairs = [(0, 0)] + [
        (label, 1 + list(theirs).index(name)) for label, name in enumerate(class_names, 1) if name in theirs
    ]
    to, source = (torch.tensor(labels) for labels in zip(*pairs, strict=True))
    filled = {}
    for layer, rows in (("cls_score", 1), ("bbox_pred", 4)):
        for kind in ("weight", "bias"):
            name = f"{_PREDICTOR}{layer}.{kind}"
            target = wanted[name].clone()
            by_class = given[name].to(target.device).unflatten(0, (-1, rows))
            target.unflatten(0, (-1, rows))[to] = by_class[source]
            filled[name] = target
    return filled


def _other_settings(config: ModelConfig, theirs: ModelConfig) -> tuple[str, ...]:
    """A text for each setting that differs between the recipe and the weights, with the backbone's stride_in."""
    ours, before = (m.model_dump() | m.conventions.model_dump() for m in (config, theirs))
    differing = {
        name: (value, before[name])
        for name, value in ours.items()
        if name not in _FREE and not name.endswith(("_train", "_test")) and value != before[name]
    }
    stride = tuple(m.backbone.get("stride_in", "3x3") for m in (config, theirs))
    if stride[0] != stride[1]:
        differing["backbone.stride_in"] = stride
    return tuple(f"{name} is {new!r}, was {old!r}" for name, (new, old) in differing.items())
