"""SOFT on a GPU: K1 is recomputed by tiles of tokens wherever it is needed, and never written.

K1^T v is summed over parts of the tokens, the inverse meets it as a matrix of the head, and K1 meets their
product. Landmarks and tokens are moved by the mean landmark and stay float32 in all products, since distances
cancel and the inverse amplifies what is rounded: where tokens come in half precision a product is three in
TF32, with an error of about 2^-21; float32 tokens have products in float32.
"""

# A launch, kernel[grid](...), is typed as a call of the kernel, and reductions as tuples.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton as shared
from .._backend import no_autocast
from .._triton import kept, tokens_of
from ._inverse import RIDGE, exact_dtype
from .fused import inverse_of

# The Newton kernel holds a matrix of so many landmarks.
MOST_INVERTED = 64
# Entries of K1 that a program holds, without spilling registers on compute capability 9.0.
TILE = 2048
BACKWARD_TILE = 1024
# Where coordinates are cut, as in `fused`.
LIMIT = tl.constexpr(2.0**57)


@triton.jit
def _landmarks(
    landmarks,
    batch,
    head,
    count,
    dim,
    stride_b,
    stride_h,
    stride_m,
    stride_d,
    M: tl.constexpr,
    D: tl.constexpr,
):
    """Landmarks about their mean, that mean, and half their squares."""
    j, d = tl.arange(0, M), tl.arange(0, D)
    inside = j < count
    y = tokens_of(landmarks, batch, head, j, d, inside, dim, stride_b, stride_h, stride_m, stride_d)
    y = tl.minimum(tl.maximum(y, -LIMIT / 4), LIMIT / 4)
    centre = tl.sum(y, 0) / count
    y = tl.where(inside[:, None], y - centre[None, :], 0.0)
    return y, centre, tl.sum(y * y, 1) / 2


@triton.jit
def _tokens(q, batch, head, n, d, inside, dim, centre, q_b, q_h, q_n, q_d):
    x = tokens_of(q, batch, head, n, d, inside, dim, q_b, q_h, q_n, q_d).to(tl.float32) - centre[None, :]
    return tl.minimum(tl.maximum(x, -LIMIT), LIMIT)


@triton.jit
def _gaussian(x, y, squares, keep, PRECISION: tl.constexpr):
    """exp(-|x_i - y_j|^2 / 2) where `keep`, else 0."""
    exponent = tl.dot(x, tl.trans(y), input_precision=PRECISION) - tl.sum(x * x, 1)[:, None] / 2
    return tl.where(keep, tl.exp(tl.minimum(exponent - squares[None, :], 0.0)), 0.0)


