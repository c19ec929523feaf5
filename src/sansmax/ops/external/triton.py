"""External attention on a GPU: a pass over the tokens for the softmax of every memory row, one that mixes.

No array of N x S is written. The backward pass keeps a maximum and the logarithm of a sum for each memory row
and recomputes the weights twice: for the gradient of memory_v and what the softmax over tokens sums, then for
those of x and memory_k. Wide tokens are read, and wide gradients made, some channels at a time.
"""

# A launch, kernel[grid](...), is typed as a call of the kernel, and reductions as tuples.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton as shared
from .._triton import dot, inverse_power, kept, power, tokens_of

# Channels of a product's step.
STEP = 32
# Memory rows times channels of the gradient that a program holds, and times tokens of a block: what registers
# take without spilling on compute capability 9.0. Products in float32 take twice the registers.
HELD = {torch.float32: 4096, torch.bfloat16: 8192, torch.float16: 8192}
LOGITS = 4096
# Entries beyond count as it, so that logits of 8192 channels stay above LOWEST, the logit of a masked token.
LIMIT = tl.constexpr(2.0**56)
LOWEST = tl.constexpr(-1e38)


def block(rows: int) -> int:
    """Tokens of a block for so many (padded) memory rows."""
    return max(16, min(32, LOGITS // rows))


@triton.jit
def _limited(x):
    """Squares of what is left do not overflow float32."""
    if x.dtype == tl.float16:
        return x
    return tl.minimum(tl.maximum(x.to(tl.float32), -LIMIT), LIMIT).to(x.dtype)


@triton.jit
def _memory(pointer, s, d, rows, width, stride_s, stride_d):
    """Some channels of all memory rows, zeros outside."""
    at = pointer + s[:, None] * stride_s + d[None, :] * stride_d
    return _limited(tl.load(at, mask=(s < rows)[:, None] & (d < width)[None, :], other=0.0))


@triton.jit
def _products(
    x,
    memory,
    batch,
    head,
    n,
    s,
    inside,
    rows,
    width,
    x_b,
    x_h,
    x_n,
    x_d,
    memory_s,
    memory_d,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """x memory^T over all channels, (BLOCK, S) in float32."""
    acc = tl.zeros([BLOCK, S], tl.float32)
    for start in range(0, width, STEP):
        d = start + tl.arange(0, STEP)
        tokens = _limited(tokens_of(x, batch, head, n, d, inside, width, x_b, x_h, x_n, x_d))
        acc += dot(tokens, tl.trans(_memory(memory, s, d, rows, width, memory_s, memory_d)))
    return acc


@triton.jit
def _softmax_sums(
    x,
    memory_k,
    mask,
    top,
    log_sum,
    tokens,
    per_part,
    heads,
    rows,
    width,
    x_b,
    x_h,
    x_n,
    x_d,
    memory_s,
    memory_d,
    mask_b,
    mask_n,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The largest logit of every memory row in a part of the tokens, and log sum_n exp(logit - largest)."""
    part, program = tl.program_id(0), tl.program_id(1)
    batch, head = (program // heads).to(tl.int64), (program % heads).to(tl.int64)
    s = tl.arange(0, S)
    largest = tl.full([S], LOWEST, tl.float32)
    total = tl.zeros([S], tl.float32)
    stop = tl.minimum((part + 1) * per_part, tokens)
    for start in range(part * per_part, stop, BLOCK):
        n = start + tl.arange(0, BLOCK)
        inside = kept(mask, batch, n, n < stop, mask_b, mask_n, MASKED)
        logits = _products(
            x,
            memory_k,
            batch,
            head,
            n,
            s,
            inside,
            rows,
            width,
            x_b,
            x_h,
            x_n,
            x_d,
            memory_s,
            memory_d,
            S,
            BLOCK,
            STEP,
        )
        logits = tl.where(inside[:, None], logits, LOWEST)
        now = tl.maximum(largest, tl.max(logits, 0))
        total = total * tl.exp(largest - now) + tl.sum(tl.exp(logits - now[None, :]), 0)
        largest = now
    at = (program * tl.num_programs(0) + part) * S + s
    tl.store(top + at, largest)
    tl.store(log_sum + at, tl.log(total))


@triton.jit
def _combine(top_parts, log_sum_parts, top, log_sum, parts, S: tl.constexpr):
    program = tl.program_id(0)
    s = tl.arange(0, S)
    largest = tl.full([S], LOWEST, tl.float32)
    for part in range(parts):
        largest = tl.maximum(largest, tl.load(top_parts + (program * parts + part) * S + s))
    total = tl.zeros([S], tl.float32)
    for part in range(parts):
        at = (program * parts + part) * S + s
        total += tl.exp(tl.load(top_parts + at) - largest + tl.load(log_sum_parts + at))
    tl.store(top + program * S + s, largest)
    tl.store(log_sum + program * S + s, tl.log(total))


@triton.jit
def _weights(logits, top, log_sum, inside, s, rows, log_eps):
    """a^ and a = a^ / (eps + its row sums), which may be far below the smallest float32.

    The kernels need not round a logit alike: one above the largest would overflow.
    """
    log_first = tl.minimum(logits - top[None, :], 0.0) - log_sum[None, :]
    log_first = tl.where((s < rows)[None, :], log_first, LOWEST)
    largest = tl.max(log_first, 1)
    exponential = tl.exp(log_first - largest[:, None])
    total = tl.sum(exponential, 1)
    log_ratio = tl.minimum(tl.maximum(largest + tl.log(total) - log_eps, -87.0), 87.0)
    share = tl.where(inside, 1 / (1 + tl.exp(-log_ratio)), 0.0)
    first = tl.where(inside[:, None], tl.exp(log_first), 0.0)
    return first, exponential / total[:, None], share


@triton.jit
def _mix(
    x,
    memory_k,
    memory_v,
    mask,
    top,
    log_sum,
    out,
    tokens,
    heads,
    rows,
    width,
    value_width,
    log_eps,
    x_b,
    x_h,
    x_n,
    x_d,
    k_s,
    k_d,
    v_s,
    v_d,
    out_b,
    out_h,
    out_n,
    out_d,
    mask_b,
    mask_n,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """a memory_v for a block of tokens."""
    part, program = tl.program_id(0), tl.program_id(1)
    batch, head = (program // heads).to(tl.int64), (program % heads).to(tl.int64)
    s = tl.arange(0, S)
    n = part * BLOCK + tl.arange(0, BLOCK)
    inside = kept(mask, batch, n, n < tokens, mask_b, mask_n, MASKED)
    logits = _products(
        x, memory_k, batch, head, n, s, inside, rows, width, x_b, x_h, x_n, x_d, k_s, k_d, S, BLOCK, STEP
    )
    largest = tl.load(top + program * S + s)
    _, weights, share = _weights(
        logits, largest, tl.load(log_sum + program * S + s), inside, s, rows, log_eps
    )
    weights = weights.to(x.dtype.element_ty)
    for start in range(0, value_width, STEP):
        e = start + tl.arange(0, STEP)
        mixed = dot(weights, _memory(memory_v, s, e, rows, value_width, v_s, v_d)) * share[:, None]
        at = out + batch * out_b + head * out_h + n.to(tl.int64)[:, None] * out_n + e[None, :] * out_d
        tl.store(at, mixed.to(out.dtype.element_ty), mask=(n < tokens)[:, None] & (e < value_width)[None, :])


@triton.jit
def _over_tokens(a, y):
    """a^T y; float16 has no room for small a: a power of two for each row of the result is put aside."""
    if y.dtype == tl.float16:
        largest = tl.max(tl.abs(a), 0)
        a = (a * inverse_power(largest)[None, :]).to(y.dtype)
        return dot(tl.trans(a), y) * power(largest)[:, None]
    return dot(tl.trans(a.to(y.dtype)), y)


@triton.jit
def _backward(
    x,
    grad,
    memory_k,
    memory_v,
    mask,
    top,
    log_sum,
    column,
    dx,
    memory_grad,
    tokens,
    per_part,
    parts,
    items,
    heads,
    rows,
    width,
    value_width,
    log_eps,
    x_b,
    x_h,
    x_n,
    x_d,
    grad_b,
    grad_h,
    grad_n,
    grad_d,
    k_s,
    k_d,
    v_s,
    v_d,
    dx_b,
    dx_h,
    dx_n,
    dx_d,
    mask_b,
    mask_n,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    CHUNK: tl.constexpr,
    MASKED: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Of some channels, for every program: with KEYS the gradients of x and memory_k, else that of memory_v.

    With g = grad memory_v^T and h = a (g - sum_s a g), the gradient of the logits is h - a^ c, c = sum_n h.
    `column` holds c, which the pass without KEYS makes part by part. An item is a part of a head's tokens.
    """
    program, chunk = tl.program_id(0), tl.program_id(1)
    s, channel = tl.arange(0, S), chunk * CHUNK + tl.arange(0, CHUNK)
    acc = tl.zeros([S, CHUNK], tl.float32)
    for item in range(program, items, tl.num_programs(0)):
        of_head, part = item // parts, item % parts
        batch, head = (of_head // heads).to(tl.int64), (of_head % heads).to(tl.int64)
        largest, log_total = tl.load(top + of_head * S + s), tl.load(log_sum + of_head * S + s)
        c = tl.load(column + of_head * S + s) if KEYS else tl.zeros([S], tl.float32)
        stop = tl.minimum((part + 1) * per_part, tokens)
        for start in range(part * per_part, stop, BLOCK):
            n = start + tl.arange(0, BLOCK)
            inside = kept(mask, batch, n, n < stop, mask_b, mask_n, MASKED)
            logits = _products(
                x,
                memory_k,
                batch,
                head,
                n,
                s,
                inside,
                rows,
                width,
                x_b,
                x_h,
                x_n,
                x_d,
                k_s,
                k_d,
                S,
                BLOCK,
                STEP,
            )
            first, weights, share = _weights(logits, largest, log_total, inside, s, rows, log_eps)
            weights *= share[:, None]
            g = _products(
                grad,
                memory_v,
                batch,
                head,
                n,
                s,
                inside,
                rows,
                value_width,
                grad_b,
                grad_h,
                grad_n,
                grad_d,
                v_s,
                v_d,
                S,
                BLOCK,
                STEP,
            )
            h = weights * (g - tl.sum(weights * g, 1)[:, None])
            if KEYS:
                h -= first * c[None, :]
                y = tokens_of(x, batch, head, n, channel, inside, width, x_b, x_h, x_n, x_d)
                acc += _over_tokens(h, _limited(y))
                by = tl.max(tl.abs(h), 1)
                keys = _memory(memory_k, s, channel, rows, width, k_s, k_d)
                result = dot((h * inverse_power(by)[:, None]).to(keys.dtype), keys) * power(by)[:, None]
                at = dx + batch * dx_b + head * dx_h + n.to(tl.int64)[:, None] * dx_n
                at += channel[None, :] * dx_d
                tl.store(
                    at, result.to(dx.dtype.element_ty), mask=(n < stop)[:, None] & (channel < width)[None, :]
                )
            else:
                c += tl.sum(h, 0)
                y = tokens_of(
                    grad, batch, head, n, channel, inside, value_width, grad_b, grad_h, grad_n, grad_d
                )
                acc += _over_tokens(weights, y)
        if not KEYS and chunk == 0:
            tl.store(column + item * S + s, c)
    at = memory_grad + (program * tl.num_programs(1) + chunk).to(tl.int64) * S * CHUNK
    tl.store(at + s[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :], acc)


def external(x: Tensor, memory_k: Tensor, memory_v: Tensor, mask: Tensor | None, eps: float) -> Tensor:
    if x.ndim == 3:
        return external(x[:, None], memory_k, memory_v, mask, eps)[:, 0]
    return _external(x, memory_k, memory_v, mask, eps)[0]


@torch.library.custom_op("sansmax::external", mutates_args=())
def _external(
    x: Tensor, memory_k: Tensor, memory_v: Tensor, mask: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The output; (2, B H, S'), S' padded: every memory row's largest logit and the logarithm of its sum."""
    heads, tokens, width = x.shape[1:]
    out, sums = _empty(x, memory_k, memory_v)
    programs, wide = sums.shape[1:]
    of_block = block(wide)
    words = {
        "S": wide,
        "BLOCK": of_block,
        "STEP": STEP,
        "MASKED": mask is not None,
        "num_warps": 8 if wide > 64 else 4,
        "num_stages": 2,
    }
    count, per_part = shared.parts(tokens, programs, x.device)
    parts = sums if count == 1 else sums.new_empty(2, programs, count, wide)
    masking = shared.pointer(mask, x)
    _softmax_sums[count, programs](
        x,
        memory_k,
        masking,
        *parts,
        tokens,
        per_part,
        heads,
        memory_k.shape[0],
        width,
        *x.stride(),
        *memory_k.stride(),
        *shared.mask_strides(mask),
        **words,
    )
    if count > 1:
        _combine[programs,](*parts, *sums, count, S=wide)
    _mix[triton.cdiv(tokens, of_block), programs](
        x,
        memory_k,
        memory_v,
        masking,
        *sums,
        out,
        tokens,
        heads,
        memory_k.shape[0],
        width,
        memory_v.shape[1],
        _log(eps),
        *x.stride(),
        *memory_k.stride(),
        *memory_v.stride(),
        *out.stride(),
        *shared.mask_strides(mask),
        **words,
    )
    return out, sums


def _log(eps: float) -> float:
    """Of a number or 0, without an infinity."""
    return math.log(eps) if eps else -1e38


@_external.register_fake
def _(x, memory_k, memory_v, mask, eps):
    return _empty(x, memory_k, memory_v)


def _empty(x: Tensor, memory_k: Tensor, memory_v: Tensor) -> tuple[Tensor, Tensor]:
    sums = x.new_empty(2, x.shape[0] * x.shape[1], shared.padded(memory_k.shape[0]), dtype=torch.float32)
    return shared.tokens_first(x, memory_v.shape[1]), sums


@torch.library.custom_op("sansmax::external_backward", mutates_args=())
def _external_backward(
    grad: Tensor,
    x: Tensor,
    memory_k: Tensor,
    memory_v: Tensor,
    mask: Tensor | None,
    sums: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    heads, tokens, width = x.shape[1:]
    (rows, value_width), (programs, wide) = memory_v.shape, sums.shape[1:]
    dx = shared.tokens_first(x, width)
    count, per_part = shared.parts(tokens, programs, x.device)
    column = sums.new_empty(programs, count, wide)

    def launch(keys: bool, column: Tensor, channels: int) -> Tensor:
        chunk = min(shared.padded(channels), HELD[x.dtype] // wide)
        chunks = triton.cdiv(channels, chunk)
        grid = min(programs * count, shared.programs(x.device) // chunks or 1)
        acc = sums.new_empty(grid, chunks, wide, chunk)
        _backward[grid, chunks](
            x,
            grad,
            memory_k,
            memory_v,
            shared.pointer(mask, x),
            *sums,
            column,
            dx,
            acc,
            tokens,
            per_part,
            count,
            programs * count,
            heads,
            rows,
            width,
            value_width,
            _log(eps),
            *x.stride(),
            *grad.stride(),
            *memory_k.stride(),
            *memory_v.stride(),
            *dx.stride(),
            *shared.mask_strides(mask),
            S=wide,
            BLOCK=block(wide),
            STEP=STEP,
            CHUNK=chunk,
            MASKED=mask is not None,
            KEYS=keys,
            num_warps=8,
            num_stages=2,
        )
        return acc.sum(0).transpose(0, 1).flatten(1)[:rows, :channels].to(x.dtype, copy=True)

    dv = launch(False, column, value_width)
    dk = launch(True, column.sum(1), width)
    return dx, dk.contiguous(), dv.contiguous()


@_external_backward.register_fake
def _(grad, x, memory_k, memory_v, mask, sums, eps):
    memories = (torch.empty(m.shape, dtype=x.dtype, device=x.device) for m in (memory_k, memory_v))
    return shared.tokens_first(x, x.shape[3]), *memories


def _keep(ctx, inputs, output):
    x, memory_k, memory_v, mask, ctx.eps = inputs
    ctx.save_for_backward(x, memory_k, memory_v, mask, output[1])


def _differentiate(ctx, grad, _):
    return *_external_backward(grad, *ctx.saved_tensors, ctx.eps), None, None


_external.register_autograd(_differentiate, setup_context=_keep)
