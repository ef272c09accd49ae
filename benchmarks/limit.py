"""The limit: the time of a model's multiply-accumulates at the machine's rate of matrix products."""

from collections.abc import Callable
from statistics import median

import torch

from backbones import create_backbone
from backbones.backbone import CROP
from backbones.regions import RegionPool
from backbones.summary import multiply_accumulates

from .models import stock_detector
from .settings import DTYPES, Settings, Size
from .timing import Seconds, Stopwatch, Times

# So many that projecting the map once is less work, at any image size.
MANY_REGIONS = 4000


def matrix_call(watch: Stopwatch, settings: Settings, dtype: str) -> Callable[[], Seconds]:
    """A call that times a product of matrix_size^3 multiply-accumulates: the median of three."""
    shape, options = (settings.matrix_size,) * 2, {"dtype": DTYPES[dtype], "device": settings.device}
    a, b = torch.randn(shape, **options), torch.randn(shape, **options)
    return lambda: {"total": median(watch.time(lambda: a @ b)["total"] for _ in range(3))}


def count_macs(settings: Settings, size: Size) -> dict[str, int]:
    """Multiply-accumulates per image (trunk, rpn, projection) and per region (head, projected_head).

    trunk, rpn, head: of the stock network. projection: of the head's opening 1x1 convolutions, run once on the map.
    projected_head: of the rest of the head.
    """
    with torch.device("meta"):
        stock = stock_detector(settings, None, frozen=False)
        channels = stock.backbone.out_channels
        height, width = (-(-s // 32) * 32 for s in size)
        image, features = (
            torch.zeros(1, 3, height, width),
            torch.zeros(1, channels, height // 16, width // 16),
        )
        counts = {
            "trunk": multiply_accumulates(stock.backbone, image),
            "rpn": multiply_accumulates(stock.rpn.head, [features]),
            "head": multiply_accumulates(stock.roi_heads.box_head, torch.zeros(1, channels, CROP, CROP)),
        }
        head, boxes = create_backbone(settings.backbone).roi_head.eval(), torch.zeros(2 * MANY_REGIONS, 4)
        with torch.no_grad():
            once, twice = (
                multiply_accumulates(head, RegionPool()(features, [boxes[: k * MANY_REGIONS]]))
                for k in (1, 2)
            )
    counts["projected_head"] = (twice - once) // MANY_REGIONS
    return {**counts, "projection": 2 * once - twice}


def over_limit(
    times: Times, macs: dict[str, int], rates: dict[str, float], settings: Settings, regions: int
) -> dict[str, dict[str, float]]:
    """The time of trunk and head, divided by the time of their multiply-accumulates at the machine's rate.

    For our head, the multiply-accumulates are those of projected_head, without the projection.
    """
    result = {}
    for form, parts in times.items():
        rate = rates[settings.dtype_of(form)]
        head = macs["head" if form.startswith(("stock", "detectron2")) else "projected_head"]
        limits = {"trunk": settings.batch * macs["trunk"] / rate, "head": regions * head / rate}
        result[form] = {part: parts[part]["median"] / limit for part, limit in limits.items()}
    return result
