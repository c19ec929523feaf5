"""XNorm on a GPU: k^T v over the tokens, its columns made unit, and the unit queries times them."""

# A launch, kernel[grid](...), is typed as a call of the kernel.
# pyright: reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton as shared
from .._triton import inverse_power, store_scaled, sum_of_parts


@triton.jit
def _forward_matrix(
    product,
    scale,
    gamma,
    unit,
    inverse,
    matrix,
    matrix_scale,
    parts,
    heads,
    eps,
    GAMMA: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
):
    """M / max(|M|, eps) by columns, 1 / max(|M|, eps) (negative where the floor counts), and gamma^2 M^."""
    program = tl.program_id(0)
    d, e = tl.arange(0, D), tl.arange(0, E)
    acc, by = sum_of_parts(product, scale, program, parts, D, E)
    common = tl.min(by)
    acc *= (common / by)[:, None]
    near = inverse_power(tl.max(tl.abs(acc), 0))
    acc *= near[None, :]
    length, floor = tl.sqrt(tl.sum(acc * acc, 0)), eps * (common * near)
    free = length > floor
    length = tl.maximum(length, floor)
    acc /= length[None, :]
    tl.store(unit + program.to(tl.int64) * D * E + d[:, None] * E + e[None, :], acc)
    tl.store(inverse + program * E + e, tl.where(free, 1.0, -1.0) * common * near / length)
    factor = _gamma(gamma, program, heads, GAMMA)
    store_scaled(acc, matrix, matrix_scale, factor * factor, program, D, E)


@triton.jit
def _backward_matrices(
    product,
    scale,
    gamma,
    unit,
    inverse,
    to_q,
    to_q_scale,
    to_k,
    to_k_scale,
    to_v,
    to_v_scale,
    gamma_grad,
    parts,
    heads,
    prescale,
    GAMMA: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
):
    """From W = q^^T grad, q^ without gamma, and the unit columns u of M:

    du = gamma^2 W,  dM = (du - u (u . du)) / |M|,  dk = v dM^T,  dv = k dM,  dgamma = 2 gamma sum(u W),
    and the gradient of the unit queries is gamma^2 grad u^T.
    """
    program = tl.program_id(0)
    d, e = tl.arange(0, D), tl.arange(0, E)
    acc, by = sum_of_parts(product, scale, program, parts, D, E)
    acc /= by[:, None]
    u = tl.load(unit + program.to(tl.int64) * D * E + d[:, None] * E + e[None, :])
    signed = tl.load(inverse + program * E + e)
    along = tl.sum(u * acc, 0)
    factor = _gamma(gamma, program, heads, GAMMA)
    tl.store(gamma_grad + program, 2 * factor * tl.sum(along))
    along = tl.where(signed > 0, along, 0.0)
    dm = (acc - u * along[None, :]) * (factor * factor * tl.abs(signed))[None, :]
    store_scaled(tl.trans(u), to_q, to_q_scale, factor * factor / prescale, program, E, D)
    store_scaled(tl.trans(dm), to_k, to_k_scale, 1 / prescale, program, E, D)
    store_scaled(dm, to_v, to_v_scale, 1 / prescale, program, D, E)


@triton.jit
def _gamma(gamma, program, heads, GAMMA: tl.constexpr):
    factor = tl.full([], 1.0, tl.float32)
    if GAMMA:
        factor = tl.load(gamma + program % heads).to(tl.float32)
    return factor


def xnorm(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor | None, mask: Tensor | None, eps: float) -> Tensor:
    return _xnorm(q, k, v, gamma, mask, eps)[0]


@torch.library.custom_op("sansmax::xnorm", mutates_args=())
def _xnorm(
    q: Tensor, k: Tensor, v: Tensor, gamma: Tensor | None, mask: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The output; M with unit columns (B H, D', E'), D' and E' padded; what its columns were divided by."""
    product, by, _ = shared.gathered(k, v, mask)
    programs, parts, wide, wide_value = product.shape
    out, unit, inverse = _empty(q, v)
    matrix, matrix_scale = shared.matrix(q, programs, wide, wide_value)
    _forward_matrix[programs,](
        product,
        by,
        product if gamma is None else gamma,
        unit,
        inverse,
        matrix,
        matrix_scale,
        parts,
        q.shape[1],
        eps,
        GAMMA=gamma is not None,
        D=wide,
        E=wide_value,
        num_warps=shared.warps(wide, wide_value),
    )
    shared.applied(q, matrix, matrix_scale, out, kind="unit", eps=eps)
    return out, unit, inverse


@_xnorm.register_fake
def _(q, k, v, gamma, mask, eps):
    return _empty(q, v)


def _empty(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    programs, wide, wide_value = q.shape[0] * q.shape[1], shared.padded(q.shape[3]), shared.padded(v.shape[3])
    return (
        shared.tokens_first(q, v.shape[3]),
        q.new_empty(programs, wide, wide_value, dtype=torch.float32),
        q.new_empty(programs, wide_value, dtype=torch.float32),
    )


@torch.library.custom_op("sansmax::xnorm_backward", mutates_args=())
def _xnorm_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gamma: Tensor | None,
    mask: Tensor | None,
    unit: Tensor,
    inverse: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, and (B, H) that of gamma for each image."""
    programs, wide, wide_value = unit.shape
    product, by, _ = shared.gathered(q, grad, None, unit=True, eps=eps)
    to_q, to_q_scale = shared.matrix(q, programs, wide_value, wide)
    to_k, to_k_scale = shared.matrix(q, programs, wide_value, wide)
    to_v, to_v_scale = shared.matrix(q, programs, wide, wide_value)
    gamma_grad = unit.new_empty(q.shape[:2])
    _backward_matrices[programs,](
        product,
        by,
        unit if gamma is None else gamma,
        unit,
        inverse,
        to_q,
        to_q_scale,
        to_k,
        to_k_scale,
        to_v,
        to_v_scale,
        gamma_grad,
        product.shape[1],
        q.shape[1],
        shared.prescale(q.dtype),
        GAMMA=gamma is not None,
        D=wide,
        E=wide_value,
        num_warps=shared.warps(wide, wide_value),
    )
    dq, dk, dv = (shared.tokens_first(x, x.shape[3]) for x in (q, k, v))
    shared.applied(grad, to_q, to_q_scale, dq, None, "unit_backward", q, eps=eps)
    shared.applied(v, to_k, to_k_scale, dk, mask)
    shared.applied(k, to_v, to_v_scale, dv, mask)
    return dq, dk, dv, gamma_grad


@_xnorm_backward.register_fake
def _(grad, q, k, v, gamma, mask, unit, inverse, eps):
    return *(shared.tokens_first(x, x.shape[3]) for x in (q, k, v)), unit.new_empty(q.shape[:2])


def _keep(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _differentiate(ctx, grad, *_):
    gamma = ctx.saved_tensors[3]
    dq, dk, dv, gamma_grad = _xnorm_backward(grad, *ctx.saved_tensors, ctx.eps)
    return dq, dk, dv, None if gamma is None else gamma_grad.sum(0).to(gamma.dtype), None, None


_xnorm.register_autograd(_differentiate, setup_context=_keep)
