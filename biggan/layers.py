"""Small pieces that both networks use: resampling, convolutions that resample, and initialisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Elsewhere, on XLA, the partitioner gathers the whole batch for the gradient of a convolution with a stride.
STRIDED_DEVICES = ("cpu", "cuda")
# From so many channels on the other side, adding up pixels costs less than the 7 products that it saves each of them.
# On CUDA memory is dearer than products.
CPU_CHANNELS_UP, CPU_CHANNELS_DOWN = 96, 48
CPU_CHANNELS_WIDE = 192  # on both sides


def upsample2x(x: Tensor) -> Tensor:
    """Nearest-neighbour upsampling: (B, C, H, W) -> (B, C, 2H, 2W), in the memory format of x."""
    return _Upsample2x.apply(x)


class _Upsample2x(torch.autograd.Function):
    """By expand and reshape, and pooling backward: `F.interpolate` falls back to the host on XLA, and the sum that
    autograd makes of an expansion is slow."""

    @staticmethod
    def forward(ctx, x):
        batch, channels, height, width = x.shape
        if x.is_contiguous(memory_format=torch.channels_last):
            pixels = x.permute(0, 2, 3, 1)[:, :, None, :, None, :].expand(-1, -1, 2, -1, 2, -1)  # (B, H, 2, W, 2, C)
            return pixels.reshape(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)
        pixels = x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2)  # (B, C, H, 2, W, 2)
        return pixels.reshape(batch, channels, 2 * height, 2 * width)

    @staticmethod
    def backward(ctx, grad):
        return 4 * F.avg_pool2d(grad, 2)


def downsample2x(x: Tensor) -> Tensor:
    """Means of 2x2 squares: (B, C, H, W) -> (B, C, H/2, W/2)."""
    return F.avg_pool2d(x, 2)


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: int = 1, padding: int = 0, transposed: bool = False
) -> Tensor:
    """`F.conv2d`, or `F.conv_transpose2d`; where a CPU has wide ones, their gradient takes half of the time."""
    wide = min(weight.shape[:2]) >= CPU_CHANNELS_WIDE
    if x.device.type != "cpu" or not wide or torch.is_autocast_enabled("cpu"):
        return (F.conv_transpose2d if transposed else F.conv2d)(x, weight, bias, stride, padding)
    return WideConv2d.apply(x, weight, bias, stride, padding, transposed)


class WideConv2d(torch.autograd.Function):
    """The weight's gradient for each place of the kernel is one product of matrices, over the pixels that it meets.

    With 4x4 pixels and a line of zeros around them, that is seven tenths of what a 3x3 kernel multiplies.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, *options: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding, ctx.transposed = options
        return (F.conv_transpose2d if ctx.transposed else F.conv2d)(x, weight, bias, *options[:2])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]

        def torchs_own(needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
            options = [ctx.stride] * 2, [ctx.padding] * 2, [1, 1], ctx.transposed, [0, 0], 1
            return torch.ops.aten.convolution_backward(grad, x, weight, grad.shape[1:2], *options, needs)

        if torch.is_grad_enabled():  # on the way to a second derivative
            return *torchs_own(needs), None, None, None
        grad_x = torchs_own([True, False, False])[0] if needs[0] else None
        small, large = (x, grad) if ctx.transposed else (grad, x)
        grad_weight = _weight_gradient(small, large, weight.shape[2:], ctx.stride, ctx.padding) if needs[1] else None
        return grad_x, grad_weight, grad.sum((0, 2, 3)) if needs[2] else None, None, None, None


def _weight_gradient(grad: Tensor, x: Tensor, kernel_size: tuple[int, int], stride: int, padding: int) -> Tensor:
    """grad (B, C', h, w), x (B, C, H, W) -> (C', C, *kernel_size), channels last."""
    weight = grad.new_empty(grad.shape[1], *kernel_size, x.shape[1])
    grad, x = grad.permute(0, 2, 3, 1), x.permute(0, 2, 3, 1)
    rows, columns = (
        [_meeting(place, stride, padding, x.shape[dim], grad.shape[dim]) for place in range(size)]
        for dim, size in ((1, kernel_size[0]), (2, kernel_size[1]))
    )
    for i, (x_rows, grad_rows) in enumerate(rows):
        for j, (x_columns, grad_columns) in enumerate(columns):
            pixels = x[:, x_rows, x_columns].flatten(0, 2)  # (n, C)
            torch.mm(grad[:, grad_rows, grad_columns].flatten(0, 2).T, pixels, out=weight[:, i, j])
    return weight.permute(0, 3, 1, 2)


def _meeting(place: int, stride: int, padding: int, size: int, out_size: int) -> tuple[slice, slice]:
    """The pixels of a line that this place of the kernel meets, and the results that they go to."""
    shift = place - padding
    first = max(-(shift // stride), 0)
    stop = max(min((size - 1 - shift) // stride + 1, out_size), first)
    return slice(first * stride + shift, stop * stride + shift, stride), slice(first, stop)


def conv_after_upsample(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 3x3 convolution of the upsampled x, without upsampling: (B, C, H, W) -> (B, C', 2H, 2W).

    Upsampling puts zeros between the pixels and adds up squares of 2x2. What is added up is either the kernel, once for
    each of the four places of a pixel's copies: a transposed convolution with stride 2 whose 4x4 kernel makes 16
    products a pixel of x instead of 36. Or it is the result, which leaves 9.

    Args:
        weight: (C', C, 3, 3).  bias: (C',).
    """
    if x.device.type not in STRIDED_DEVICES:
        return F.conv2d(upsample2x(x), weight, bias, padding=1)
    kernel = 4 * weight.flip(2, 3)  # the sum of a square is 4 times its mean
    if x.device.type == "cpu" and x.shape[1] >= CPU_CHANNELS_UP:
        return Mean2x2.apply(conv2d(x, kernel.transpose(0, 1), bias, stride=2, transposed=True), 0)
    return F.conv_transpose2d(x, Mean2x2.apply(kernel, 1).transpose(0, 1), bias, stride=2, padding=1)


def conv_before_downsample(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The 2x2 means of a 3x3 convolution, as one convolution with stride 2: (B, C, H, W) -> (B, C', H/2, W/2).

    16 products a pixel of the result instead of 36 with means of the kernel, 9 with means of x; arguments as in
    `conv_after_upsample`.
    """
    if x.device.type not in STRIDED_DEVICES:
        return downsample2x(F.conv2d(x, weight, bias, padding=1))
    if x.device.type == "cpu" and weight.shape[0] >= CPU_CHANNELS_DOWN:
        return conv2d(Mean2x2.apply(x, 1), weight, bias, stride=2)
    return F.conv2d(x, Mean2x2.apply(weight, 1), bias, stride=2, padding=1)


class Mean2x2(torch.autograd.Function):
    """Means of all 2x2 squares: (B, C, H, W) -> (B, C, H - 1 + 2p, W - 1 + 2p) with p zeros around, 0 or 1.

    The gradient is the same operation with 1 - p, and needs nothing to be kept.
    """

    @staticmethod
    def forward(ctx, x: Tensor, padding: int) -> Tensor:
        ctx.padding = padding
        return F.avg_pool2d(x, 2, stride=1, padding=padding)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return Mean2x2.apply(grad, 1 - ctx.padding), None


@torch.no_grad()
def initialize_orthogonal(model: nn.Module) -> None:
    """Fills the weight of every convolution, linear layer and embedding with a (semi-)orthogonal matrix (out, in).

    Call it before the model leaves the CPU: the QR decomposition has no XLA form. Source: Saxe et al. 2014,
    arXiv:1312.6120.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.Embedding)):
            nn.init.orthogonal_(module.weight)