@triton.jit
def _gather(
    q,
    v,
    landmarks,
    mask,
    product,
    tokens,
    per_part,
    heads,
    count,
    dim,
    value_dim,
    q_b,
    q_h,
    q_n,
    q_d,
    v_b,
    v_h,
    v_n,
    v_d,
    landmark_b,
    landmark_h,
    landmark_m,
    landmark_d,
    mask_b,
    mask_n,
    M: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One part of K1^T v."""
    part, program = tl.program_id(0), tl.program_id(1)
    batch, head = (program // heads).to(tl.int64), (program % heads).to(tl.int64)
    j, d, e = tl.arange(0, M), tl.arange(0, D), tl.arange(0, E)
    y, centre, squares = _landmarks(
        landmarks, batch, head, count, dim, landmark_b, landmark_h, landmark_m, landmark_d, M, D
    )
    acc = tl.zeros([M, E], tl.float32)
    stop = tl.minimum((part + 1) * per_part, tokens)
    for start in range(part * per_part, stop, BLOCK):
        n = start + tl.arange(0, BLOCK)
        inside = kept(mask, batch, n, n < stop, mask_b, mask_n, MASKED)
        x = _tokens(q, batch, head, n, d, inside, dim, centre, q_b, q_h, q_n, q_d)
        k = _gaussian(x, y, squares, inside[:, None] & (j < count)[None, :], PRECISION)
        values = tokens_of(v, batch, head, n, e, inside, value_dim, v_b, v_h, v_n, v_d).to(tl.float32)
        acc += tl.dot(tl.trans(k), values, input_precision=PRECISION)
    at = product + (program * tl.num_programs(0) + part).to(tl.int64) * count * E
    tl.store(at + j[:, None] * E + e[None, :], acc, mask=(j < count)[:, None])


@triton.jit
def _apply(
    q,
    landmarks,
    matrix,
    mask,
    out,
    tokens,
    heads,
    count,
    dim,
    value_dim,
    q_b,
    q_h,
    q_n,
    q_d,
    landmark_b,
    landmark_h,
    landmark_m,
    landmark_d,
    out_b,
    out_h,
    out_n,
    out_d,
    mask_b,
    mask_n,
    M: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """K1 matrix for a block of tokens."""
    block, program = tl.program_id(0), tl.program_id(1)
    batch, head = (program // heads).to(tl.int64), (program % heads).to(tl.int64)
    j, d, e = tl.arange(0, M), tl.arange(0, D), tl.arange(0, E)
    y, centre, squares = _landmarks(
        landmarks, batch, head, count, dim, landmark_b, landmark_h, landmark_m, landmark_d, M, D
    )
    n = block * BLOCK + tl.arange(0, BLOCK)
    inside = kept(mask, batch, n, n < tokens, mask_b, mask_n, MASKED)
    x = _tokens(q, batch, head, n, d, inside, dim, centre, q_b, q_h, q_n, q_d)
    k = _gaussian(x, y, squares, inside[:, None] & (j < count)[None, :], PRECISION)
    result = tl.dot(k, _matrix(matrix, program, j, e, count, E), input_precision=PRECISION)
    at = out + batch * out_b + head * out_h + n.to(tl.int64)[:, None] * out_n + e[None, :] * out_d
    tl.store(at, result.to(out.dtype.element_ty), mask=(n < tokens)[:, None] & (e < value_dim)[None, :])


@triton.jit
def _matrix(pointer, program, j, e, count, width):
    at = pointer + program.to(tl.int64) * count * width + j[:, None] * width + e[None, :]
    return tl.load(at, mask=(j < count)[:, None] & (e < width)[None, :], other=0.0)


@triton.jit
def _backward(
    q,
    v,
    grad,
    landmarks,
    mixed,
    product_grad,
    mask,
    dq,
    dv,
    landmark_grad,
    tokens,
    per_part,
    heads,
    count,
    dim,
    value_dim,
    q_b,
    q_h,
    q_n,
    q_d,
    v_b,
    v_h,
    v_n,
    v_d,
    grad_b,
    grad_h,
    grad_n,
    grad_d,
    landmark_b,
    landmark_h,
    landmark_m,
    landmark_d,
    dq_b,
    dq_h,
    dq_n,
    dq_d,
    dv_b,
    dv_h,
    dv_n,
    dv_d,
    mask_b,
    mask_n,
    M: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From the gradient g of the output, and that of K1^T v: those of q and v, and a part of the landmarks'.

    With W = K1 * (g mixed^T + v product_grad^T):
    dq_i = sum_j W_ij (y_j - x_i),  dy_j = sum_i W_ij (x_i - y_j),  dv = K1 product_grad.
    """
    part, program = tl.program_id(0), tl.program_id(1)
    batch, head = (program // heads).to(tl.int64), (program % heads).to(tl.int64)
    j, d, e = tl.arange(0, M), tl.arange(0, D), tl.arange(0, E)
    y, centre, squares = _landmarks(
        landmarks, batch, head, count, dim, landmark_b, landmark_h, landmark_m, landmark_d, M, D
    )
    acc = tl.zeros([M, D], tl.float32)
    column = tl.zeros([M], tl.float32)
    stop = tl.minimum((part + 1) * per_part, tokens)
    for start in range(part * per_part, stop, BLOCK):
        n = start + tl.arange(0, BLOCK)
        inside = kept(mask, batch, n, n < stop, mask_b, mask_n, MASKED)
        x = _tokens(q, batch, head, n, d, inside, dim, centre, q_b, q_h, q_n, q_d)
        k = _gaussian(x, y, squares, inside[:, None] & (j < count)[None, :], PRECISION)
        to_product = _matrix(product_grad, program, j, e, count, E)
        result = tl.dot(k, to_product, input_precision=PRECISION)
        at = dv + batch * dv_b + head * dv_h + n.to(tl.int64)[:, None] * dv_n + e[None, :] * dv_d
        tl.store(at, result.to(dv.dtype.element_ty), mask=(n < stop)[:, None] & (e < value_dim)[None, :])
        values = tokens_of(v, batch, head, n, e, inside, value_dim, v_b, v_h, v_n, v_d).to(tl.float32)
        w = tl.dot(values, tl.trans(to_product), input_precision=PRECISION)
        g = tokens_of(grad, batch, head, n, e, inside, value_dim, grad_b, grad_h, grad_n, grad_d)
        of_head = _matrix(mixed, program, j, e, count, E)
        w += tl.dot(g.to(tl.float32), tl.trans(of_head), input_precision=PRECISION)
        w *= k
        result = tl.dot(w, y, input_precision=PRECISION) - tl.sum(w, 1)[:, None] * x
        at = dq + batch * dq_b + head * dq_h + n.to(tl.int64)[:, None] * dq_n + d[None, :] * dq_d
        tl.store(at, result.to(dq.dtype.element_ty), mask=(n < stop)[:, None] & (d < dim)[None, :])
        acc += tl.dot(tl.trans(w), x, input_precision=PRECISION)
        column += tl.sum(w, 0)
    at = landmark_grad + (program * tl.num_programs(0) + part).to(tl.int64) * count * dim
    at += j[:, None] * dim + d[None, :]
    tl.store(at, acc - column[:, None] * y, mask=(j < count)[:, None] & (d < dim)[None, :])


@triton.jit
def _landmark_kernel(
    landmarks,
    batch,
    head,
    count,
    dim,
    stride_b,
    stride_h,
    stride_m,
    stride_d,
    M: tl.constexpr,
    D: tl.constexpr,
):
    """The landmarks about their mean and their kernel matrix with a diagonal of ones, zeros beside it."""
    y, _, squares = _landmarks(
        landmarks, batch, head, count, dim, stride_b, stride_h, stride_m, stride_d, M, D
    )
    i = tl.arange(0, M)
    inside = (i < count)[:, None] & (i < count)[None, :]
    a = _gaussian(y, y, squares, inside, "ieee")
    diagonal = i[:, None] == i[None, :]
    return y, tl.where(diagonal & inside, 1.0, a), diagonal & inside


@triton.jit
def _newton(
    landmarks,
    inverse,
    iterations,
    heads,
    count,
    dim,
    ridge,
    landmark_b,
    landmark_h,
    landmark_m,
    landmark_d,
    M: tl.constexpr,
    D: tl.constexpr,
):
    program = tl.program_id(0)
    batch, head = (program // heads).to(tl.int64), (program % heads).to(tl.int64)
    _, a, diagonal = _landmark_kernel(
        landmarks, batch, head, count, dim, landmark_b, landmark_h, landmark_m, landmark_d, M, D
    )
    largest = tl.max(tl.sum(a, 1), 0)
    a = tl.where(diagonal, a + ridge, a)
    v = a * (1.8 / (largest * largest))
    for _ in range(iterations):
        v = 2 * v - tl.dot(v, tl.dot(a, v, input_precision="ieee"), input_precision="ieee")
    i = tl.arange(0, M)
    at = inverse + program.to(tl.int64) * count * count + i[:, None] * count + i[None, :]
    tl.store(at, v, mask=(i < count)[:, None] & (i < count)[None, :])


@triton.jit
def _newton_backward(
    landmarks,
    grad,
    out,
    heads,
    count,
    dim,
    landmark_b,
    landmark_h,
    landmark_m,
    landmark_d,
    M: tl.constexpr,
    D: tl.constexpr,
):
    """The gradient of the landmarks from that of their kernel matrix."""
    program = tl.program_id(0)
    batch, head = (program // heads).to(tl.int64), (program % heads).to(tl.int64)
    y, a, diagonal = _landmark_kernel(
        landmarks, batch, head, count, dim, landmark_b, landmark_h, landmark_m, landmark_d, M, D
    )
    i, d = tl.arange(0, M), tl.arange(0, D)
    w = tl.where(diagonal, 0.0, _matrix(grad, program, i, i, count, count) * a)
    w += tl.trans(w)
    result = tl.dot(w, y, input_precision="ieee") - tl.sum(w, 1)[:, None] * y
    at = out + program.to(tl.int64) * count * dim + i[:, None] * dim + d[None, :]
    tl.store(at, result, mask=(i < count)[:, None] & (d < dim)[None, :])


def soft(
    q: Tensor,
    v: Tensor,
    landmarks: Tensor,
    inverse: str,
    iterations: int,
    batchwise: bool,
    mask: Tensor | None,
) -> Tensor:
    with no_autocast(q):
        # Two gradients of the landmarks meet in float32.
        landmarks = landmarks.float()
        if inverse == "plain" and landmarks.shape[2] <= MOST_INVERTED:
            z = _plain_inverse(landmarks, iterations)
        else:
            z = inverse_of(landmarks, inverse, iterations, batchwise)
        return _soft(q, v, landmarks, z, mask)[0]


def _words(q: Tensor, v: Tensor, landmarks: Tensor, mask: Tensor | None, tile: int) -> dict[str, Any]:
    """`tile` is how many entries of K1, or of tokens, a program holds."""
    wide, *widths = (shared.padded(t) for t in (landmarks.shape[2], q.shape[3], v.shape[3]))
    return {
        "M": wide,
        "D": widths[0],
        "E": widths[1],
        "MASKED": mask is not None,
        "BLOCK": max(16, min(64, tile // max(wide, *widths))),
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32x3",
        "num_warps": 8 if wide > 32 else 4,
        "num_stages": 1,
    }


def _gathered(q: Tensor, v: Tensor, landmarks: Tensor, mask: Tensor | None) -> Tensor:
    """K1^T v, (B H, m, E'), E' padded."""
    batch, heads, tokens, dim = q.shape
    words = _words(q, v, landmarks, mask, TILE)
    count, per_part = shared.parts(tokens, batch * heads, q.device)
    product = landmarks.new_empty(batch * heads, count, landmarks.shape[2], words["E"])
    _gather[count, batch * heads](
        q,
        v,
        landmarks,
        shared.pointer(mask, q),
        product,
        tokens,
        per_part,
        heads,
        landmarks.shape[2],
        dim,
        v.shape[3],
        *q.stride(),
        *v.stride(),
        *landmarks.stride(),
        *shared.mask_strides(mask),
        **words,
    )
    return product[:, 0] if count == 1 else product.sum(1)


def _exact_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32 at least, whatever the flags about TF32 say."""
    with no_autocast(a):
        dtype = torch.promote_types(exact_dtype(a, "plain"), torch.promote_types(a.dtype, b.dtype))
        return a.to(dtype) @ b.to(dtype)


@torch.library.custom_op("sansmax::soft", mutates_args=())
def _soft(
    q: Tensor, v: Tensor, landmarks: Tensor, z: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The output; K1^T v and Z K1^T v, (B H, m, E')."""
    batch, heads, tokens, dim = q.shape
    out = shared.tokens_first(q, v.shape[3])
    words = _words(q, v, landmarks, mask, TILE)
    product = _gathered(q, v, landmarks, mask)
    mixed = _exact_product(z.flatten(0, 1), product).float()
    _apply[triton.cdiv(tokens, words["BLOCK"]), batch * heads](
        q,
        landmarks,
        mixed,
        shared.pointer(mask, q),
        out,
        tokens,
        heads,
        landmarks.shape[2],
        dim,
        v.shape[3],
        *q.stride(),
        *landmarks.stride(),
        *out.stride(),
        *shared.mask_strides(mask),
        **words,
    )
    return out, product.contiguous(), mixed


@_soft.register_fake
def _(q, v, landmarks, z, mask):
    shape = q.shape[0] * q.shape[1], landmarks.shape[2], shared.padded(v.shape[3])
    return shared.tokens_first(q, v.shape[3]), landmarks.new_empty(shape), landmarks.new_empty(shape)


@torch.library.custom_op("sansmax::soft_backward", mutates_args=())
def _soft_backward(
    grad: Tensor,
    q: Tensor,
    v: Tensor,
    landmarks: Tensor,
    z: Tensor,
    mask: Tensor | None,
    product: Tensor,
    mixed: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, tokens, dim = q.shape
    count, per_part = shared.parts(tokens, batch * heads, q.device)
    mixed_grad = _gathered(q, grad, landmarks, mask)
    dz = _exact_product(mixed_grad, product.mT).to(z.dtype).unflatten(0, (batch, heads))
    product_grad = _exact_product(z.flatten(0, 1).mT, mixed_grad).float().contiguous()
    dq, dv = shared.tokens_first(q, dim), shared.tokens_first(v, v.shape[3])
    parts = landmarks.new_empty(batch, heads, count, *landmarks.shape[2:])
    _backward[count, batch * heads](
        q,
        v,
        grad,
        landmarks,
        mixed,
        product_grad,
        shared.pointer(mask, q),
        dq,
        dv,
        parts,
        tokens,
        per_part,
        heads,
        landmarks.shape[2],
        dim,
        v.shape[3],
        *q.stride(),
        *v.stride(),
        *grad.stride(),
        *landmarks.stride(),
        *dq.stride(),
        *dv.stride(),
        *shared.mask_strides(mask),
        **_words(q, v, landmarks, mask, BACKWARD_TILE),
    )
    return dq, dv, parts.sum(2), dz


@_soft_backward.register_fake
def _(grad, q, v, landmarks, z, mask, product, mixed):
    return (
        *(shared.tokens_first(t, t.shape[3]) for t in (q, v)),
        *(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (landmarks, z)),
    )


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output[1:])


def _differentiate(ctx, grad, *_):
    return *_soft_backward(grad, *ctx.saved_tensors), None


_soft.register_autograd(_differentiate, setup_context=_keep)


@torch.library.custom_op("sansmax::soft_inverse", mutates_args=())
def _plain_inverse(landmarks: Tensor, iterations: int) -> Tensor:
    """(B, H, m, m), the Newton inverse "plain" of the kernel matrices of float32 landmarks."""
    batch, heads, count, dim = landmarks.shape
    inverse = landmarks.new_empty(batch, heads, count, count)
    _newton[batch * heads,](
        landmarks,
        inverse,
        iterations,
        heads,
        count,
        dim,
        RIDGE,
        *landmarks.stride(),
        M=shared.padded(count),
        D=shared.padded(dim),
        num_warps=8,
    )
    return inverse


@_plain_inverse.register_fake
def _(landmarks, iterations):
    return landmarks.new_empty(*landmarks.shape[:3], landmarks.shape[2])


@torch.library.custom_op("sansmax::soft_inverse_backward", mutates_args=())
def _plain_inverse_backward(grad: Tensor, landmarks: Tensor, inverse: Tensor) -> Tensor:
    batch, heads, count, dim = landmarks.shape
    out = landmarks.new_empty(landmarks.shape)
    # The gradient of a true inverse, whatever `inverse` is.
    grad = -_exact_product(_exact_product(inverse.mT, grad), inverse.mT)
    _newton_backward[batch * heads,](
        landmarks,
        grad.float().contiguous(),
        out,
        heads,
        count,
        dim,
        *landmarks.stride(),
        M=shared.padded(count),
        D=shared.padded(dim),
        num_warps=8,
    )
    return out


@_plain_inverse_backward.register_fake
def _(grad, landmarks, inverse):
    return landmarks.new_empty(landmarks.shape)


def _keep_inverse(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output)


def _differentiate_inverse(ctx, grad):
    return _plain_inverse_backward(grad, *ctx.saved_tensors), None


_plain_inverse.register_autograd(_differentiate_inverse, setup_context=_keep_inverse)
