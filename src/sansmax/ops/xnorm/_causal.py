"""Causal XNorm by matrix products, in chunks of tokens and in float64.

    M_t = sum_{s<=t} k_s v_s^T,  n_t = max(|M_t|, eps) by columns,  out_t = q^_t M_t / n_t

Before a chunk stands M. In it q_t M_t and k_t M_t are rows of Q M + tril(Q K^T) V and of K M + tril(K K^T) V,
and with the second the squared lengths are a running sum:

    |M_t|^2 = |M_{t-1}|^2 + v_t (2 k_t M_t - |k_t|^2 v_t)

Where a column shrinks within a chunk, that sum cancels. In float64 products of float32 numbers and their
squares are exact or leave room; a chunk where a square falls below SHRUNK of an earlier one, or of |M|^2, is
summed token by token (`_in_turn`), and the gradient of a sequence with such a chunk is found from float64
sums token by token. What a chunk has summed is not carried on: the next begins with the lengths of M.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .._backend import no_autocast
from .._eager import finite, readable, without_tangent
from .._split import side_by_side
from ._norms import row_scale, scaled, unit_columns

CHUNK = 32
# Tokens whose D x E matrices are held at a time.
TURN = 16
# Rounding, 1e-16 of the largest square, then stays below 1e-9 of the smallest, or 1e-13 for float64 inputs.
SHRUNK = {torch.float32: 1e-6, torch.float64: 1e-2}
# Of float64 inputs: with values up to here, keys whose squares vanish add nothing above eps.
LARGEST, SMALLEST_EPS = 1e100, 1e-15


def causal(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor | None, eps: float) -> Tensor:
    if readable(q, k, v) and without_tangent(q, k, v):
        recorded = torch.is_grad_enabled()
        with torch.no_grad():
            found = _by_chunks(q, k, v, eps, recorded)
        if found is not None:
            out, exact, cancels = found
            if recorded and cancels:
                # Products that cancel may be summed in another order, which leaves 1e4 of 1e20 - 1e20 + 1.
                return _recorded(q.double(), k.double(), v.double(), gamma, eps).to(q.dtype)
            return scaled(_Closed.apply(q, k, v, eps, out, *exact) if recorded else out, gamma)
    return _recorded(q, k, v, gamma, eps)


def _by_chunks(
    q: Tensor, k: Tensor, v: Tensor, eps: float, recorded: bool
) -> tuple[Tensor, list[Tensor], bool] | None:
    """out; if a gradient will be asked for, out and n of each chunk, (B H, CHUNK, E) in float64: rounded,
    grad_t - (grad_t out_t) out_t would lose what the two have in common; and whether a chunk was summed token
    by token. None where squares leave the range."""
    if q.dtype == torch.float64 and (eps < SMALLEST_EPS or not v.abs().amax().item() <= LARGEST):
        return None
    batch, heads, _, width = v.shape
    out = v.new_empty(v.transpose(1, 2).shape).transpose(1, 2)
    matrix, exact = k.new_zeros(batch * heads, k.shape[3], width, dtype=torch.float64), []
    cancels = False
    for at in _chunks(q):
        (keys, queries), both = _joined(k[:, :, at], q[:, :, at])
        values = _wide(v[:, :, at])
        scores = _lower(torch.bmm(both, keys.mT))
        along, rows = torch.bmm(both, matrix).baddbmm_(scores, values).chunk(2, 1)  # k_t M_t, q_t M_t
        lengths = scores[:, : keys.shape[1]].diagonal(dim1=1, dim2=2).unsqueeze(-1)  # |k_t|^2
        squares = torch.addcmul(along, values, lengths, value=-0.5).mul_(values)
        before = matrix.square().sum(1, keepdim=True)
        squares[:, :1] += before / 2
        squares = squares.cumsum(1).mul_(2)
        if _shrinks(before, squares, SHRUNK[q.dtype]):
            if not finite(squares):
                return None
            cancels = True
            rows, norm, matrix = _in_turn(queries, keys, values, matrix)
        else:
            norm = squares.sqrt_()
            matrix.baddbmm_(keys.mT, values)
        norm.clamp_(min=eps)
        rows = torch.div(rows, norm).div_(
            torch.linalg.vector_norm(queries, dim=-1, keepdim=True).clamp_(min=eps)
        )
        out[:, :, at] = rows.view(out[:, :, at].shape)
        if recorded:
            exact += [rows, norm]
    return out, exact, cancels


def _chunks(x: Tensor) -> list[slice]:
    return [slice(first, first + CHUNK) for first in range(0, x.shape[2], CHUNK)]


def _wide(x: Tensor) -> Tensor:
    """(B, H, N, D) -> (B H, N, D), float64."""
    return x.to(torch.float64).flatten(0, 1)


def _joined(a: Tensor, b: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Both as views of (B H, 2 N, D), float64, and the whole."""
    both = a.new_empty(*a.shape[:2], 2, *a.shape[2:], dtype=torch.float64)
    both[:, :, 0], both[:, :, 1] = a, b
    both = both.flatten(0, 1).flatten(1, 2)
    first, second = both.chunk(2, 1)
    return (first, second), both


