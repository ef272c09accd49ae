"""A backbone as a classifier, its training step and its evaluation."""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from backbones import Backbone, Preprocessing, create_backbone
from backbones.cifar import cifar_resnet
from backbones.weights import DEFERRED

from .. import processes
from ..engine import autocast
from .config import CIFAR
from .measures import Measures
from .normalize import Normalize
from .samples import LabelledBatch


class Classifier(nn.Module):
    """uint8 pictures (N, 3, h, w) RGB -> logits (N, K): normalisation, a network, and a linear layer of its classes.

    network: a backbone, or a network that gives logits itself.
    """

    def __init__(self, network: nn.Module, num_classes: int, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.normalize = Normalize(preprocessing)
        self.network = network
        self.fc: nn.Module = nn.Identity()
        if isinstance(network, Backbone):
            self.fc = nn.Linear(network.roi_head.out_channels, num_classes)

    @property
    def preprocessing(self) -> Preprocessing:
        return self.normalize.preprocessing

    def forward(self, images: Tensor) -> Tensor:
        images = self.normalize(images).contiguous(memory_format=torch.channels_last)
        return self.fc(self.network(images))

    def weights(self) -> dict[str, Tensor]:
        """The state dict that `weights:` of a recipe takes: the network's names, and fc."""
        return OrderedDict(self.network.state_dict()) | self.fc.state_dict(prefix="fc.")

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """The reverse of `weights`."""
        own = self.fc.state_dict(prefix="fc.")
        self.fc.load_state_dict({name.removeprefix("fc."): weights[name] for name in own})
        self.network.load_state_dict({name: value for name, value in weights.items() if name not in own})


def build_classifier(
    backbone: dict[str, Any],
    num_classes: int,
    preprocessing: Preprocessing | None,
    *,
    load_weights: bool = True,
) -> Classifier:
    """Build the classifier that a recipe's `model.backbone` names, in channels-last layout.

    preprocessing: of the pictures; that of the backbone's weights comes in its place, where they are read. load_weights: False reads none.
    """
    options = dict(backbone)
    name = options.pop("name")
    if name == CIFAR:
        network: nn.Module = cifar_resnet(num_classes=num_classes, **options)
    else:
        has_weights = options.get("weights") is not None
        if has_weights and not load_weights:
            options["weights"] = DEFERRED
        network = create_backbone(name, **options)
        if has_weights and load_weights:
            preprocessing = network.preprocessing
    classifier: nn.Module = Classifier(network, num_classes, preprocessing)
    return classifier.to(memory_format=torch.channels_last)


class ClassifierTask:
    """The training of a classifier by cross entropy."""

    losses = ("loss",)

    def __init__(self, label_smoothing: float) -> None:
        self.label_smoothing = label_smoothing

    def __call__(
        self, network: nn.Module, batch: LabelledBatch, device: torch.device, key: tuple[int, int, int]
    ) -> dict[str, Tensor]:
        images, labels = (each.to(device, non_blocking=True) for each in batch[:2])
        logits = network(images).float()
        loss = nn.functional.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return {"loss": loss}

    def name(self, batch: LabelledBatch) -> str:
        return f"a batch of {len(batch.labels)} pictures"

    def count(self, batch: LabelledBatch) -> int:
        return len(batch.labels)


@torch.inference_mode()
def evaluate_classifier(
    model: Classifier,
    loader: Iterable[LabelledBatch],
    num_classes: int,
    device: torch.device,
    amp_dtype: torch.dtype | None = None,
    on_step: Callable[[int], object] = lambda num_images: None,
) -> tuple[Measures, float]:
    """The measures of all pictures, and the mean cross entropy. Several processes share the batches."""
    was_training = model.training
    model.eval()
    measures, total = Measures(num_classes), torch.zeros((), device=device)
    for batch in loader:
        images, labels = (each.to(device, non_blocking=True) for each in batch[:2])
        if not len(labels):
            continue
        with autocast(device, amp_dtype):
            logits = model(images).float()
        measures.add(logits, labels)
        total += nn.functional.cross_entropy(logits, labels, reduction="sum")
        on_step(len(labels))
    model.train(was_training)
    measures.counts = sum(processes.gather(measures.counts.cpu()))
    count = int(measures.counts[:, :-1].sum())
    return measures, sum(processes.gather(float(total))) / max(count, 1)
