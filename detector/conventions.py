"""The conventions in which detectors of one paper differ: torchvision's are the defaults, Detectron2's the others."""

from dataclasses import dataclass

from backbones.backbone import nearest

STOCK_BETA = 1 / 9  # where torchvision's smooth L1 losses turn from quadratic to linear

_CHOICES = {
    "anchor_stride": ("grid", "fixed"),
    "anchor_order": ("ratio_major", "size_major"),
    "resize": ("torch", "pil"),
    "resize_rounding": ("floor", "nearest"),
    "rpn_loss_normalizer": ("sampled", "batch_size"),
    "rpn_rank_on": ("sigmoid", "logits"),
}
_NOT_NEGATIVE = (
    "roi_align_sampling_ratio",
    "rpn_smooth_l1_beta",
    "box_smooth_l1_beta",
    "rpn_min_size",
    "box_min_size",
)


@dataclass(frozen=True, kw_only=True)
class Conventions:
    """What weights expect of the detector around them, beside its layers; docs/conventions.md compares the values.

    roi_align_aligned: boxes shifted by half a position, and no least size of one position.
    roi_align_sampling_ratio: samples a bin along each axis; 0: as many as positions that the bin spans.
    anchor_stride: "grid", the padded image's size // the map's, or "fixed", 16 pixels whatever the sizes.
    anchor_rounding: corners of the anchors at whole pixels.
    anchor_order: of the anchors at a position and of the RPN's channels: for each ratio each size, or the reverse.
    size_divisible: height and width of a batch are padded to a multiple of it; 1: to the largest only.
    resize: "torch" interpolates floats, "pil" is PIL's on uint8, which antialiases where it shrinks.
    resize_rounding: of the network's size to whole pixels; "nearest" takes halves up.
    rpn_smooth_l1_beta, box_smooth_l1_beta: where the loss turns from quadratic to linear; 0: L1.
    rpn_loss_normalizer: "sampled" divides by the anchors drawn, "batch_size" by those asked for (256 an image).
    rpn_min_size, box_min_size: pixels of the least side of a proposal, of a detection; 0: only empty boxes are dropped.
    rpn_rank_on: what NMS ranks proposals by; sigmoids of large logits are equal in float32.
    """

    roi_align_aligned: bool = False
    roi_align_sampling_ratio: int = 2
    anchor_stride: str = "grid"
    anchor_rounding: bool = True
    anchor_order: str = "ratio_major"
    size_divisible: int = 32
    resize: str = "torch"
    resize_rounding: str = "floor"
    rpn_smooth_l1_beta: float = STOCK_BETA
    box_smooth_l1_beta: float = STOCK_BETA
    rpn_loss_normalizer: str = "sampled"
    rpn_min_size: float = 1e-3
    box_min_size: float = 1e-2
    rpn_rank_on: str = "sigmoid"

    def __post_init__(self) -> None:
        for name, accepted in _CHOICES.items():
            value = getattr(self, name)
            if value not in accepted:
                raise ValueError(f"{name} is {value!r}; {nearest(value, accepted)}")
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}; accepted: 0 or more")
        if self.size_divisible < 1:
            raise ValueError(f"size_divisible is {self.size_divisible!r}; accepted: 1 or more")
        if self.anchor_stride == "grid" and self.size_divisible % 16:
            raise ValueError(
                f"size_divisible is {self.size_divisible} and anchor_stride 'grid', which divides the image by the map: a "
                "width of 413 would make 413 // 26 = 15 of the stride 16. Accepted: a multiple of 16, or anchor_stride 'fixed'"
            )


DETECTRON2 = Conventions(
    roi_align_aligned=True,
    roi_align_sampling_ratio=0,
    anchor_stride="fixed",
    anchor_rounding=False,
    anchor_order="size_major",
    size_divisible=1,
    resize="pil",
    resize_rounding="nearest",
    rpn_smooth_l1_beta=0.0,
    box_smooth_l1_beta=0.0,
    rpn_loss_normalizer="batch_size",
    rpn_min_size=0.0,
    box_min_size=0.0,
    rpn_rank_on="logits",
)
