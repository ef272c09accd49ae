"""A network as a graph of its layers: torch.fx runs `forward` once on symbols and records the calls."""

import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator

import torch
import torchvision
from torch import Tensor, fx, nn
from torchvision.ops import FrozenBatchNorm2d, StochasticDepth

_NOT_LAYERS = ("torch.nn.modules.container", "torch.nn.modules.module")
_Path = tuple[str, ...]


class LayerTracer(fx.Tracer):
    """Records a network as calls of its layers.

    Layers are modules of torch.nn (no containers) and their subclasses, torchvision's `FrozenBatchNorm2d` and
    `StochasticDepth`, and the modules that timm asks not to trace.
    """

    def __init__(self) -> None:
        modules, functions = _opaque_in_timm()
        self._opaque = (FrozenBatchNorm2d, StochasticDepth, *modules)
        super().__init__(autowrap_modules=(math, torchvision.ops), autowrap_functions=tuple(functions))

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        """Whether to record the call of `module`, and not the calls within."""
        return isinstance(module, self._opaque) or any(
            base.__module__.startswith("torch.nn.modules.") and base.__module__ not in _NOT_LAYERS
            for base in type(module).__mro__
        )


def _opaque_in_timm() -> tuple[list[type[nn.Module]], list[Callable]]:
    """timm's lists of modules and functions that must not be traced; empty lists where timm is not imported."""
    if "timm" not in sys.modules:
        return [], []
    from timm.layers import get_notrace_functions, get_notrace_modules

    return get_notrace_modules(), get_notrace_functions()


def trace(network: nn.Module) -> dict[bool, fx.Graph]:
    """The graphs for training (True) and evaluation (False); a trace fixes `self.training`."""
    was_training = network.training
    graphs = {mode: LayerTracer().trace(network.train(mode)) for mode in (True, False)}
    network.train(was_training)
    return graphs


def node_paths(graph: fx.Graph) -> dict[fx.Node, _Path]:
    """The place of each node in the tree of modules.

    A layer is ("layer1", "0", "conv1"), an operation ("layer1", "0", "add_1"). Operations are counted within their
    module, so that the graphs of both modes give them the same path.
    """
    counts: Counter[tuple[_Path, str]] = Counter()
    paths = {}
    for node in graph.nodes:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        path = tuple(stack[-1][0].split(".")) if stack else ()
        if node.op != "call_module":
            name = re.sub(r"_\d+$", "", node.name)
            counts[path, name] += 1
            path = (*path, f"{name}_{counts[path, name]}")
        paths[node] = path
    return paths


def output_node(graph: fx.Graph) -> fx.Node:
    """The last node of a graph, its output."""
    return next(iter(reversed(graph.nodes)))


def data_flow(graph: fx.Graph, end: fx.Node) -> list[fx.Node]:
    """The nodes, in order, that carry data from the image to `end`, plus the nodes that modify those in place."""
    image = next(iter(graph.nodes))
    from_image, needed = {image}, {end}
    for node in graph.nodes:
        if from_image.intersection(node.all_input_nodes):
            from_image.add(node)
    for node in reversed(graph.nodes):
        if node in needed or (works_in_place(node) and node.args[0] in needed):
            needed.add(node)
            needed.update(node.all_input_nodes)
    return [node for node in graph.nodes if node in from_image and node in needed]


def waists(nodes: list[fx.Node]) -> Iterator[fx.Node]:
    """The nodes through which all data flow: no node behind them reads a value from before them."""
    position = {node: i for i, node in enumerate(nodes)}
    last_use = 0
    for i, node in enumerate(nodes):
        if last_use <= i:
            yield node
        last_use = max([last_use, *(position[user] for user in node.users if user in position)])


def writes_into(user: fx.Node, value: fx.Node, network: nn.Module) -> bool:
    """Whether `user` modifies `value` in place."""
    if not user.args or user.args[0] is not value:
        return False
    if user.op == "call_module":
        return bool(getattr(network.get_submodule(user.target), "inplace", False))
    return works_in_place(user)


def works_in_place(node: fx.Node) -> bool:
    """Whether a function or method modifies its first argument, as `x.mul_(2)` does."""
    if node.op not in ("call_function", "call_method") or not node.args:
        return False
    name = node.target if isinstance(node.target, str) else node.target.__name__
    return (
        bool(node.kwargs.get("inplace")) or name.endswith("_") or name in ("iadd", "isub", "imul", "setitem")
    )


class MapSizes(fx.Interpreter):
    """Runs a graph and keeps the shape of every tensor: `MapSizes(network, graph=graph).of(images)`."""

    def run_node(self, node: fx.Node) -> object:
        value = super().run_node(node)
        if isinstance(value, Tensor):
            self.sizes[node] = tuple(value.shape)
        return value

    @torch.no_grad()
    def of(self, images: Tensor) -> dict[fx.Node, tuple[int, ...]]:
        """(N, 3, H, W) -> the shape of each tensor, by its node."""
        self.sizes: dict[fx.Node, tuple[int, ...]] = {}
        self.run(images)
        return self.sizes


def subgraph(graph: fx.Graph, nodes: list[fx.Node], start: fx.Node) -> fx.Graph:
    """The graph that computes the last of `nodes` from the value of `start`. Constants are copied as needed."""
    piece = fx.Graph()
    copies = {start: piece.placeholder("features")}

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:
            for needed in node.all_input_nodes:
                copied(needed)
            copies[node] = piece.node_copy(node, copies.__getitem__)
        return copies[node]

    for node in nodes:
        copied(node)
    piece.output(copies[nodes[-1]])
    return piece
