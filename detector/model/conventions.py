"""The conventions in which torchvision and Detectron2 differ. torchvision's are the default."""

from typing import Any, Literal

from pydantic import Field, model_validator

from backbones.messages import nearest, shown

from ..settings import NotNegative, Section

# torchvision's beta of smooth L1, where the loss turns from quadratic to linear.
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
    """The details beside its layers that a detector's weights depend on. docs/conventions.md compares the values.

    A recipe names a set and may override it: `conventions: detectron2`, or `{name: detectron2, resize: torch}`.

    roi_align_aligned: RoIAlign shifts boxes by half a position, and boxes may be smaller than one position.
    roi_align_sampling_ratio: samples a bin along each axis; 0: one for each position that the bin spans.
    anchor_stride: "grid" divides the padded image's size by the map's; "fixed" is 16 pixels for every size.
    anchor_rounding: the corners of the anchors are whole pixels.
    anchor_order: order of the anchors at a position, and so of the RPN's output channels. "ratio_major" puts all
        sizes of a ratio first, "size_major" all ratios of a size.
    size_divisible: the batch's height and width are padded to a multiple of this; 1: to the largest image only.
    resize: "torch" interpolates floats; "pil" resizes uint8 and antialiases where it shrinks.
    resize_rounding: how the network's size becomes whole pixels; "nearest" rounds halves up.
    rpn_smooth_l1_beta, box_smooth_l1_beta: where the box loss turns from quadratic to linear; 0: L1.
    rpn_loss_normalizer: "sampled" divides by the anchors drawn, "batch_size" by the `rpn_batch_size_per_image`
        asked for.
    rpn_min_size: least side of a proposal, in pixels; 0 drops empty boxes only.
    box_min_size: least side of a detection, in pixels; 0 drops empty boxes only.
    rpn_rank_on: NMS ranks proposals by this. Sigmoids of large logits are equal in float32.
    """

    roi_align_aligned: bool = False
    roi_align_sampling_ratio: int = Field(2, ge=0, le=16)
    anchor_stride: Literal["grid", "fixed"] = "grid"
    anchor_rounding: bool = True
    anchor_order: Literal["ratio_major", "size_major"] = "ratio_major"
    size_divisible: int = Field(32, ge=1, le=1024)
    resize: Literal["torch", "pil"] = "torch"
    resize_rounding: Literal["floor", "nearest"] = "floor"
    rpn_smooth_l1_beta: NotNegative = STOCK_BETA
    box_smooth_l1_beta: NotNegative = STOCK_BETA
    rpn_loss_normalizer: Literal["sampled", "batch_size"] = "sampled"
    rpn_min_size: float = Field(1e-3, ge=0, le=1000)
    box_min_size: float = Field(1e-2, ge=0, le=1000)
    rpn_rank_on: Literal["sigmoid", "logits"] = "sigmoid"

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, value: Any) -> Any:
        """Replace the name of a set by its values; keys beside the name override them."""
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, dict) or "name" not in value:
            return value
        name = value["name"]
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"there are no conventions {shown(name)}; {nearest(name, list(PRESETS))}")
        return {**PRESETS[name], **{k: v for k, v in value.items() if k != "name"}}

    @model_validator(mode="after")
    def _check_stride(self) -> "Conventions":
        """Raise a ValueError if the padded size makes the "grid" stride differ from 16."""
        if self.anchor_stride == "grid" and self.size_divisible % 16:
            raise ValueError(
                f"size_divisible is {self.size_divisible} and anchor_stride is 'grid', which divides the image's size by "
                "the map's: a width of 413 gives 413 // 26 = 15 in place of 16. Accepted: a multiple of 16, or anchor_stride 'fixed'"
            )
        return self

    def __repr_args__(self) -> list[tuple[str, Any]]:
        """Show only the values that differ from torchvision's."""
        default = {name: field.default for name, field in type(self).model_fields.items()}
        return [(name, value) for name, value in self if value != default[name]]


TORCHVISION = Conventions()
DETECTRON2 = Conventions(**PRESETS["detectron2"])
