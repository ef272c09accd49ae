"""A part of a network's graph as a module."""

from collections import Counter
from collections.abc import Callable, Iterator

from torch import Tensor, fx, nn
from torchvision.ops import FrozenBatchNorm2d


class Block(nn.Module):
    """The part of a network between two of its waists: (N, C, H, W) -> (N, C', H', W').

    It owns the layers of that part, under their paths in the network. `conv_norms` lists the paths of each convolution
    and the batch norm behind it, which `fuse` folds.
    """

    def __init__(self, network: nn.Module, graphs: dict[bool, fx.Graph]) -> None:
        super().__init__()
        for op in ("call_module", "get_attr"):
            for graph in graphs.values():
                for node in graph.nodes:
                    if node.op == op:
                        self._adopt(network, node.target)
        self.conv_norms = tuple(_conv_norms(graphs[False], self))
        self._forwards = {mode: self._compiled(graph) for mode, graph in graphs.items()}

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')"""
        return self._forwards[self.training](self, features)

    def _adopt(self, network: nn.Module, path: str) -> None:
        """Own the layer, parameter or buffer that `network` has at `path`, at the same path."""
        source, owner = network, self
        *parents, name = path.split(".")
        for parent in parents:
            source = getattr(source, parent)
            if not hasattr(owner, parent):
                owner.add_module(parent, nn.Module())
            owner = getattr(owner, parent)
        value = getattr(source, name)
        if hasattr(owner, name):
            return
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            kept = name in source._buffers and name not in source._non_persistent_buffers_set
            owner.register_buffer(name, value, persistent=kept)
        else:
            setattr(owner, name, value)

    def _compiled(self, graph: fx.Graph) -> Callable:
        """The graph as a function of two arguments: the module that owns the layers, and the input."""
        return type(fx.GraphModule(self, graph)).forward


def _conv_norms(graph: fx.Graph, owner: nn.Module) -> Iterator[tuple[str, str]]:
    """Paths (convolution, batch norm) where only the norm reads the convolution.

    A layer that is called twice is left out.
    """
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in graph.nodes:
        if node.op != "call_module" or not is_batch_norm(owner.get_submodule(node.target)):
            continue
        before = node.all_input_nodes[0]
        if (
            before.op == "call_module"
            and type(owner.get_submodule(before.target)) is nn.Conv2d
            and len(before.users) == calls[before.target] == calls[node.target] == 1
        ):
            yield before.target, node.target


def is_batch_norm(layer: nn.Module) -> bool:
    """Whether a layer is a batch norm: frozen or not, and with or without timm's activation inside."""
    return isinstance(layer, (nn.BatchNorm2d, FrozenBatchNorm2d))
