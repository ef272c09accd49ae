"""The conventions in which detectors of one paper differ: torchvision's by default, Detectron2's by name."""

from typing import Any, Literal

from pydantic import Field, model_validator

from backbones.messages import nearest

from ..settings import NotNegative, Section

# Smooth L1 turns from quadratic to linear here in torchvision.
STOCK_BETA = 1 / 9

PRESETS: dict[str, dict[str, Any]] = {
    "torchvision": {},
    "detectron2": {
        "roi_align_aligned": True,
        "roi_align_sampling_ratio": 0,
        "anchor_stride": "fixed",
        "anchor_rounding": False,
        "anchor_order": "size_major",
        "size_divisible": 1,
        "resize": "pil",
        "resize_rounding": "nearest",
        "rpn_smooth_l1_beta": 0.0,
        "box_smooth_l1_beta": 0.0,
        "rpn_loss_normalizer": "batch_size",
        "rpn_min_size": 0.0,
        "box_min_size": 0.0,
        "rpn_rank_on": "logits",
    },
}


class Conventions(Section):
    """What weights expect of the detector around them, beside its layers. docs/conventions.md compares the values.

    A recipe names a set and may override it: `conventions: detectron2`, or `{name: detectron2, resize: torch}`.

    roi_align_aligned: RoIAlign shifts boxes by half a position and sets no least size of one position.
    roi_align_sampling_ratio: samples of a bin along each axis; 0: one for each position that the bin spans.
    anchor_stride: "grid" divides the padded image's size by the map's; "fixed" is 16 pixels for every size.
    anchor_rounding: the corners of the anchors are whole pixels.
    anchor_order: the anchors of a position, and so the RPN's channels: all sizes of a ratio first, or the reverse.
    size_divisible: the batch's height and width are padded to a multiple of this; 1: to the largest image only.
    resize: "torch" interpolates floats; "pil" resizes uint8 and antialiases where it shrinks.
    resize_rounding: how the network's size becomes whole pixels; "nearest" rounds halves up.
    rpn_smooth_l1_beta, box_smooth_l1_beta: where the box loss turns from quadratic to linear; 0: L1.
    rpn_loss_normalizer: "sampled" divides by the anchors drawn, "batch_size" by those asked for (256 an image).
    rpn_min_size, box_min_size: least side in pixels of a proposal, of a detection; 0 drops empty boxes only.
    rpn_rank_on: NMS ranks proposals by this. Sigmoids of large logits are equal in float32.
    """

    roi_align_aligned: bool = False
    roi_align_sampling_ratio: int = Field(2, ge=0)
    anchor_stride: Literal["grid", "fixed"] = "grid"
    anchor_rounding: bool = True
    anchor_order: Literal["ratio_major", "size_major"] = "ratio_major"
    size_divisible: int = Field(32, ge=1)
    resize: Literal["torch", "pil"] = "torch"
    resize_rounding: Literal["floor", "nearest"] = "floor"
    rpn_smooth_l1_beta: NotNegative = STOCK_BETA
    box_smooth_l1_beta: NotNegative = STOCK_BETA
    rpn_loss_normalizer: Literal["sampled", "batch_size"] = "sampled"
    rpn_min_size: NotNegative = 1e-3
    box_min_size: NotNegative = 1e-2
    rpn_rank_on: Literal["sigmoid", "logits"] = "sigmoid"

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, value: Any) -> Any:
        """Replace a name, alone or beside overrides, by its values."""
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, dict) or "name" not in value:
            return value
        name = value["name"]
        if name not in PRESETS:
            raise ValueError(f"there are no conventions {name!r}; {nearest(name, list(PRESETS))}")
        return {**PRESETS[name], **{k: v for k, v in value.items() if k != "name"}}

    @model_validator(mode="after")
    def _check_stride(self) -> "Conventions":
        if self.anchor_stride == "grid" and self.size_divisible % 16:
            raise ValueError(
                f"size_divisible is {self.size_divisible} and anchor_stride is 'grid', which divides the image's size by "
                "the map's: a width of 413 gives 413 // 26 = 15 in place of 16. Accepted: a multiple of 16, or anchor_stride 'fixed'"
            )
        return self

    def __repr_args__(self) -> list[tuple[str, Any]]:
        """Only what differs from torchvision's."""
        default = {name: field.default for name, field in type(self).model_fields.items()}
        return [(name, value) for name, value in self if value != default[name]]


TORCHVISION = Conventions()
DETECTRON2 = Conventions(**PRESETS["detectron2"])
