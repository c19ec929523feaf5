"""q, k and v as views of one projection, and their gradients without the copies between the two."""

import torch
from torch import Tensor

from ._eager import holds_values, without_tangent


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, 3 H D), rows [Q; K; V] as in timm -> q, k, v (B, H, N, D), strided views.

    PyTorch's own gradient of the three views stacks them and copies the stack into the layout of qkv: a third
    to a half of the time of SimA's forward and backward pass (1024 tokens, 6 heads of 64). Here they are
    written into it once, or not at all where they lie there already (`side_by_side`).
    """
    recorded = qkv.requires_grad and torch.is_grad_enabled()
    if recorded and holds_values(qkv) and without_tangent(qkv):
        return _Split.apply(qkv, heads)
    return _views(qkv, heads)


def side_by_side(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors for the gradients of q, k, v (B, H, N, D): where these are alike, views of one
    (B, N, 3 H D)."""
    if q.shape == k.shape == v.shape and q.dtype == k.dtype == v.dtype:
        b, h, n, d = q.shape
        return _views(q.new_empty(b, n, 3 * h * d), h)
    q, k, v = (t.new_empty(t.transpose(1, 2).shape).transpose(1, 2) for t in (q, k, v))
    return q, k, v


def _views(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        return _views(qkv, heads)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.width = inputs[0].shape[2]

    @staticmethod
    def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():  # of a gradient of the gradient: recorded
            return torch.stack(grads).permute(1, 3, 0, 2, 4).flatten(2), None
        b, _, n, _ = grads[0].shape
        if _joined(*grads):
            return grads[0].as_strided((b, n, ctx.width), (n * ctx.width, ctx.width, 1)), None
        out = grads[0].new_empty(b, n, ctx.width)
        for part, grad in zip(_views(out, grads[0].shape[1]), grads, strict=True):
            part.copy_(grad)
        return out, None


def _joined(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether these are what `side_by_side` gave out, in this order."""
    _, h, n, d = q.shape
    strides = (3 * n * h * d, d, 3 * h * d, 1)
    return all(
        type(t) is Tensor
        and t.dtype == q.dtype
        and t.stride() == strides
        and t.data_ptr() == q.data_ptr() + i * h * d * t.element_size()
        and t.untyped_storage().data_ptr() == q.untyped_storage().data_ptr()
        for i, t in enumerate((q, k, v))
    )
