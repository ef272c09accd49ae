"""The configuration: a YAML file of names and numbers, read into frozen typed models.

The network and the training loops take plain arguments, not a configuration.
"""

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator
from pydantic_core import PydanticSerializationError

from backbones import backbone_options
from backbones.messages import shown

from .data.sources import DataConfig
from .model.faster_rcnn import build_faster_rcnn
from .model.speed import Speed
from .settings import Count, Positive, Section, parse, section_of, sentences
from .yaml_text import MAX_DEPTH, parse_yaml

C = TypeVar("C", bound=Section)
_MAX_BYTES = 2**20
_SCALES = (0.1, 10.0)


class BackboneSettings(Section):
    """A backbone by its name and options, or by its name alone."""

    backbone: dict[str, Any] = Field(description="the name of a backbone, and its options")

    @staticmethod
    def options_of(name: str) -> dict[str, inspect.Parameter]:
        """The options of a named backbone. An unknown name is a ValueError."""
        return backbone_options(name)

    @field_validator("backbone", mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("backbone")
    @classmethod
    def _check_backbone(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Check the options against the arguments that the named backbone's builder declares."""
        if not isinstance(value.get("name"), str):
            raise ValueError(f"backbone needs a name; got {shown(value)}")
        options = section_of(value["name"], cls.options_of(value["name"]).values())
        given = {key: option for key, option in value.items() if key != "name"}
        return {"name": value["name"], **parse(options, given).model_dump(exclude_unset=True)}


class ModelConfig(build_faster_rcnn.settings, BackboneSettings):
    """The detector: its backbone, and the arguments that `build_faster_rcnn` declares."""

    @property
    def resizing(self) -> dict[str, Any]:
        """How images are resized to the network's size, as arguments of the loader's transforms."""
        chosen = self.conventions
        return {
            "min_size": self.min_size,
            "max_size": self.max_size,
            "resize": chosen.resize,
            "resize_rounding": chosen.resize_rounding,
        }


class AugmentConfig(Section):
    """Augmentation of training images. Every draw is a function of (seed, epoch, image id).

    `scale` changes the size that images are resized to; the other steps follow the resize.
    """

    horizontal_flip: float = Field(0.5, ge=0, le=1)
    vertical_flip: float = Field(0.0, ge=0, le=1)
    scale: tuple[float, float] = Field(
        (1.0, 1.0), description="factor on the network's size, drawn uniformly between the two"
    )
    crop: float = Field(0.0, ge=0, le=1, description="probability of a crop that keeps every box whole")
    brightness: float = Field(0.0, ge=0, le=1)
    contrast: float = Field(0.0, ge=0, le=1)
    saturation: float = Field(0.0, ge=0, le=1)
    hue: float = Field(0.0, ge=0, le=0.5)

    @field_validator("scale")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        least, most = _SCALES
        if not least <= value[0] <= value[1] <= most:
            raise ValueError(f"is {value}; accepted: two numbers from {least} to {most:g}, the smaller first")
        return value


class TrainConfig(Section):
    """Optimisation, and when a run evaluates, logs and stops."""

    epochs: Count = 12
    batch_size: Count = Field(2, description="images per batch")
    accumulate: Count = Field(1, description="batches whose gradients are added up for one update")
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(0.0025, gt=0, description="after warm-up, for batch_size x accumulate images an update")
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(1e-4, ge=0)
    norm_decay: bool = Field(False, description="decay norms and biases too")
    schedule: Literal["multistep", "cosine"] = "multistep"
    milestones: tuple[Positive, ...] = Field(
        (), description="multistep: epochs after which lr is multiplied by gamma"
    )
    gamma: float = Field(0.1, gt=0, le=1)
    warmup_steps: int = Field(100, ge=0, le=10**9, description="updates of linear warm-up")
    warmup_factor: float = Field(0.001, gt=0, le=1, description="factor on lr at the first update")
    clip_norm: float | None = Field(None, gt=0, description="largest norm of all gradients together")
    amp: Literal["none", "bf16", "fp16"] = "none"
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay of the averaged weights and batch-norm statistics, which are evaluated and saved",
    )
    eval_every: Count = Field(1, description="epochs between evaluations")
    patience: Count | None = Field(
        None, description="stop after this many evaluations without a better best_metric"
    )
    best_metric: Literal["AP", "AP50", "AP75"] = "AP"
    log_every: Count = Field(20, description="updates between lines of metrics.jsonl")
    save_every: float = Field(
        10, ge=0, description="minutes between states that --resume continues from; 0: every update"
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="at an infinite or NaN loss: stop, or skip the update, at most ten in a row"
    )
    seed: int = Field(0, ge=0, lt=2**63)


class LoaderConfig(Section):
    """How batches are made."""

    num_workers: int = Field(2, ge=0, le=256)
    eval_batch_size: Count = 4
    group_by_aspect_ratio: bool = True


class Config(Section):
    """A complete recipe."""

    model: ModelConfig
    speed: Speed = Speed()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    train: TrainConfig = TrainConfig()
    loader: LoaderConfig = LoaderConfig()

    @staticmethod
    def num_classes(class_names: tuple[str, ...]) -> int:
        """K: the data's classes and background. A recipe's K is computed nowhere else."""
        return len(class_names) + 1


def split_overrides(arguments: Iterable[str]) -> tuple[list[str], list[str]]:
    """Split arguments into overrides of the recipe and others. Returns (overrides, others).

    An override is section.key=value, where the recipe has that section and no file has that name.
    """
    overrides: list[str] = []
    others: list[str] = []
    for argument in arguments:
        section = argument.partition("=")[0].partition(".")[0]
        is_override = "=" in argument and section in Config.model_fields and not Path(argument).exists()
        (overrides if is_override else others).append(argument)
    return overrides, others


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = (), kind: type[C] = Config) -> C:
    """Read a recipe from a YAML file, with `key=value` overrides such as `["train.lr=0.01", "data.root=/data"]`.

    FileNotFoundError: there is no such file. ValueError: as in `parse_config`.
    """
    path = Path(path)
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise FileNotFoundError(
            f"there is no config {path}" + (f"; beside it: {', '.join(near)}" if near else "")
        )
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; a config has at most {_MAX_BYTES:,}")
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a valid config: {error}") from None
    return parse_config(values, overrides, source=str(path), kind=kind)


