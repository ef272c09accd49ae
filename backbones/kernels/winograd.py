"""3x3 convolutions of small maps as Winograd products, where those are faster."""

import time

import torch
from torch import Tensor, nn

# Winograd's F(4x4, 3x3) (Lavin & Gray 2015, arXiv 1509.09308): y = A' [(G g G') * (B' d B)] A for 6x6 input tiles d.
_INPUT = ((4, 0, -5, 0, 1, 0), (0, -4, -4, 1, 1, 0), (0, 4, -4, -1, 1, 0), (0, -2, -1, 2, 1, 0), (0, 2, -1, -2, 1, 0), (0, 4, 0, -5, 0, 1))  # fmt: skip
_KERNEL = ((1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6), (1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6), (0, 0, 1))  # fmt: skip
_OUTPUT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))
_TILE = 4


class WinogradConv2d(nn.Module):
    """A 3x3 convolution of stride 1 and padding 1 on maps of one small size, as 36 matrix products.

    2x2 tiles of 4x4 outputs cover the 7x7 crops of a RoI head. That takes 36 * 4 / (9 * 49), or a third, of the
    multiplications. One matrix transforms the input of all tiles, T_in (144, 49), one the output, T_out (49, 144).
    """

    def __init__(self, conv: nn.Conv2d, size: int = 7) -> None:
        super().__init__()
        tiles = -(-size // _TILE)
        to_tiles, from_tiles = _transforms(size, tiles)
        kernel = torch.tensor(_KERNEL, dtype=torch.float64)
        products = torch.einsum("ia,ocab,jb->ijco", kernel, conv.weight.double().cpu(), kernel).flatten(0, 1)
        self.size, self.num_tiles = size, tiles * tiles
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        for name, value in (("to_tiles", to_tiles), ("from_tiles", from_tiles), ("products", products)):
            self.register_buffer(name, value.to(conv.weight), persistent=False)
        self.register_buffer("weight", conv.weight.detach(), persistent=False)
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        """(R, C, 7, 7) channels-last -> (R, C', 7, 7) channels-last; a map of another size runs as a convolution."""
        if x.shape[-2:] != (self.size, self.size):
            return nn.functional.conv2d(x, self.weight, self.bias, padding=1)
        num_regions, bins = len(x), self.size * self.size
        by_bin = x.permute(2, 3, 0, 1).reshape(bins, num_regions * self.in_channels)
        tiles = (self.to_tiles @ by_bin).view(36, self.num_tiles * num_regions, self.in_channels)
        multiplied = torch.bmm(tiles, self.products).view(
            36 * self.num_tiles, num_regions * self.out_channels
        )
        y = (self.from_tiles @ multiplied).view(self.size, self.size, num_regions, self.out_channels)
        y = y.permute(2, 0, 1, 3).contiguous()
        if self.bias is not None:
            y += self.bias
        return y.permute(0, 3, 1, 2)


def _transforms(size: int, tiles: int) -> tuple[Tensor, Tensor]:
    """T_in (36 * tiles^2, size^2) and T_out (size^2, 36 * tiles^2), Kronecker products of the two axes' transforms."""
    # to_axis: element of the tile, tile, position. from_axis: position, element of the tile, tile.
    to_axis = torch.zeros(6, tiles, size, dtype=torch.float64)
    from_axis = torch.zeros(size, 6, tiles, dtype=torch.float64)
    for tile in range(tiles):
        for k in range(6):
            position = tile * _TILE + k - 1
            if 0 <= position < size:
                to_axis[:, tile, position] += torch.tensor(_INPUT, dtype=torch.float64)[:, k]
        for k in range(min(_TILE, size - tile * _TILE)):
            from_axis[tile * _TILE + k, :, tile] = torch.tensor(_OUTPUT, dtype=torch.float64)[k]
    to_tiles = torch.einsum("aip,bjq->abijpq", to_axis, to_axis).reshape(36 * tiles**2, size**2)
    from_tiles = torch.einsum("pai,qbj->pqabij", from_axis, from_axis).reshape(size**2, 36 * tiles**2)
    return to_tiles, from_tiles


def use_winograd(stage5: nn.Module, num_regions: int = 64, size: int = 7) -> int:
    """Replace 3x3 convolutions of `stage5` by Winograd's where those measure faster on `size` x `size` maps.

    Each pair of channel numbers is timed once, on the device and in the dtype of the weights. Returns the number of
    replaced convolutions.
    """
    faster: dict[tuple[int, int], bool] = {}
    replaced = 0
    for parent in list(stage5.modules()):
        for name, conv in list(parent._modules.items()):
            if not _fits(conv):
                continue
            shape = conv.in_channels, conv.out_channels
            winograd = WinogradConv2d(conv, size)
            if shape not in faster:
                faster[shape] = _time(winograd, conv, num_regions, size) < 0.95
            if faster[shape]:
                setattr(parent, name, winograd)
                replaced += 1
    return replaced


def _fits(layer: nn.Module | None) -> bool:
    """Whether a layer is a plain 3x3 convolution with stride 1 and padding 1."""
    return (
        type(layer) is nn.Conv2d
        and layer.kernel_size == (3, 3)
        and layer.stride == (1, 1)
        and layer.padding == (1, 1)
        and layer.dilation == (1, 1)
        and layer.groups == 1
    )


@torch.no_grad()
def _time(winograd: nn.Module, conv: nn.Conv2d, num_regions: int, size: int) -> float:
    """The Winograd form's time over the convolution's, each the best of three alternating runs."""
    x = torch.randn(num_regions, conv.in_channels, size, size).to(conv.weight)
    x = x.contiguous(memory_format=torch.channels_last)
    best = [float("inf"), float("inf")]
    for repeat in range(4):
        for i, layer in enumerate((winograd, conv)):
            started = time.perf_counter()
            layer(x)
            if x.is_cuda:
                torch.cuda.synchronize()
            # The first run is a warm-up.
            if repeat:
                best[i] = min(best[i], time.perf_counter() - started)
    return best[0] / best[1]
