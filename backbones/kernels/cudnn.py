"""A convolution, an addition and a ReLU in one pass, by cuDNN.

torch runs bias, addition and ReLU as kernels of their own, which read and write the whole map. On an H100 in bfloat16
they take longer than most convolutions of a ResNet.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import has_torch_function_unary

Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]


def fuses(x: Tensor, out_channels: int) -> bool:
    """Whether `conv_relu` takes this map (N, C, H, W): a plain tensor on a CUDA device, not traced or compiled.

    cuDNN counts elements in 32 bits. torch splits larger maps in its own convolutions alone.
    """
    return (
        not has_torch_function_unary(x)
        and x.is_cuda
        and 0 < x.numel() // x.shape[1] * max(x.shape[1], out_channels) < 2**31
        and torch.version.hip is None
        and torch.backends.cudnn.enabled
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and not (torch.jit.is_tracing() or torch.compiler.is_compiling())
    )


def conv_relu(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, addend: Tensor | None = None
) -> Tensor:
    """relu(conv2d(x, weight, bias) + addend): (N, C, H, W) and (C', C, kh, kw) -> (N, C', H', W').

    geometry: stride, padding, dilation and groups. Autocast is respected. A second derivative is refused.
    """
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        x, weight, bias, addend = (t if t is None else t.to(dtype) for t in (x, weight, bias, addend))
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    return _ConvReLU.apply(x, weight, bias, addend, geometry)


class _ConvReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, addend: Tensor | None, geometry: Geometry
    ) -> Tensor:
        """(N, C, H, W), (C', C, kh, kw), (C',) and (N, C', H', W') -> (N, C', H', W')"""
        if addend is None:
            result = torch.cudnn_convolution_relu(x, weight, bias, *geometry)
        else:
            result = torch.cudnn_convolution_add_relu(x, weight, addend, 1.0, bias, *geometry)
        ctx.save_for_backward(x, weight, result)
        ctx.geometry = geometry
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """(N, C', H', W') -> the gradients of x, weight, bias and addend."""
        x, weight, result = ctx.saved_tensors
        grad = torch.ops.aten.threshold_backward(grad, result, 0)
        stride, padding, dilation, groups = ctx.geometry
        *of_conv, of_addend, _ = ctx.needs_input_grad
        geometry = ([len(weight)], stride, padding, dilation, False, [0, 0], groups)
        grads = torch.ops.aten.convolution_backward(grad, x, weight, *geometry, of_conv)
        return *grads, grad if of_addend else None, None
