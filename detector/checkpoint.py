"""The files of a run: weights with all that a detector needs, and the state that the run resumes from.

`best.safetensors`, `last.safetensors`: weights. Their metadata holds config, class names, preprocessing and metrics.
`training_state.pt`: raw weights, optimizer, schedule, averages and counters. Reading a file runs no code from it.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Json, ValidationError
from torch import Tensor

from backbones import IMAGENET, Preprocessing
from backbones.messages import misfit
from backbones.reading import load_with_metadata, read

from .build import build_model
from .config import Config, parse_config
from .files import save_tensors, write_atomically
from .model.conventions import Conventions
from .model.faster_rcnn import C4FasterRCNN
from .settings import sentences

FORMAT = "fasterrcnn-c4"
VERSION = 2

# Settings that version 1 kept in the section `model`.
_SPEED = ("shared_projection", "sparse_roi_align", "fold_norms", "activation_checkpointing")


@dataclass(frozen=True)
class Checkpoint:
    """Weights with the recipe, the class names and the preprocessing that they need.

    metrics: of the evaluation that made these weights the best ones; otherwise {}.
    """

    state_dict: dict[str, Tensor]
    config: Config
    class_names: tuple[str, ...]
    preprocessing: Preprocessing = IMAGENET
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)

    def with_overrides(self, overrides: Sequence[str]) -> "Checkpoint":
        """The same weights with `key=value` overrides of the recipe, for example "model.box_nms_thresh=0.4"."""
        values = self.config.model_dump(mode="json")
        return dataclasses.replace(
            self, config=parse_config(values, overrides, source="the checkpoint's config")
        )

    def build(self) -> C4FasterRCNN:
        """Build the detector with these weights, in evaluation mode. ValueError: they do not fit the config."""
        model = build_model(self.config.model, Config.num_classes(self.class_names), load_weights=False)
        # A preprocessing that the config sets is in the model already, and comes before the stored one.
        if self.config.model.preprocessing is None:
            model.transform.set_preprocessing(self.preprocessing)
        if differences := misfit(model.state_dict(), self.state_dict):
            raise ValueError(f"the weights do not fit the config beside them; {differences}")
        # Counters of batch norms may be absent.
        model.load_state_dict(self.state_dict, strict=False)
        return model.eval()


class _Metadata(BaseModel):
    """What `save_checkpoint` writes beside the tensors."""

    version: int
    config: Json[dict[str, Any]]
    class_names: Json[tuple[str, ...]]
    preprocessing: Json[Preprocessing]
    metrics: Json[dict[str, Any]]


def parse_stored_config(values: dict[str, Any], version: int, source: str) -> Config:
    """The configuration that a file of this version holds.

    In version 1, the settings of speed and conventions were in `model`, and None meant the default.
    """
    if version < 2:
        model = values.get("model")
        if not isinstance(model, dict):
            raise ValueError(f"{source} has no section model")
        model = {key: value for key, value in model.items() if value is not None}
        speed = {key: model.pop(key) for key in _SPEED if key in model}
        conventions = {key: model.pop(key) for key in Conventions.model_fields if key in model}
        values = {**values, "model": {**model, "conventions": conventions}, "speed": speed}
    return parse_config(values, source=source)


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write a .safetensors file, whole or not at all."""
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "config": checkpoint.config.model_dump_json(),
        "class_names": json.dumps(checkpoint.class_names),
        "preprocessing": json.dumps(dataclasses.asdict(checkpoint.preprocessing)),
        "metrics": json.dumps(checkpoint.metrics),
    }
    save_tensors(path, checkpoint.state_dict, metadata)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a .safetensors checkpoint of tools/train.py or tools/convert_weights.py.

    ValueError: a file of another program, without a detector, or of a newer version.
    """
    if Path(path).suffix in (".pth", ".pt", ".pkl"):
        raise ValueError(
            f"{path} is not a checkpoint of this project; tools/convert_weights.py converts those of other programs"
        )
    tensors, metadata = read(path, load_with_metadata)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} holds tensors but no detector: a checkpoint of tools/train.py is needed")
    try:
        stored = _Metadata.model_validate(metadata)
    except ValidationError as error:
        raise ValueError(f"{path} has damaged metadata: {'; '.join(sentences(error))}") from None
    if stored.version > VERSION:
        raise ValueError(f"{path} is of version {stored.version}; this program reads up to {VERSION}")
    config = parse_stored_config(stored.config, stored.version, f"the config in {path}")
    return Checkpoint(tensors, config, stored.class_names, stored.preprocessing, stored.metrics)


def save_training_state(path: str | Path, state: dict[str, Any]) -> None:
    """Write `training_state.pt`, whole or not at all."""
    state = {**state, "version": VERSION}
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def load_training_state(path: str | Path) -> dict[str, Any]:
    """Read `training_state.pt`. FileNotFoundError: there is none."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is nothing to resume from: {path} does not exist")
    return read(path)
