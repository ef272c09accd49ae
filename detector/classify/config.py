"""A classifier's recipe."""

import inspect
from typing import Any, Literal

from pydantic import Field, field_validator

from backbones import backbone_options
from backbones.cifar import cifar_resnet
from backbones.messages import shown

from ..config import TrainConfig
from ..settings import Count, Pixels, Section, parse, section_of
from .augment import ClassifierAugment
from .sources import PicturesSource

CIFAR = "cifar_resnet"


class NetworkConfig(Section):
    """The classifier: a backbone with a linear layer of its classes, or a CIFAR ResNet."""

    backbone: dict[str, Any] = Field(
        description="the name of a backbone, or cifar_resnet with its depth, and its options"
    )
    size: Pixels | None = Field(
        None,
        description="side of the network's input; None: the pictures' own, where they all have one size",
    )

    @field_validator("backbone", mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("backbone")
    @classmethod
    def _check_backbone(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Check the options against the arguments of the network's builder."""
        if not isinstance(value.get("name"), str):
            raise ValueError(f"backbone needs a name; got {shown(value)}")
        options = section_of(value["name"], network_options(value["name"]).values())
        given = {key: option for key, option in value.items() if key != "name"}
        return {"name": value["name"], **parse(options, given).model_dump(exclude_unset=True)}


def network_options(name: str) -> dict[str, inspect.Parameter]:
    """The options of a network. An unknown name is a ValueError."""
    if name != CIFAR:
        return backbone_options(name)
    parameters = dict(inspect.signature(cifar_resnet).parameters)
    del parameters["num_classes"]
    # pydantic takes it for a setting that must be given.
    return parameters | {"depth": parameters["depth"].replace(default=...)}


class ClassifierTrainConfig(TrainConfig):
    """Optimisation, and when a run evaluates, logs and stops. The defaults are those of He et al. 2015 on CIFAR-10."""

    batch_size: Count = Field(128, description="images per batch")
    lr: float = Field(0.1, gt=0, description="after warm-up, for the images of an update")
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    best_metric: Literal["top1", "top5", "mean_accuracy"] = "top1"


class ClassifierLoaderConfig(Section):
    """How batches are made."""

    num_workers: int = Field(0, ge=0, le=256)
    eval_batch_size: Count = 256


class ClassifierConfig(Section):
    """A complete recipe."""

    model: NetworkConfig
    data: PicturesSource
    augment: ClassifierAugment = ClassifierAugment()
    train: ClassifierTrainConfig = ClassifierTrainConfig()
    loader: ClassifierLoaderConfig = ClassifierLoaderConfig()
