"""The files of a run: weights with all that a detector needs, and the state that the run resumes from.

`best.safetensors`, `last.safetensors`: weights. Their metadata holds config, class names, preprocessing and metrics.
`training_state.pt`: raw weights, optimizer, schedule, averages and counters; `training_state.previous.pt`: the one
before it. Reading a file runs no code from it.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from zipfile import ZipFile, is_zipfile

import torch
from pydantic import BaseModel, ConfigDict, Field, Json, ValidationError
from torch import Tensor

from backbones import IMAGENET, Preprocessing
from backbones.messages import misfit
from backbones.reading import load_tensors, load_with_metadata, read

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

_Count = Annotated[int, Field(strict=True, ge=0, lt=2**31)]


class _State(BaseModel):
    """What a training state holds. Parts with a default are not in every version."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    model: dict[str, Any]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    scaler: dict[str, Any]
    config: dict[str, Any]
    epoch: _Count
    batch: _Count
    step: _Count
    evaluations_since_best: _Count
    best: Annotated[float, Field(strict=True)]
    class_names: tuple[str, ...]
    version: _Count = 1
    awaits_evaluation: bool = False
    skipped: _Count = 0
    data: dict[str, dict[str, int | str] | None] = {}
    preprocessing: Preprocessing | None = None
    batch_images: _Count | None = None


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
    refuse_training_state(path)
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
        raise ValueError(f"{path} has damaged metadata: {'; '.join(sentences(error, metadata))}") from None
    if stored.version > VERSION:
        raise ValueError(f"{path} is of version {stored.version}; this program reads up to {VERSION}")
    config = parse_stored_config(stored.config, stored.version, f"the config in {path}")
    return Checkpoint(tensors, config, stored.class_names, stored.preprocessing, stored.metrics)


def refuse_training_state(path: str | Path) -> None:
    """Raise a ValueError that names the weights, if the path is that of a training state."""
    if Path(path).name in ("training_state.pt", "training_state.previous.pt"):
        weights = [Path(path).with_name(f"{name}.safetensors") for name in ("best", "last")]
        found = next((each for each in weights if each.is_file()), weights[0])
        raise ValueError(f"{path} is what a run resumes from; its weights are in {found}")


def previous_state(path: Path) -> Path:
    """Where the training state is kept that was at `path` before."""
    return path.with_suffix(".previous.pt")


def save_training_state(path: str | Path, state: dict[str, Any]) -> None:
    """Write a training state whole or not at all, on the disk when this returns, and keep the one before it."""

    def write(temporary: Path) -> None:
        # Given a path, torch hides what the system says, for example that the disk is full.
        with open(temporary, "wb") as file:
            torch.save({**state, "version": VERSION}, file)

    write_atomically(path, write, durable=True, previous=previous_state(Path(path)))


def load_training_state(path: str | Path) -> dict[str, Any]:
    """Read one training state. FileNotFoundError: there is none. ValueError: it is damaged, or something else."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is nothing to resume from: {path} does not exist")
    state = read(path, _load_checked)
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a training state")
    return state


def newest_training_state(path: str | Path) -> dict[str, Any]:
    """Read the training state at `path`; where it is damaged or missing, the one before it, with a warning.

    FileNotFoundError: there is none. ValueError: none is whole.
    """
    path, faults = Path(path), []
    for candidate in (path, previous_state(path)):
        try:
            state = load_training_state(candidate)
            _check_state(state, candidate)
        except (FileNotFoundError, ValueError) as error:
            faults.append(error)
            continue
        if faults:
            print(f"warning: {faults[0]}; resuming from {candidate}, update {state['step']}", flush=True)
        return state
    if all(isinstance(fault, FileNotFoundError) for fault in faults):
        raise faults[0]
    damaged = "; ".join(str(fault) for fault in faults if isinstance(fault, ValueError))
    raise ValueError(
        f"{damaged}. A new run can start from the weights: --start-from {path.with_name('last.safetensors')}"
    )


def _load_checked(path: Path) -> Any:
    """Load what torch.save wrote, after a check of the checksums that it gave to each part."""
    if not is_zipfile(path):
        raise ValueError("it is no archive of torch.save; it may hold code, which is never run")
    with ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
    return load_tensors(path)


def _check_state(state: dict[str, Any], path: Path) -> None:
    """Raise a ValueError where a training state lacks a part, or has one of another kind."""
    try:
        _State.model_validate(state)
    except ValidationError as error:
        wrong = ", ".join(dict.fromkeys(str(each["loc"][0]) for each in error.errors()))
        raise ValueError(f"{path} is no training state: {wrong} missing or of another kind") from None
    if state.get("version", 1) > VERSION:
        raise ValueError(f"{path} is of version {state['version']}; this program reads up to {VERSION}")
