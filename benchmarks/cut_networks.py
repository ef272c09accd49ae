"""Write docs/cut_networks.md: classifiers of torchvision and timm cut by tracing, and those that are refused.

python benchmarks/cut_networks.py
"""

import warnings
from pathlib import Path

import torch

from backbones import Backbone, create_backbone
from backbones.cut.split import layer_path
from backbones.regions import RegionPool
from backbones.summary import count_parameters, multiply_accumulates

TABLE = Path(__file__).resolve().parent.parent / "docs" / "cut_networks.md"
IMAGE, ODD_IMAGE, CROP = (224, 224), (97, 130), 14

# Small networks of each family. Its larger ones are cut in the same way.
FAMILIES = {
    "ResNet": ("torchvision/resnet18", "timm/resnet10t", "timm/resnet26d"),
    "ResNeXt": ("torchvision/resnext50_32x4d",),
    "SE-ResNet": ("timm/legacy_seresnet18", "timm/legacy_seresnext26_32x4d"),
    "ECA-ResNet": ("timm/ecaresnet26t",),
    "GC-ResNet": ("timm/gcresnext26ts",),
    "SKNet": ("timm/skresnet18",),
    "ResNeSt": ("timm/resnest14d",),
    "Res2Net": ("timm/res2net50_26w_4s",),
    "ResNet v2": ("timm/resnetv2_50",),
    "NF-Net": ("timm/nf_resnet26", "timm/eca_nfnet_l0"),
    "TResNet": ("timm/tresnet_m",),
    "RegNet": ("torchvision/regnet_x_400mf", "torchvision/regnet_y_400mf", "timm/regnetx_002"),
    "RepVGG": ("timm/repvgg_a0",),
    "MobileOne": ("timm/mobileone_s0",),
    "VGG": ("torchvision/vgg11_bn", "timm/vgg11_bn"),
    "GoogLeNet": ("torchvision/googlenet",),
    "Xception": ("timm/legacy_xception", "timm/xception41"),
    "DenseNet": ("torchvision/densenet121", "timm/densenet121"),
    "DPN": ("timm/dpn48b",),
    "VoVNet": ("timm/ese_vovnet19b_slim",),
    "HGNet": ("timm/hgnet_tiny", "timm/hgnetv2_b0"),
    "DLA": ("timm/dla34",),
    "Darknet, CSPNet": ("timm/darknet53", "timm/cspresnet50", "timm/cs3darknet_s"),
    "ShuffleNet": ("torchvision/shufflenet_v2_x0_5",),
    "MobileNet": (
        *("torchvision/mobilenet_v2", "torchvision/mobilenet_v3_small", "timm/mobilenetv3_small_050"),
        "timm/mobilenetv4_conv_small_035",
    ),
    "MNASNet": ("torchvision/mnasnet0_5", "timm/semnasnet_050"),
    "GhostNet": ("timm/ghostnet_050",),
    "EfficientNet": (
        *("torchvision/efficientnet_b0", "torchvision/efficientnet_v2_s", "timm/test_efficientnet"),
        *("timm/efficientnet_lite0", "timm/tf_efficientnetv2_b0"),
    ),
    "MixNet": ("timm/mixnet_s",),
    "FBNet": ("timm/fbnetc_100",),
    "HardCoRe-NAS": ("timm/hardcorenas_a",),
    "LCNet": ("timm/lcnet_035",),
    "ReXNet": ("timm/rexnet_100",),
    "RepViT": ("timm/repvit_m0_9",),
    "ConvNeXt": ("torchvision/convnext_tiny", "timm/convnext_atto", "timm/convnextv2_atto"),
    "InceptionNeXt": ("timm/inception_next_atto",),
    "PoolFormer": ("timm/poolformer_s12",),
    "EdgeNeXt": ("timm/edgenext_xx_small",),
    "FastViT": ("timm/fastvit_t8",),
    "StarNet": ("timm/starnet_s1",),
    "MobileViT": ("timm/mobilevit_xxs",),
    "PVT": ("timm/pvt_v2_b0",),
    "EfficientViT": ("timm/efficientvit_b0",),
}
REFUSED = (
    *("torchvision/vit_b_16", "torchvision/swin_t", "torchvision/maxvit_t", "torchvision/inception_v3"),
    *("torchvision/squeezenet1_1", "timm/hrnet_w18_small", "timm/inception_v4", "timm/mobilevitv2_050"),
    *("timm/mambaout_femto", "timm/shvit_s1", "timm/selecsls42", "timm/botnet26t_256", "timm/levit_128"),
)
HEADER = "| name | family | C4 | C5 | parameters, M | trunk, GMAC | head, GMAC | projected | trunk ends with | map |"
TEXT = f"""# Networks cut by tracing

Written by `python benchmarks/cut_networks.py`. `create_backbone(name)` builds each of them.

parameters: of trunk and head, without the layers after the last map. trunk: an image of {IMAGE[0]}x{IMAGE[1]} pixels.
head: a region of {CROP}x{CROP}. projected: the number of opening 1x1 convolutions that run on the shared map.
map: how H / 16 and W / 16 are rounded to rows and columns, up (ceil) or down (floor). "multiples of 32": the network
refuses other sizes. A detector pads its images to multiples of 32.
"""