def parse_config(
    values: Any,
    overrides: list[str] | tuple[str, ...] = (),
    source: str = "config",
    kind: type[C] = Config,
) -> C:
    """Check plain dictionaries, from YAML or a checkpoint, and freeze them.

    ValueError: wrong keys or values, a line for each. source: the name of the file in errors. kind: the recipe's class.
    """
    if not isinstance(values, dict):
        raise ValueError(
            f"{source} holds {type(values).__name__}; accepted: sections {', '.join(kind.model_fields)}"
        )
    for override in overrides:
        values = _override(values, override)
    try:
        config = kind.model_validate(values)
        # A checkpoint holds the config as JSON.
        config.model_dump_json()
        return config
    except PydanticSerializationError:
        raise ValueError(f"{source} is not a valid config: a name in it is not UTF-8 text") from None
    except ValidationError as error:
        lines = "\n  ".join(sentences(error, values))
        raise ValueError(f"{source} is not a valid config:\n  {lines}") from None


def _override(values: Any, override: str) -> Any:
    """A copy of `values` with `a.b.0.c=value` set; the value is read as YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override {override!r}; accepted: key=value, for example train.lr=0.01")
    if key.count(".") > MAX_DEPTH:
        raise ValueError(f"override {shown(override)}: its key is more than {MAX_DEPTH} deep")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"override {shown(override)}: {shown(text)} is not a YAML value: {error}") from None

    def put(node: Any, parts: list[str]) -> Any:
        if not parts:
            return value
        if isinstance(node, list):
            if not parts[0].isdigit() or int(parts[0]) >= len(node):
                raise ValueError(
                    f"override {override!r}: {parts[0]!r} is no index of a list of {len(node)}; accepted: 0 to {len(node) - 1}"
                )
            index = int(parts[0])
            return [*node[:index], put(node[index], parts[1:]), *node[index + 1 :]]
        if isinstance(node, str) and key.startswith(("model.backbone.", "model.conventions.")):
            # A name alone is short for {name: ...}.
            node = {"name": node}
        if node is not None and not isinstance(node, dict):
            raise ValueError(f"override {override!r}: there is nothing below {node!r}")
        node = node or {}
        return {**node, parts[0]: put(node.get(parts[0]), parts[1:])}

    return put(values, key.split("."))
