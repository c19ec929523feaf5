"""XNorm with the norms of the queries applied to the output, so that q^ is never written out."""

import torch
from torch import Tensor

from .._backend import no_autocast
from .._eager import finite, readable, without_tangent
from .._matmul import heads_matmul
from .._split import side_by_side
from ._causal import causal as _causal
from ._norms import largest, row_scale, scaled, unit_columns

# 1 / eps, rounded, is at least this share of it.
AT_FLOOR = 1 - 1e-6


def xnorm(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor | None, causal: bool, eps: float) -> Tensor:
    """Masked tokens hold zeros."""
    dtype = q.dtype
    with no_autocast(q):
        if dtype in (torch.float16, torch.bfloat16):
            # k^T v leaves the range of float16 and the precision of bfloat16.
            q, k, v = q.float(), k.float(), v.float()
        out = _causal(q, k, v, gamma, eps) if causal else _full(q, k, v, gamma, eps)
        return out.to(dtype)


def _full(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor | None, eps: float) -> Tensor:
    inputs = [t for t in (q, k, v, gamma) if t is not None]
    # As squares, a norm that exceeds eps must not vanish in float32.
    if eps >= 1e-15 and readable(*inputs) and without_tangent(*inputs):
        with torch.no_grad():
            found = _by_matrix(q, k, v, gamma, eps)
        if found is not None:
            return _Closed.apply(q, k, v, gamma, eps, found) if torch.is_grad_enabled() else found[0]
    # Scales of k and of v's channels cancel, except in eps; with them k^T v cannot overflow.
    k_top, v_top = largest(k, (-2, -1), eps), largest(v, (-2,), eps)
    kv = unit_columns(heads_matmul((k / k_top).mT, v / v_top), eps / k_top / v_top)
    return heads_matmul(q, kv) * row_scale(q, gamma, eps)


def _by_matrix(
    q: Tensor, k: Tensor, v: Tensor, gamma: Tensor | None, eps: float
) -> tuple[Tensor, ...] | None:
    """The output, U = k^T v with unit columns, what they and the queries were multiplied by to be unit; None
    where squares leave the range.
    """
    unit = heads_matmul(k.mT, v)
    squares, norm = unit.square().sum(-2, keepdim=True), torch.linalg.vector_norm(q, dim=-1, keepdim=True)
    if not (finite(squares) and finite(norm)):
        return None
    columns = squares.clamp_(min=eps * eps).sqrt_().reciprocal_()  # (B, H, 1, E)
    unit *= columns
    rows = norm.clamp_(min=eps).reciprocal_()  # (B, H, N, 1)
    return heads_matmul(q, scaled(unit, gamma)).mul_(rows), unit, columns, rows


class _Closed(torch.autograd.Function):
    """What `_by_matrix` has found, with its gradient. With q^ = r q the unit queries and U = M s the unit
    columns of M = k^T v:

        dU = gamma^2 q^^T grad      dM = (dU - U (U . dU)) s      dk = v dM^T      dv = k dM
        t = r gamma^2 grad U^T      dq = t - q^ (q^ . t)          dgamma = 2 gamma sum(U q^^T grad)

    without the second terms where a norm is at its floor. Of the inputs' size, nothing is kept but they.
    """

    @staticmethod
    def forward(ctx, q, k, v, gamma, eps, found):
        out, *small = found
        ctx.save_for_backward(q, k, v, gamma, *small)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, gamma, unit, columns, rows = ctx.saved_tensors
        with no_autocast(grad):
            if torch.is_grad_enabled():  # of a gradient of the gradient
                return *_recorded_gradient(q, k, v, gamma, ctx.eps, grad), None, None
            grad = grad * rows
            grad_unit = heads_matmul(q.mT, grad)
            along = (unit * grad_unit).sum(-2, keepdim=True)
            grad_gamma = None
            if gamma is not None:
                grad_gamma = (2 * gamma * along.sum((0, 2, 3))).to(gamma.dtype)
            along = along.masked_fill_(columns >= AT_FLOOR / ctx.eps, 0)
            grad_kv = scaled(torch.addcmul(grad_unit, unit, along, value=-1).mul_(columns), gamma)
            grad_q, grad_k, grad_v = side_by_side(q, k, v)
            straight = heads_matmul(grad, scaled(unit, gamma).mT)
            along = (q * straight).sum(-1, keepdim=True).mul_(rows.square())
            along = along.masked_fill_(rows >= AT_FLOOR / ctx.eps, 0)
            torch.addcmul(straight, q, along, value=-1, out=grad_q)
            grad_k.copy_(heads_matmul(v, grad_kv.mT))
            grad_v.copy_(heads_matmul(k, grad_kv))
            return grad_q, grad_k, grad_v, grad_gamma, None, None


def _recorded_gradient(q, k, v, gamma, eps: float, grad: Tensor) -> list[Tensor | None]:
    out = heads_matmul(q, unit_columns(heads_matmul(k.mT, v), eps)) * row_scale(q, gamma, eps)
    needed = [t is not None and t.requires_grad for t in (q, k, v, gamma)]
    inputs = [t for t, wanted in zip((q, k, v, gamma), needed, strict=True) if wanted]
    found = iter(torch.autograd.grad(out, inputs, grad, create_graph=True))
    return [next(found) if wanted else None for wanted in needed]
