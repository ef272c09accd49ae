"""Convert torchvision's and timm's classifiers to weights for our backbone of the same network."""

from backbones import create_backbone
from backbones.resnet import TORCHVISION_NAMES
from backbones.weights import ENCODERS, rename, unwrap

from .architecture import name_resnet
from .converted import BackboneWeights, Converted
from .read import ForeignFile

_LAYERS = ("conv1.", "bn1.", "layer")


def is_resnet_classifier(names: set[str]) -> bool:
    inside, _ = unwrap(dict.fromkeys(names), ENCODERS, any)
    return {"conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer4.0.conv1.weight"} <= inside.keys()


def convert_classifier(file: ForeignFile, *, backbone: str | None = None) -> Converted:
    """Convert a classifier to weights of a backbone. backbone: its name; a ResNet is recognised by its tensors.

    The preprocessing is our backbone's default, which is ImageNet's mean and deviation for torchvision's networks.
    ValueError: the file is no ResNet and `backbone` is None, or its tensors do not fit.
    """
    if backbone is None and not is_resnet_classifier(set(file.tensors)):
        raise ValueError(f"{file.path} is no ResNet of torchvision or timm: name the network with --backbone")
    options = {"name": backbone}
    if backbone is None:
        inside, _ = unwrap(file.tensors, ENCODERS, any)
        layers = {name: value for name, value in inside.items() if name.startswith(_LAYERS)}
        options = name_resnet(rename(layers, TORCHVISION_NAMES), str(file.path))
    network = create_backbone(**options, weights=str(file.path))
    return Converted(BackboneWeights(network.state_dict(), options, network.preprocessing))
