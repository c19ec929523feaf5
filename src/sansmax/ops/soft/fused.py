"""SOFT as K1 (Z (K1^T V)), with kernel matrices that keep one N x m array for the backward pass."""

import torch
from torch import Tensor

from .._backend import no_autocast
from .._matmul import heads_matmul
from ._inverse import exact_dtype, landmark_inverse


def soft(q: Tensor, v: Tensor, landmarks: Tensor, inverse: str, iterations: int, batchwise: bool) -> Tensor:
    """Masked tokens hold zeros."""
    dtype = q.dtype
    with no_autocast(q):
        if dtype in (torch.float16, torch.bfloat16):
            q, v, landmarks = q.float(), v.float(), landmarks.float()
        k1 = gaussian(q, landmarks)  # (B, H, N, m)
        z = inverse_of(landmarks, inverse, iterations, batchwise)
        mixed = z @ heads_matmul(k1.mT, v).to(z.dtype)  # (B, H, m, E)
        return (k1 @ mixed.to(v.dtype)).to(dtype)


def inverse_of(landmarks: Tensor, inverse: str, iterations: int, batchwise: bool) -> Tensor:
    """Z, of landmarks (B, H, m, D)."""
    exact = landmarks.to(exact_dtype(landmarks, inverse))
    diagonal = torch.eye(exact.shape[2], dtype=torch.bool, device=exact.device)
    # A view, because torch.compile takes no tensor twice.
    a = gaussian(exact, exact.view_as(exact)).masked_fill(diagonal, 1)
    return landmark_inverse(a, inverse, iterations, batchwise)


def gaussian(x: Tensor, y: Tensor) -> Tensor:
    """exp(-|x_i - y_j|^2 / 2): x (B, H, N, D), y (B, H, m, D) -> (B, H, N, m)."""
    return _Gaussian.apply(x, y)


class _Gaussian(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:
        limit, center = _origin(y)
        # An exported graph would keep `out=`, which fails with gradients.
        out = None if torch.compiler.is_compiling() else x.new_empty(x.shape)
        x = torch.sub(x, center, out=out).clamp_(-limit, limit)
        y = y.clamp(-limit / 4, limit / 4).sub_(center)
        k = x @ y.mT
        for squares in (_square(x)[..., :, None], _square(y)[..., None, :]):
            k.sub_(squares, alpha=0.5)
        k.clamp_(max=0)
        # Torch 2.11 compiles zeros for the gradients of an output that is written in place.
        return k.exp() if torch.compiler.is_compiling() else k.exp_()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, y, k = ctx.saved_tensors
        limit, center = _origin(y)
        x, y = (x - center).clamp_(-limit, limit), y.clamp(-limit / 4, limit / 4).sub_(center)
        with no_autocast(grad):
            grad = grad * k
            grad_x = (grad @ y).addcmul_(grad.sum(-1)[..., None], x, value=-1)
            grad_y = heads_matmul(grad.mT, x).addcmul_(grad.sum(-2)[..., None], y, value=-1)
        return grad_x, grad_y


def _origin(y: Tensor) -> tuple[float, Tensor]:
    """Where coordinates are cut, and the point that becomes the origin.

    Distances do not change when both sides move, and |x|^2 + |y|^2 - 2 x y rounds less near the origin.
    Squares beyond the limit would overflow, and inf - inf is NaN; a smaller limit for y keeps two cut points
    apart.
    """
    limit = torch.finfo(y.dtype).max ** 0.45
    return limit, y.detach().clamp(-limit / 4, limit / 4).mean(-2, keepdim=True)


def _square(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1).square_()
