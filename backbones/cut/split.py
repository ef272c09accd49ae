"""Cut a convolutional classifier in two by tracing it: `cut_network(network)` is a Backbone on the same parameters.

The trunk ends at the last block boundary of stride 16 through which all data flow. The head ends at the last map of
stride 32 through which all data flow, before pooling.

Letters: N images, R regions, C4 and C5 channels of the two maps.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import fx, nn

from ..backbone import CROP, NUM_TRUNK_STAGES, Backbone, Preprocessing, RoIHead, Trunk
from ..messages import first_line
from .block import Block, is_batch_norm
from .tracing import MapSizes, data_flow, node_paths, output_node, subgraph, trace, waists, writes_into

Sizes = dict[fx.Node, tuple[int, ...]]
Paths = dict[fx.Node, tuple[str, ...]]
STRIDES = (2, 4, 8, 16, 32)
# (height, width) of trial images in pixels, multiples of 32 as detectors pad to. Height and width differ, so that no
# map (N, H, W, C) passes for (N, C, H, W). The second size refuses a trace that holds at the first size only.
IMAGE, OTHER_IMAGE = (128, 192), (96, 160)


class _Refusal(Exception):
    """The reason why a network cannot be cut, as the end of a sentence."""


@dataclass(frozen=True)
class Waist:
    """A map through which all data of a network flow.

    place: index of the map's node in `data_flow`.
    after: path of the largest module that the map ends, "layer3".
    open_blocks: number of modules, other than sequences, that go on behind the map; 0 between blocks.
    ends_block: whether the module `after` has layers within, as a residual block has, and the map is not a convolution
        whose norm follows.
    layer: the layer that makes the map: "conv", "norm", "activation", or "" for another kind.
    """

    place: int
    after: str
    stride: int
    channels: int
    open_blocks: int
    ends_block: bool
    layer: str


def cut_network(network: nn.Module, name: str, preprocessing: Preprocessing | None = None) -> Backbone:
    """A backbone from the network's layers up to its last map, on the network's own parameters.

    trunk: (N, 3, H, W) -> (N, C4, H/16, W/16) for multiples of 32. roi_head: (R, C4, 14, 14) -> (R, C5).
    A network that cannot be cut is a ValueError that says why.
    """
    try:
        return _cut(network, name, preprocessing)
    except _Refusal as reason:
        raise ValueError(f"{name} cannot be cut at stride 16: {reason}") from reason.__cause__


def layer_path(key: str) -> str:
    """The uncut network's key for a key of ours: "trunk.stage4.0.layer3.0.conv1.weight" -> "layer3.0.conv1.weight"."""
    return re.sub(r"^(trunk\.stage\d|roi_head\.stage5)\.\d+\.", "", key)


def _cut(network: nn.Module, name: str, preprocessing: Preprocessing | None) -> Backbone:
    """`cut_network`, with a `_Refusal` in place of its ValueError."""
    try:
        graphs = trace(network)
    except Exception as error:
        raise _Refusal(f"torch.fx cannot trace it ({first_line(error)})") from error
    sizes = _map_sizes(network, graphs[False])
    stages = _plan(_find_waists(network, graphs[False], sizes), network, graphs[False])
    _check_rest(network, graphs[False], sizes, stages[-1][-1])
    blocks = iter(_make_blocks(network, graphs, [waist for stage in stages for waist in stage]))
    modules = [nn.Sequential(*(next(blocks) for _ in stage)) for stage in stages]
    trunk = Trunk(modules[:NUM_TRUNK_STAGES], out_channels=stages[-2][-1].channels)
    backbone = Backbone(name, trunk, RoIHead(modules[-1], stages[-1][-1].channels), preprocessing)
    _check_sizes(backbone)
    return backbone.train(network.training)


def _zeros(module: nn.Module, *size: int) -> torch.Tensor:
    """Zeros of this size, on the device and in the dtype of the module's first parameter."""
    like = next(module.parameters())
    return torch.zeros(size, device=like.device, dtype=like.dtype)


# ---- where to cut


