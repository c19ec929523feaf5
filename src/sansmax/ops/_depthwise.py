"""Depth-wise convolution of tokens as they lie, and its gradient where PyTorch's own is slow."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from ._eager import without_tangent

# From this many taps on PyTorch's own kernel gradient on the CPU takes 3 to 25 times as long as ours.
TAPS_OF_OWN_GRADIENT = 25


def depthwise(cells: Tensor, kernel: Tensor, padding: tuple[int, int] | None = None) -> Tensor:
    """Cross-correlation of (B, rows, columns, C) with (C, 1, kernel rows, kernel columns), zeros outside.

    `padding`: how many rows and columns of zeros lie on each side; None centres the kernel.
    """
    if padding is None:
        padding = kernel.shape[2] // 2, kernel.shape[3] // 2
    # Channels last in memory: no copy. A (T, T) matrix per head gathered from w takes 2 to 300 times as long.
    x = cells.movedim(-1, 1)
    if not x.is_cpu:
        # Channels last, cuDNN would round to TF32.
        return _convolve(x.contiguous(), kernel, padding).movedim(1, -1)
    own = kernel[0].numel() >= TAPS_OF_OWN_GRADIENT and _reverse_only(x, kernel)
    return (_Depthwise.apply if own else _convolve)(x, kernel, padding).movedim(1, -1)


def _reverse_only(*tensors: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return True
    return not any(map(is_functorch_wrapped_tensor, tensors)) and without_tangent(*tensors)


def _convolve(x: Tensor, kernel: Tensor, padding: tuple[int, int]) -> Tensor:
    return F.conv2d(x, kernel, padding=padding, groups=x.shape[1])


class _Depthwise(torch.autograd.Function):
    """`_convolve`, whose kernel gradient is a convolution of the input with the output's gradient."""

    @staticmethod
    def forward(x, kernel, padding):
        return _convolve(x, kernel, padding)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, kernel, ctx.padding = inputs
        ctx.save_for_backward(x, kernel)

    @staticmethod
    def backward(ctx, *grads):
        (grad,), (x, kernel), (rows, columns) = grads, ctx.saved_tensors, ctx.padding
        b, c = grad.shape[:2]
        # Padded beforehand: with padding that wide the library's convolution falls back to a loop.
        padded = F.pad(x, (columns, columns, rows, rows)).contiguous()
        grad_kernel = F.conv2d(
            padded.view(1, b * c, *padded.shape[2:]), grad.reshape(b * c, 1, *grad.shape[2:]), groups=b * c
        )
        padding = kernel.shape[2] - 1 - rows, kernel.shape[3] - 1 - columns
        grad_x = _convolve(grad, kernel.flip(-2, -1), padding)
        return grad_x, grad_kernel.view(b, *kernel.shape).sum(0), None
