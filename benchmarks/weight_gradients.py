"""Rates of a convolution's weight gradient on a CPU by several routes, as parts of the machine's matrix rate.

python -m benchmarks.weight_gradients --output benchmarks/weight_gradients.json

Channels-last maps of ResNet-101's training step at 600x800 pixels, float32. oneDNN's two layouts (the contiguous one with
its copies), one product with the patches of the map (im2col), and the route that `backbones.gradients` takes.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from backbones.gradients import _backward, _rows, _weight_grad
from torch import Tensor

from benchmarks import describe_machine
from benchmarks.timing import Stopwatch, alternate
from detector.files import write_json
from detector.tables import format_table

# (images, channels in, channels out, height, width), kernel, stride
SHAPES = {
    "RPN, 3x3": ((1, 1024, 1024, 38, 50), 3, 1),
    "conv4_x, 3x3": ((1, 256, 256, 38, 50), 3, 1),
    "conv4_x, 1x1": ((1, 1024, 256, 38, 50), 1, 1),
    "conv4_1, 3x3, stride 2": ((1, 256, 256, 75, 100), 3, 2),
    "conv3_x, 3x3": ((1, 128, 128, 75, 100), 3, 1),
    "conv5_1, 128 regions, 3x3, stride 2": ((128, 512, 512, 14, 14), 3, 2),
    "conv5_x, 128 regions, 3x3": ((128, 512, 512, 7, 7), 3, 1),
    "conv5_x, 128 regions, 1x1": ((128, 2048, 512, 7, 7), 1, 1),
}
MATRIX = 2048


def in_channels_last(grad: Tensor, x: Tensor, weight: Tensor, *geometry: tuple[int, int]) -> Tensor:
    return _backward(grad, x, weight, *geometry, (False, True, False))[1]


def contiguous(grad: Tensor, x: Tensor, weight: Tensor, *geometry: tuple[int, int]) -> Tensor:
    return in_channels_last(grad.contiguous(), x.contiguous(), weight.contiguous(), *geometry)


def im2col(grad: Tensor, x: Tensor, weight: Tensor, stride, padding, dilation) -> Tensor:
    height, width = grad.shape[2:]
    padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    patches = padded.unfold(2, weight.shape[2], stride[0]).unfold(3, weight.shape[3], stride[1])
    columns = patches[:, :, :height, :width].permute(0, 2, 3, 4, 5, 1).reshape(-1, weight[0].numel())
    product = _rows(grad).t() @ columns
    return product.view(len(weight), *weight.shape[2:], -1).permute(0, 3, 1, 2)


ROUTES = {"channels-last": in_channels_last, "contiguous": contiguous, "im2col": im2col, "ours": _weight_grad}


def measure(repeats: int) -> list[dict]:
    """For each shape and route: the time of a matrix product of as many multiply-accumulates, over its own."""
    watch, measured = Stopwatch("cpu"), []
    matrix = torch.randn(MATRIX, MATRIX)
    for name, ((images, channels, out, height, width), kernel, stride) in SHAPES.items():
        x = torch.randn(images, channels, height, width).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(out, channels, kernel, kernel).contiguous(memory_format=torch.channels_last)
        geometry = ((stride, stride), (kernel // 2, kernel // 2), (1, 1))
        grad = torch.randn_like(F.conv2d(x, weight, None, *geometry))
        expected = in_channels_last(grad, x, weight, *geometry)
        calls: dict[str, Callable] = {"matrix": partial(watch.time, partial(torch.mm, matrix, matrix))}
        for route, compute in ROUTES.items():
            found = compute(grad, x, weight, *geometry)
            if not (found - expected).norm() <= 1e-5 * expected.norm():
                raise ValueError(f"{route} of {name} differs")
            calls[route] = partial(watch.time, partial(compute, grad, x, weight, *geometry))
        times = alternate(calls, repeats, warmup=1)
        macs = weight.numel() * grad.numel() / out
        limit = times["matrix"]["total"]["median"] * macs / MATRIX**3
        rates = {route: limit / times[route]["total"]["median"] for route in ROUTES}
        measured.append({"shape": name, "macs": macs, "limit_seconds": limit, "rates": rates})
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", metavar="FILE.json")
    args = parser.parse_args()
    shapes = measure(args.repeats)
    rows = [(s["shape"], *s["rates"].values()) for s in shapes]
    print(format_table(rows, header=("part of the matrix rate", *ROUTES)))
    if args.output:
        write_json(args.output, {"machine": describe_machine(), "shapes": shapes}, indent=1)


if __name__ == "__main__":
    main()
