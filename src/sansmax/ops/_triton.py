"""Triton kernels of the mechanisms that are two products with one small matrix per head.

`gather` sums k^T v (and |k|) over the tokens, split over the tokens so that the chip fills when there are few
heads; `apply` multiplies tokens by a matrix of the head. Between them an operator's own kernel, one program
per head, adds the parts up and scales them.

Matrices of a head are stored for widths padded to powers of two, filled with zeros. A matrix that meets half
precision is divided by `scale`, a power of two for each output channel, so that it fits float16 and rounds as
in float32. Tokens and sums are multiplied by powers of two where products in float32 could overflow.
"""

# A launch, kernel[grid](...), is typed as a call of the kernel.
# pyright: reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

# Tokens of a block.
BLOCK = 64
# Parts of the sums over tokens that are wanted for every multiprocessor.
WAVES = 2
IEEE = tl.constexpr("ieee")
INTERPRETED = tl.constexpr(knobs.runtime.interpret)
# What the interpreter splits for, so that tests see several parts.
INTERPRETED_PROCESSORS = 16


def padded(width: int) -> int:
    """The matrix units take at least 16."""
    return max(16, triton.next_power_of_2(width))


def parts(tokens: int, heads: int, device: torch.device) -> tuple[int, int]:
    """Into how many parts the tokens are split, and the tokens of one, whole blocks."""
    blocks = triton.cdiv(tokens, BLOCK)
    count = min(blocks, max(1, programs(device) // heads))
    per_part = triton.cdiv(blocks, count) * BLOCK
    return triton.cdiv(tokens, per_part), per_part


def programs(device: torch.device) -> int:
    """How many programs fill the device."""
    processors = INTERPRETED_PROCESSORS
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    return WAVES * processors


def prescale(dtype: torch.dtype) -> float:
    """What tokens are multiplied by on the way in: 2^20 of them cannot overflow float32; float16 never
    can."""
    return 1.0 if dtype == torch.float16 else 2.0**-20


def average(tokens: int) -> float:
    """What x / sum |x| is multiplied by so that its average is about 1, and no entry leaves float16."""
    return 2.0 ** min(13, tokens.bit_length() - 1)


def warps(*widths: int) -> int:
    return 8 if max(widths) > 64 else 4


@triton.jit
def dot(a, b, PRECISION: tl.constexpr = IEEE):
    """a @ b with float32 sums; float32 is not rounded to TF32 ("tf32x3": three products of its parts)."""
    if INTERPRETED:  # its bfloat16 are uint16 to NumPy's product
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def power(x):
    """The power of two at or below x >= 0, from 2^-126 to 2^126."""
    bits = x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7F800000
    return tl.minimum(tl.maximum(bits, 1 << 23), 253 << 23).to(tl.float32, bitcast=True)


@triton.jit
def inverse_power(x):
    """1 / power(x), exactly."""
    bits = power(x).to(tl.int32, bitcast=True)
    return ((254 << 23) - bits).to(tl.float32, bitcast=True)


@triton.jit
def tokens_of(pointer, batch, head, n, d, inside, width, stride_b, stride_h, stride_n, stride_d):
    """A block of tokens, zeros outside."""
    at = pointer + batch * stride_b + head * stride_h
    at += n.to(tl.int64)[:, None] * stride_n + d[None, :] * stride_d
    return tl.load(at, mask=inside[:, None] & (d < width)[None, :], other=0.0)


@triton.jit
def kept(mask, batch, n, inside, stride_b, stride_n, MASKED: tl.constexpr):
    if MASKED:
        inside &= tl.load(mask + batch * stride_b + n * stride_n, mask=inside, other=0) != 0
    return inside


@triton.jit
def gather(
    k,
    v,
    mask,
    product,
    scale,
    total,
    tokens,
    per_part,
    heads,
    dim,
    value_dim,
    prescale,
    eps,
    k_b,
    k_h,
    k_n,
    k_d,
    v_b,
    v_h,
    v_n,
    v_d,
    mask_b,
    mask_n,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    RESCALED: tl.constexpr,
    SUMMED: tl.constexpr,
    UNIT: tl.constexpr,
):
    """One part of sum_n k_n v_n^T, and of sum_n |k_n|, both times `scale`, a number per channel of k.

    Products of large k and v overflow unless k is brought below 2^-20 by a power of two, which a part finds
    as it goes. UNIT makes k of length 1 first.
    """
    part, program = tl.program_id(0), tl.program_id(1)
    parts = tl.num_programs(0)
    batch, head = (program // heads).to(tl.int64), (program % heads).to(tl.int64)
    d, e = tl.arange(0, D), tl.arange(0, E)
    acc = tl.zeros([D, E], tl.float32)
    absolute = tl.zeros([D], tl.float32)
    by = tl.full([D], 2.0**60 if RESCALED else 1.0, tl.float32)
    stop = tl.minimum((part + 1) * per_part, tokens)
    for start in range(part * per_part, stop, BLOCK):
        n = start + tl.arange(0, BLOCK)
        inside = kept(mask, batch, n, n < stop, mask_b, mask_n, MASKED)
        x = tokens_of(k, batch, head, n, d, inside, dim, k_b, k_h, k_n, k_d)
        y = tokens_of(v, batch, head, n, e, inside, value_dim, v_b, v_h, v_n, v_d)
        if UNIT:
            x = unit(x, eps)[0].to(x.dtype)
        if RESCALED:
            largest = tl.max(tl.abs(x.to(tl.float32)), 0)
            now = tl.minimum(by, tl.maximum(inverse_power(largest) * prescale, 2.0**-126))
            acc *= (now / by)[:, None]
            absolute *= now / by
            by = now
            x = (x.to(tl.float32) * by[None, :]).to(x.dtype)
        if SUMMED:
            absolute += tl.sum(tl.abs(x.to(tl.float32)), 0)
        acc += dot(tl.trans(x), y)
    at = program * parts + part
    tl.store(product + at.to(tl.int64) * D * E + d[:, None] * E + e[None, :], acc)
    tl.store(scale + at * D + d, by)
    if SUMMED:
        tl.store(total + at * D + d, absolute)


@triton.jit
def sum_of_parts(product, scale, program, parts, D: tl.constexpr, E: tl.constexpr):
    """The sum of the parts of `gather` at the smallest of their scales, and that scale."""
    d, e = tl.arange(0, D), tl.arange(0, E)
    by = tl.full([D], 2.0**60, tl.float32)
    for part in range(parts):
        by = tl.minimum(by, tl.load(scale + (program * parts + part) * D + d))
    acc = tl.zeros([D, E], tl.float32)
    for part in range(parts):
        at = program * parts + part
        one = tl.load(product + at.to(tl.int64) * D * E + d[:, None] * E + e[None, :])
        acc += one * (by / tl.load(scale + at * D + d))[:, None]
    return acc, by


@triton.jit
def store_scaled(values, matrix, scale, factor, program, A: tl.constexpr, B: tl.constexpr):
    """Stores values (A, B) as a matrix for `apply`, and a scale for each of its B output channels."""
    a, b = tl.arange(0, A), tl.arange(0, B)
    largest = tl.max(tl.abs(values), 0)
    at = matrix + program.to(tl.int64) * A * B + a[:, None] * B + b[None, :]
    tl.store(at, (values * inverse_power(largest)[None, :]).to(matrix.dtype.element_ty))
    tl.store(scale + program * B + b, power(largest) * factor)


@triton.jit
def unit(x, eps):
    """Rows x / max(|x|, eps), and 1 / max(|x|, eps), 0 for the second where the floor is what counts."""
    by = inverse_power(tl.max(tl.abs(x.to(tl.float32)), 1))
    x = x.to(tl.float32) * by[:, None]
    length = tl.sqrt(tl.sum(x * x, 1))
    floor = eps * by
    length = tl.maximum(length, floor)
    return x / length[:, None], by / length, length > floor


@triton.jit
def apply(
    x,
    matrix,
    scale,
    rows_scale,
    y,
    shift,
    mask,
    out,
    tokens,
    heads,
    dim,
    out_dim,
    prescale,
    eps,
    x_b,
    x_h,
    x_n,
    x_d,
    y_b,
    y_h,
    y_n,
    y_d,
    out_b,
    out_h,
    out_n,
    out_d,
    mask_b,
    mask_n,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    KIND: tl.constexpr,
):
    """out = (prescale x) matrix, times `scale` for each output channel, and then, by KIND:

    "plain"          nothing more; with ROWS a number for each channel of x in place of prescale
    "sign"           - sign(y) shift
    "unit"           x of length 1 in place of prescale x
    "unit_backward"  the gradient of y / max(|y|, eps), if that is the gradient of the unit y
    """
    block, program = tl.program_id(0), tl.program_id(1)
    batch, head = (program // heads).to(tl.int64), (program % heads).to(tl.int64)
    d, e = tl.arange(0, D), tl.arange(0, E)
    n = block * BLOCK + tl.arange(0, BLOCK)
    inside = kept(mask, batch, n, n < tokens, mask_b, mask_n, MASKED)
    rows = tokens_of(x, batch, head, n, d, inside, dim, x_b, x_h, x_n, x_d)
    weights = tl.load(matrix + program.to(tl.int64) * D * E + d[:, None] * E + e[None, :])
    if KIND == "unit":
        wide = unit(rows, eps)[0]
    elif ROWS:
        wide = rows.to(tl.float32) * tl.load(rows_scale + program * D + d)[None, :]
    else:
        wide = rows.to(tl.float32) * prescale
    result = dot(wide.to(rows.dtype), weights)
    result *= tl.load(scale + program * E + e)[None, :]
    if KIND == "sign":
        other = tokens_of(y, batch, head, n, e, inside, out_dim, y_b, y_h, y_n, y_d).to(tl.float32)
        sign = (other > 0).to(tl.float32) - (other < 0).to(tl.float32)
        result -= sign * tl.load(shift + program * E + e)[None, :]
    if KIND == "unit_backward":
        other = tokens_of(y, batch, head, n, e, inside, out_dim, y_b, y_h, y_n, y_d)
        direction, by, free = unit(other, eps)
        along = tl.where(free, tl.sum(result * direction, 1), 0.0)
        result = (result - direction * along[:, None]) * by[:, None]
    at = out + batch * out_b + head * out_h + n.to(tl.int64)[:, None] * out_n + e[None, :] * out_d
    tl.store(at, result.to(out.dtype.element_ty), mask=(n < tokens)[:, None] & (e < out_dim)[None, :])


def pointer(mask: Tensor | None, stand_in: Tensor) -> Tensor:
    """A kernel takes a tensor also where it reads none."""
    return stand_in if mask is None else mask.view(torch.uint8)


def mask_strides(mask: Tensor | None) -> tuple[int, int]:
    return (0, 0) if mask is None else (mask.stride(0), mask.stride(1))


def tokens_first(x: Tensor, width: int) -> Tensor:
    """An empty (B, H, N, width) for an `x` (B, H, N, .), heads beside the channels: what a projection
    reads."""
    batch, heads, tokens, _ = x.shape
    return x.new_empty(batch, tokens, heads, width).transpose(1, 2)


def matrix(like: Tensor, programs: int, wide: int, wide_out: int) -> tuple[Tensor, Tensor]:
    """An empty matrix for `apply` and its empty scales."""
    scale = like.new_empty(programs, wide_out, dtype=torch.float32)
    return like.new_empty(programs, wide, wide_out), scale


def gathered(
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    chunk: int | None = None,
    summed: bool = False,
    unit: bool = False,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`gather`'s parts: products (B H, parts, D', E'), scales and sums (B H, parts, D').

    As many parts as fill the GPU, or one for each `chunk` tokens.
    """
    batch, heads, tokens, dim = k.shape
    value_dim = v.shape[3]
    wide, wide_value = padded(dim), padded(value_dim)
    if chunk is None:
        count, per_part = parts(tokens, batch * heads, k.device)
    else:
        count, per_part = triton.cdiv(tokens, chunk), chunk
    product = k.new_empty(batch * heads, count, wide, wide_value, dtype=torch.float32)
    scale = k.new_empty(batch * heads, count, wide, dtype=torch.float32)
    total = torch.empty_like(scale) if summed else scale
    gather[count, batch * heads](
        k,
        v,
        pointer(mask, k),
        product,
        scale,
        total,
        tokens,
        per_part,
        heads,
        dim,
        value_dim,
        prescale(k.dtype),
        eps,
        *k.stride(),
        *v.stride(),
        *mask_strides(mask),
        D=wide,
        E=wide_value,
        BLOCK=min(BLOCK, per_part),
        MASKED=mask is not None,
        RESCALED=k.dtype != torch.float16,
        SUMMED=summed,
        UNIT=unit,
        num_warps=warps(wide, wide_value),
    )
    return product, scale, total


def applied(
    x: Tensor,
    matrix: Tensor,
    scale: Tensor,
    out: Tensor,
    mask: Tensor | None = None,
    kind: str = "plain",
    y: Tensor | None = None,
    shift: Tensor | None = None,
    rows: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """`apply` for all tokens; `out` is written and returned."""
    batch, heads, tokens, dim = x.shape
    y = x if y is None else y
    wide, wide_out = padded(dim), padded(out.shape[3])
    apply[triton.cdiv(tokens, BLOCK), batch * heads](
        x,
        matrix,
        scale,
        scale if rows is None else rows,
        y,
        scale if shift is None else shift,
        pointer(mask, x),
        out,
        tokens,
        heads,
        dim,
        out.shape[3],
        prescale(x.dtype),
        eps,
        *x.stride(),
        *y.stride(),
        *out.stride(),
        *mask_strides(mask),
        D=wide,
        E=wide_out,
        BLOCK=BLOCK,
        MASKED=mask is not None,
        ROWS=rows is not None,
        KIND=kind,
        num_warps=warps(wide, wide_out),
    )
    return out
