"""A classifier's recipe."""

import inspect
from typing import Literal

from pydantic import Field, model_validator

from backbones import backbone_options
from backbones.cifar import cifar_resnet

from ..config import BackboneSettings, TrainConfig
from ..settings import Count, Pixels, Section
from .augment import ClassifierAugment
from .sources import PicturesSource

CIFAR = "cifar_resnet"


class NetworkConfig(BackboneSettings):
    """The classifier: a backbone with a linear layer of its classes, or a CIFAR ResNet (cifar_resnet) of some depth."""

    size: Pixels | None = Field(
        None,
        description="side of the network's input; None: the pictures' own, where they all have one size",
    )

    @staticmethod
    def options_of(name: str) -> dict[str, inspect.Parameter]:
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

    @model_validator(mode="after")
    def _check_size(self) -> "ClassifierConfig":
        if self.data.format == "folder" and self.model.size is None:
            raise ValueError(
                "model.size is missing; class folders need the side of the network's input, such as model.size=224"
            )
        if self.model.size is not None and self.augment.padding:
            raise ValueError(
                f"augment.padding is {self.augment.padding}; with model.size, which cuts and resizes, accepted: 0"
            )
        return self