def _find_waists(network: nn.Module, graph: fx.Graph, sizes: Sizes) -> list[Waist]:
    """The maps (N, C, H/s, W/s), s in STRIDES, through which all data flow, in order."""
    flow, paths = data_flow(graph, output_node(graph)), node_paths(graph)
    place = {node: i for i, node in enumerate(flow)}
    found = []
    for node in waists(flow):
        stride = _stride(sizes.get(node))
        if not stride or any(writes_into(user, node, network) for user in node.users):
            continue
        following = flow[place[node] + 1]
        shared = _shared_modules(paths[node], paths[following])
        after = ".".join(paths[node][: shared + 1])
        # A module that is called again later does not end here.
        if _last_node_of(after, paths) is not node:
            continue
        kinds = _kind(network, node), _kind(network, following)
        around = [network.get_submodule(".".join(paths[node][:k])) for k in range(1, shared + 1)]
        found.append(
            Waist(
                place[node],
                after,
                stride,
                channels=sizes[node][1],
                open_blocks=sum(not isinstance(module, nn.Sequential) for module in around),
                ends_block=shared + 1 < len(paths[node]) and kinds != ("conv", "norm"),
                layer=kinds[0],
            )
        )
    if not any(w.stride == 16 for w in found):
        raise _Refusal(_why_not_16(flow, sizes, paths))
    return found


def _shared_modules(path: tuple[str, ...], following: tuple[str, ...]) -> int:
    """The number of modules in the tree that hold both nodes."""
    most = min(len(path), len(following)) - 1
    return next((k for k in range(most) if path[k] != following[k]), most)


def _kind(network: nn.Module, node: fx.Node) -> str:
    """The kind of layer that a node calls, as in `Waist.layer`."""
    layer = network.get_submodule(node.target) if node.op == "call_module" else None
    if layer is not None and (isinstance(layer, (nn.LayerNorm, nn.GroupNorm)) or is_batch_norm(layer)):
        return "norm"
    if type(layer).__module__ == "torch.nn.modules.activation":
        return "activation"
    return "conv" if isinstance(layer, nn.Conv2d) else ""


def _map_sizes(network: nn.Module, graph: fx.Graph) -> Sizes:
    """The shape of each tensor in evaluation mode, for one image of `IMAGE` pixels."""
    was_training = network.training
    images = _zeros(network, 1, 3, *IMAGE)
    try:
        return MapSizes(network.eval(), graph=graph).of(images)
    except Exception as error:
        height, width = IMAGE
        reason = first_line(_error_of(network, images) or error)
        raise _Refusal(f"it does not take images of any size, {height}x{width} for one ({reason})") from error
    finally:
        network.train(was_training)


@torch.no_grad()
def _error_of(network: nn.Module, images: torch.Tensor) -> Exception | None:
    """The error that the untraced network raises for images (N, 3, H, W), or None.

    A trace's own message would hold symbols.
    """
    try:
        network(images)
    except Exception as error:
        return error
    return None