def _lower(pairs: Tensor) -> Tensor:
    """The lower triangles of both (N, N) blocks of (B H, 2 N, N), in place."""
    pairs.view(-1, pairs.shape[2], pairs.shape[2]).tril_()
    return pairs


def _shrinks(before: Tensor, squares: Tensor, share: float) -> bool:
    """Whether a square is less than a share of an earlier one or of those before the chunk, or none is a
    number."""
    if (squares.amin(1) >= share * squares.amax(1).maximum(before[:, 0])).all().item():
        return False
    return not (squares >= share * squares.cummax(1).values.maximum(before)).all().item()


def _in_turn(q: Tensor, k: Tensor, v: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q_t M_t, |M_t| and the last M_t: a token and its negative leave nothing."""
    rows, norms = [], []
    for q_i, k_i, v_i in zip(q.split(TURN, 1), k.split(TURN, 1), v.split(TURN, 1), strict=True):
        kv = (k_i[..., :, None] * v_i[..., None, :]).cumsum(1).add_(matrix[:, None])
        rows.append((q_i[..., None, :] @ kv).squeeze(-2))
        norms.append(torch.linalg.vector_norm(kv, dim=-2))
        matrix = kv[:, -1]
    return torch.cat(rows, 1), torch.cat(norms, 1), matrix.contiguous()


class _Closed(torch.autograd.Function):
    """What `_by_chunks` has found, with its gradient. With a_t = grad_t / (|q_t| n_t) and b_t = grad_t out_t
    / n_t^2, 0 where n_t is eps,

        dM_t = q_t a_t^T - M_t diag(b_t)      dk_s = sum_{t>=s} dM_t v_s      dv_s = sum_{t>=s} dM_t^T k_s

    and dq_t = M_t a_t, without its part along q_t. From the last chunk on, with M before the chunk, the sum S
    of dM_t behind it and, in it, beta_s = sum_{t>=s} b_t and w_s = beta_s v_s:

        dK = V S^T + triu(V A^T) Q - W M^T - (tril(W V^T) + triu(V W^T, 1)) K
        dV = K S + triu(K Q^T) A - beta (K M + tril(K K^T) V) - triu(K K^T, 1) W
        dQ = A M^T + tril(A V^T) K             S += Q^T A - K^T W - M diag(beta_1)
    """

    @staticmethod
    def forward(ctx, q, k, v, eps, out, *exact):
        ctx.save_for_backward(q, k, v, *exact)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, *exact = ctx.saved_tensors
        others = (None,) * (2 + len(exact))
        with no_autocast(grad):
            if torch.is_grad_enabled():  # of a gradient of the gradient
                needed = [t for t in (q, k, v) if t.requires_grad]
                again = _recorded(q, k, v, None, ctx.eps)
                found = iter(torch.autograd.grad(again, needed, grad, create_graph=True))
                return *(next(found) if t.requires_grad else None for t in (q, k, v)), *others
            return *_gradient(q, k, v, exact, ctx.eps, grad), *others


def _gradient(
    q: Tensor, k: Tensor, v: Tensor, exact: list[Tensor], eps: float, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    chunks, grads = _chunks(q), side_by_side(q, k, v)
    matrix, before = exact[0].new_zeros(exact[0].shape[0], k.shape[3], v.shape[3]), []
    for at in chunks:
        before.append(matrix)
        matrix = torch.baddbmm(matrix, _wide(k[:, :, at]).mT, _wide(v[:, :, at]))
    behind = torch.zeros_like(matrix)
    for at, matrix, out, norm in reversed(list(zip(chunks, before, exact[::2], exact[1::2], strict=True))):
        (keys, queries), both = _joined(k[:, :, at], q[:, :, at])
        values, given = _wide(v[:, :, at]), _wide(grad[:, :, at])
        along = given * out
        length = torch.linalg.vector_norm(queries, dim=-1, keepdim=True)
        scale = length.clamp(min=eps).reciprocal_()

        beta = (along / norm.square()).masked_fill_(norm <= eps, 0).flip(1).cumsum(1).flip(1)
        weights = torch.cat([given / norm * scale, values * beta], 1)
        a, w = weights.chunk(2, 1)
        past_q, past_w = torch.bmm(weights, matrix.mT).chunk(2, 1)
        pairs_a, pairs_w = _lower(torch.bmm(weights, values.mT)).chunk(2, 1)
        grad_q = past_q.baddbmm(pairs_a, keys)
        turned = along.sum(-1, keepdim=True).mul_(scale.square()).masked_fill_(length <= eps, 0)
        grad_q.addcmul_(queries, turned, value=-1)
        grad_k = torch.bmm(values, behind.mT).baddbmm_(pairs_a.mT, queries).sub_(past_w)
        grad_k.baddbmm_(pairs_w + pairs_w.tril(-1).mT, keys, alpha=-1)

        scores_k, scores_q = _lower(torch.bmm(both, keys.mT)).chunk(2, 1)
        grad_v = torch.bmm(keys, behind).baddbmm_(scores_q.mT, a)
        grad_v.addcmul_(torch.bmm(keys, matrix).baddbmm_(scores_k, values), beta, value=-1)
        grad_v.baddbmm_(scores_k.tril(-1).mT, w, alpha=-1)
        behind.baddbmm_(queries.mT, a).baddbmm_(keys.mT, w, alpha=-1).addcmul_(matrix, beta[:, :1], value=-1)
        for part, found in zip(grads, (grad_q, grad_k, grad_v), strict=True):
            part[:, :, at] = found.view(part[:, :, at].shape)
    return grads


def _recorded(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor | None, eps: float) -> Tensor:
    """For any values and every transformation."""
    outs, kv = [], k.new_zeros(*k.shape[:2], k.shape[3], v.shape[3])
    # The backward pass makes the matrices of a chunk again instead of keeping those of all tokens.
    recompute = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    for q_i, k_i, v_i in zip(q.split(TURN, 2), k.split(TURN, 2), v.split(TURN, 2), strict=True):
        if recompute:
            out, kv = checkpoint(_recorded_turn, q_i, k_i, v_i, kv, eps, use_reentrant=False)
        else:
            out, kv = _recorded_turn(q_i, k_i, v_i, kv, eps)
        outs.append(out)
    return torch.cat(outs, dim=2) * row_scale(q, gamma, eps)


def _recorded_turn(q: Tensor, k: Tensor, v: Tensor, before: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    kv = (k[..., :, None] * v[..., None, :]).cumsum(2) + before[:, :, None]
    return (q[..., None, :] @ unit_columns(kv, eps)).squeeze(-2), kv[:, :, -1]
