"""Classification networks cut at conv4_x for detection: `from backbones import create_backbone`."""

import importlib.metadata

import torch


def _check_torchvision() -> None:
    """Raise an ImportError that names the torch version which torchvision needs, where its operators cannot load."""
    try:
        import torchvision  # noqa: F401

        torch.ops.torchvision.nms  # noqa: B018
    except (RuntimeError, AttributeError, OSError, ImportError) as error:
        try:
            wanted = [r for r in importlib.metadata.requires("torchvision") or () if r.startswith("torch=")]
            found = f"torchvision {importlib.metadata.version('torchvision')} (it wants {', '.join(wanted)})"
        except importlib.metadata.PackageNotFoundError:
            raise ImportError(
                f"torchvision is not installed beside torch {torch.__version__}; "
                "run: pip install torch torchvision"
            ) from error
        raise ImportError(
            f"torchvision's operators cannot load: {found} beside torch {torch.__version__} is not a matching pair. "
            "Install both from one place, for example: pip install --force-reinstall torch torchvision "
            f"(the reason given was: {error})"
        ) from error


_check_torchvision()

from collections.abc import Callable  # noqa: E402
from functools import partial  # noqa: E402

from . import densenet, inception, preact_resnet, resnet, se_resnet  # noqa: E402, F401
from .backbone import IMAGENET, Backbone, Preprocessing, RoIHead, Trunk  # noqa: E402
from .cifar import cifar_resnet  # noqa: E402
from .cut import libraries  # noqa: E402, F401
from .cut.split import cut_network  # noqa: E402
from .registry import (  # noqa: E402
    backbone_options,
    create_backbone,
    list_backbones,
    register_backbone,
    register_library,
)

__all__ = [
    "IMAGENET",
    "Backbone",
    "Preprocessing",
    "RoIHead",
    "Trunk",
    "backbone_options",
    "cifar_resnet",
    "create_backbone",
    "cut_network",
    "list_backbones",
    "register_backbone",
    "register_library",
]


def __getattr__(name: str) -> Callable[..., Backbone]:
    """The builder of a registered backbone: `from backbones import resnet101`."""
    if name not in list_backbones():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return partial(create_backbone, name)