def create(name: str) -> Backbone:
    """The backbone on the meta device. ValueError: the network cannot be cut."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return create_backbone(name).eval()


def row(name: str, family: str) -> str:
    """One line of the table, computed on the meta device."""
    backbone = create(name)
    trunk, head = backbone.trunk, backbone.roi_head
    images = torch.zeros(1, 3, *IMAGE, device="meta")
    regions = torch.zeros(1, trunk.out_channels, CROP, CROP, device="meta")
    cells = (
        *(name, family, trunk.out_channels, head.out_channels),
        f"{count_parameters(backbone) / 1e6:.3f}",
        f"{multiply_accumulates(trunk, images) / 1e9:.3f}",
        f"{multiply_accumulates(head, regions) / 1e9:.4f}",
        num_projected(backbone),
        last_layer(backbone),
        rounding(backbone),
    )
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def num_projected(backbone: Backbone) -> int:
    """How many of the 1x1 convolutions that open the head run on the shared map."""
    features = torch.zeros(1, backbone.trunk.out_channels, CROP, CROP, device="meta")
    regions = RegionPool()(features, [torch.zeros(2 * CROP, 4, device="meta")])
    with torch.no_grad():
        backbone.roi_head(regions)
    return len(regions.projected)


def last_layer(backbone: Backbone) -> str:
    """The last layer of the trunk that has weights, by its path in the uncut network."""
    keys = [key for key, _ in backbone.named_parameters() if key.startswith("trunk.")]
    return layer_path(keys[-1]).rpartition(".")[0]


def rounding(backbone: Backbone) -> str:
    """How an image's size is rounded to its map's: the last column of the table."""
    try:
        size = tuple(backbone.trunk(torch.zeros(1, 3, *ODD_IMAGE, device="meta")).shape[2:])
    except RuntimeError:
        return "multiples of 32"
    up, down = tuple(-(-s // 16) for s in ODD_IMAGE), tuple(s // 16 for s in ODD_IMAGE)
    return {up: "ceil", down: "floor"}.get(size, f"{size[0]}x{size[1]} of {ODD_IMAGE[0]}x{ODD_IMAGE[1]}")


def refusal(name: str) -> str:
    """The reason for which a network is refused. ValueError: it was cut."""
    try:
        create(name)
    except ValueError as error:
        return str(error).partition(": ")[2]
    raise ValueError(f"{name} is listed as refused, but it was cut")


def main() -> None:
    rows = [row(name, family) for family, names in FAMILIES.items() for name in names]
    refused = [f"| {name} | {refusal(name)} |" for name in REFUSED]
    head = [HEADER, "|---|---|---:|---:|---:|---:|---:|---:|---|---|"]
    second = [
        "",
        "These are refused, `NAME cannot be cut at stride 16: REASON`:",
        "",
        "| name | reason |",
        "|---|---|",
    ]
    TABLE.write_text("\n".join([TEXT, *head, *rows, *second, *refused, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