def _stride(size: tuple[int, ...] | None) -> int | None:
    """The stride s of a map (N, C, H/s, W/s) of the trial image, or None for any other shape."""
    if size is None or len(size) != 4:
        return None
    return next((s for s in STRIDES if size[2:] == (IMAGE[0] // s, IMAGE[1] // s)), None)


def _why_not_16(flow: list[fx.Node], sizes: Sizes, paths: Paths) -> str:
    """Why no map of stride 16 fits: there is none, a tensor bypasses the last, or each is changed in place."""
    at_16 = [i for i, node in enumerate(flow) if _stride(sizes.get(node)) == 16]
    if not at_16:
        return "none of its tensors is a map (N, C, H/16, W/16)"
    place = {node: i for i, node in enumerate(flow)}
    for node in flow[: at_16[-1]]:
        for user in node.users:
            if place.get(user, 0) > at_16[-1]:
                around, into = ".".join(paths[node]), ".".join(paths[user])
                return (
                    f"a tensor bypasses every map of stride 16: around the last, {'.'.join(paths[flow[at_16[-1]]])}, "
                    f"goes {around} into {into}"
                )
    return "every map of stride 16 is changed in place by what follows"


def _plan(found: list[Waist], network: nn.Module, graph: fx.Graph) -> list[list[Waist]]:
    """The waists that end the blocks of stages 1-5, one list per stage. A stage without a waist of its own is empty."""
    at_32 = [w for w in found if w.stride == 32]
    if not at_32:
        strides = ", ".join(str(s) for s in sorted({w.stride for w in found}))
        raise _Refusal(
            f"no map of stride 32 holds all data, and stage 5 ends with one (strides found: {strides})"
        )
    end = at_32[-1]
    boundary = _last_between_blocks([w for w in found if w.stride == 16 and w.place < end.place])
    if not _has_parameters(network, graph, boundary.place, end.place):
        # VGG runs conv5_x at stride 16. A cut at the first map of stride 16 leaves conv5_x to the head.
        boundary = next(w for w in found if w.stride == 16)
    boundary = _past_norm(found, boundary)
    ends = [_last_between_blocks([w for w in found if w.stride == s]) for s in STRIDES[:3]] + [boundary, end]
    stages, start = [], -1
    for stage_end in ends:
        stop = stage_end.place if stage_end else start
        stages.append([w for w in found if start < w.place <= stop and (w.ends_block or w.place == stop)])
        start = max(start, stop)
    return stages


def _past_norm(found: list[Waist], boundary: Waist) -> Waist:
    """The cut, moved behind a norm and activation that follow it, so that the RPN reads normalised features."""
    place = {w.place: w for w in found if w.stride == boundary.stride}
    kinds = ["norm"]
    while (following := place.get(boundary.place + 1)) and following.layer in kinds:
        boundary, kinds = following, ["activation"]
    return boundary


def _last_between_blocks(candidates: list[Waist]) -> Waist | None:
    """The last waist with the fewest blocks open around it."""
    return min(candidates, key=lambda w: (w.open_blocks, -w.place), default=None)


def _has_parameters(network: nn.Module, graph: fx.Graph, start: int, stop: int) -> bool:
    """Whether a layer behind place `start`, up to `stop`, has parameters."""
    nodes = data_flow(graph, output_node(graph))[start + 1 : stop + 1]
    return any(True for node in nodes for _ in _parameters(network, node))


def _parameters(network: nn.Module, node: fx.Node) -> Iterator[nn.Parameter]:
    return network.get_submodule(node.target).parameters() if node.op == "call_module" else iter(())


def _check_rest(network: nn.Module, graph: fx.Graph, sizes: Sizes, end: Waist) -> None:
    """Refuse to drop layers with parameters that still make maps or tokens. Pooling and a classifier may be dropped."""
    for node in data_flow(graph, output_node(graph))[end.place + 1 :]:
        size = sizes.get(node, ())
        has_positions = len(size) == 3 or (len(size) == 4 and size[2:] != (1, 1) and size[1:3] != (1, 1))
        if has_positions and node.op == "call_module" and any(True for _ in _parameters(network, node)):
            raise _Refusal(
                f"behind its last map of stride 32, of {end.after}, the layer {node.target} still makes {size}"
            )


# ---- the pieces


def _make_blocks(network: nn.Module, graphs: dict[bool, fx.Graph], ends: list[Waist]) -> list[Block]:
    """The network between each two of `ends`, in both modes."""
    pieces = {mode: _pieces(graph, [w.after for w in ends], mode) for mode, graph in graphs.items()}
    return [
        Block(network, {True: train, False: evaluate})
        for train, evaluate in zip(pieces[True], pieces[False], strict=True)
    ]


def _pieces(graph: fx.Graph, ends: list[str], training: bool) -> list[fx.Graph]:
    """The graphs between each two of the modules `ends`, the first from the image."""
    paths = node_paths(graph)
    nodes = [_last_node_of(end, paths) for end in ends]
    flow = data_flow(graph, nodes[-1])
    narrow = set(waists(flow))
    if not narrow.issuperset(nodes):
        mode = "training" if training else "evaluation"
        around = next(end for end, node in zip(ends, nodes, strict=True) if node not in narrow)
        raise _Refusal(f"in {mode} a tensor bypasses {around}")
    place = {node: i for i, node in enumerate(flow)}
    return [
        subgraph(graph, flow[place[start] + 1 : place[stop] + 1], start)
        for start, stop in pairwise([flow[0], *nodes])
    ]


def _last_node_of(module: str, paths: dict[fx.Node, tuple[str, ...]]) -> fx.Node | None:
    """The node that gives a module's output, or None."""
    parts = tuple(module.split("."))
    return next((node for node, path in reversed(paths.items()) if path[: len(parts)] == parts), None)


@torch.no_grad()
def _check_sizes(backbone: Backbone) -> None:
    """Refuse a trunk that holds for one image size only, and a head that does not make 7x7 maps of 14x14 regions."""
    backbone.eval()
    height, width = OTHER_IMAGE
    trunk, stage5 = backbone.trunk, backbone.roi_head.stage5
    _expect(trunk, (1, 3, height, width), (1, trunk.out_channels, height // 16, width // 16), "its trunk")
    half = CROP // 2
    wanted = (2, backbone.roi_head.out_channels, half, half)
    _expect(stage5, (2, trunk.out_channels, CROP, CROP), wanted, "its stage 5")


def _expect(module: nn.Module, size: tuple[int, ...], wanted: tuple[int, ...], what: str) -> None:
    """Refuse a module that does not turn a tensor of shape `size` into one of shape `wanted`."""
    try:
        given = tuple(module(_zeros(module, *size)).shape)
    except Exception as error:
        raise _Refusal(f"{what} does not take {size} ({first_line(error)})") from error
    if given != wanted:
        raise _Refusal(f"{what} makes {given} of {size}, wanted {wanted}")
