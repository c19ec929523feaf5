"""AFT-conv on a GPU: see sansmax.ops.aft.conv._triton, tiles where the kernel reaches and triples beyond.

q, k, v are read as they lie. The backward pass keeps the means, and two numbers per token and head.
"""

# A launch, kernel[grid](...), is typed as a call of the kernel.
# pyright: reportCallIssue=false, reportArgumentType=false

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ... import _triton as shared
from .. import _triton as tiles
from . import _triton as kernels

# Cells of a block; half of them where registers or shared memory would not suffice.
BLOCK = 64
# Taps of a program that adds up their gradients.
TAPS = 16


class Blocks(NamedTuple):
    """How a grid and a kernel fall into blocks."""

    prefix: int
    rows: int
    columns: int
    size: int  # cells of a block
    shape: tuple[int, int]  # their rows and columns
    prefix_rows: int  # rows of blocks in front of the grid
    block_rows: int
    block_columns: int
    reach: tuple[int, int, int, int]  # up, down, left, right
    centre: tuple[int, int]  # the tap of the query itself
    kernel: tuple[int, int]

    @property
    def all_rows(self) -> int:
        return self.prefix_rows + self.block_rows

    @property
    def programs(self) -> int:
        return self.all_rows * self.block_columns

    @property
    def cells(self) -> tuple[int, int, int]:
        return self.prefix, self.rows, self.columns

    @property
    def offsets(self) -> tuple[int, int, int, int]:
        """How many blocks the kernel reaches up, down, left and right."""
        most = (self.block_rows - 1,) * 2 + (self.block_columns - 1,) * 2
        sizes = (self.shape[0],) * 2 + (self.shape[1],) * 2
        up, down, left, right = (
            min(triton.cdiv(reach, size), m) for reach, size, m in zip(self.reach, sizes, most, strict=True)
        )
        return up, down, left, right

    def beyond(self, causal: bool) -> bool:
        """Whether a block of queries sees others than those that it shares tiles with."""
        up, down, left, right = self.offsets
        last_row, last_column = self.block_rows - 1, self.block_columns - 1
        if causal:
            return left < last_column
        return self.prefix > 0 or min(up, down) < last_row or min(left, right) < last_column


def blocks(v: Tensor, w: Tensor, grid: tuple[int, int], causal: bool, prefix: int) -> Blocks:
    rows, columns = grid
    whole = v.dtype == torch.bfloat16 or (v.dtype == torch.float16 and v.shape[2] // w.shape[0] <= 64)
    size = BLOCK if whole else max(16, BLOCK // 2)
    _, kernel_rows, kernel_columns = w.shape
    height = min(triton.next_power_of_2(rows), 1 << (size.bit_length() - 1) // 2)
    width = min(triton.next_power_of_2(columns), size // height)
    height = size // width
    up, left = kernel_rows // 2, kernel_columns - 1 if causal else kernel_columns // 2
    block_columns = triton.cdiv(columns, width)
    return Blocks(
        prefix,
        rows,
        columns,
        size,
        (height, width),
        triton.cdiv(prefix, size * block_columns),
        triton.cdiv(rows, height),
        block_columns,
        (up, up, left, 0 if causal else left),
        (up, left),
        (kernel_rows, kernel_columns),
    )


def _options(layout: Blocks, dim: int) -> dict[str, Any]:
    return {
        "BLOCK": layout.size,
        "ROWS": layout.shape[0],
        "C": shared.padded(dim),
        "num_warps": 8,
        "num_stages": 2,
    }


def _sums(x: Tensor, layout: Blocks, images: int, dim: int) -> Tensor:
    """Room for a triple of each block."""
    return x.new_empty(3, images, layout.programs, dim, dtype=torch.float32)


def _running(sums: Tensor, layout: Blocks) -> tuple[Tensor, Tensor]:
    """Triples before and from each block of a row of blocks on, and before and from each row on."""
    _, images, _, dim = sums.shape
    groups, width = images * layout.all_rows, layout.block_columns
    strips = tiles.running(sums.view(3, groups, width, dim))
    if layout.all_rows == 1:
        return strips, strips
    whole = strips[0, :, :, width].contiguous().view(3, images, layout.all_rows, dim)
    return strips, tiles.running(whole)


def aft_conv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    mask: Tensor | None,
    grid: tuple[int, int],
    causal: bool,
    prefix: int,
) -> Tensor:
    """w is (H, kernel rows, kernel columns), grid (rows, columns)."""
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, w))
    return _aft_conv(q, k, v, w, mask, *grid, prefix, causal, keep)[0]


@torch.library.custom_op("sansmax::aft_conv", mutates_args=())
def _aft_conv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    mask: Tensor | None,
    rows: int,
    columns: int,
    prefix: int,
    causal: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output; unless `keep` nothing, else means (B, T, C); (2, B, H, T): exponents, 1 / denominators."""
    batch, tokens, channels = q.shape
    heads = k.shape[2]
    dim = channels // heads
    layout = blocks(v, w, (rows, columns), causal, prefix)
    options = _options(layout, dim) | {"MASKED": mask is not None}
    beyond = layout.beyond(causal)
    pointer = shared.pointer(mask, q)
    strips = whole = q
    if beyond:
        sums = _sums(q, layout, batch * heads, dim)
        kernels.key_totals[layout.programs, heads, batch](
            k,
            v,
            pointer,
            sums,
            dim,
            *layout.cells,
            layout.prefix_rows,
            layout.block_columns,
            *k.stride(),
            *v.stride(),
            *shared.mask_strides(mask),
            **options,
        )
        strips, whole = _running(sums, layout)
    out, means, numbers = _empty(q, k, keep)
    kernels.forward[layout.programs, heads, batch](
        q,
        k,
        v,
        w,
        pointer,
        strips,
        whole,
        out,
        *((means, *numbers) if keep else (out,) * 3),
        tokens,
        dim,
        *layout.cells,
        layout.prefix_rows,
        layout.block_rows,
        layout.block_columns,
        *layout.reach,
        *layout.centre,
        *layout.kernel,
        *q.stride(),
        *k.stride(),
        *v.stride(),
        *w.stride(),
        *shared.mask_strides(mask),
        CAUSAL=causal,
        BEYOND=beyond,
        SEVERAL=layout.all_rows > 1,
        KEPT=keep,
        **options,
    )
    return out, means, numbers


@_aft_conv.register_fake
def _(q, k, v, w, mask, rows, columns, prefix, causal, keep):
    return _empty(q, k, keep)


def _empty(q: Tensor, k: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, heads = k.shape
    means = q.new_empty(q.shape if keep else (0, 0, 0), dtype=torch.float32)
    numbers = (2, batch, heads, tokens) if keep else (2, 0, 0, 0)
    return q.new_empty(q.shape), means, q.new_empty(numbers, dtype=torch.float32)


@torch.library.custom_op("sansmax::aft_conv_backward", mutates_args=())
def _aft_conv_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    mask: Tensor | None,
    means: Tensor,
    numbers: Tensor,
    rows: int,
    columns: int,
    prefix: int,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and w."""
    batch, tokens, channels = q.shape
    heads = k.shape[2]
    dim = channels // heads
    layout = blocks(v, w, (rows, columns), causal, prefix)
    beyond = layout.beyond(causal)
    options = _options(layout, dim)
    tops, inverse = numbers
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    # float16's range is too small.
    grads = torch.empty_like(means, dtype=torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32)
    along = torch.empty_like(tops)
    sums = strips = whole = q
    if beyond:
        sums = _sums(q, layout, batch * heads, dim)
    kernels.query_totals[layout.programs, heads, batch](
        grad,
        q,
        means,
        tops,
        inverse,
        grads,
        along,
        dq,
        sums,
        tokens,
        dim,
        *layout.cells,
        layout.prefix_rows,
        layout.block_columns,
        *grad.stride(),
        *q.stride(),
        BEYOND=beyond,
        **options,
    )
    if beyond:
        strips, whole = _running(sums, layout)
    options |= {"CAUSAL": causal, "MASKED": mask is not None}
    inputs = k, v, w, shared.pointer(mask, q)
    strides = *k.stride(), *v.stride(), *w.stride(), *shared.mask_strides(mask)
    kernels.backward[layout.programs, heads, batch](
        *inputs,
        strips,
        whole,
        grads,
        along,
        tops,
        dk,
        dv,
        tokens,
        dim,
        *layout.cells,
        layout.prefix_rows,
        layout.block_rows,
        layout.block_columns,
        *layout.reach,
        *layout.centre,
        *layout.kernel,
        *strides,
        BEYOND=beyond,
        SEVERAL=layout.all_rows > 1,
        **options,
    )
    up, down, left, right = layout.offsets
    offset_rows, offset_columns = up + down + 1, left + right + 1
    offsets = offset_rows * offset_columns
    grid_blocks = batch * layout.block_rows * layout.block_columns
    count = min(grid_blocks, max(1, shared.programs(q.device) // (heads * offsets)))
    pairs = q.new_empty(count, heads, offsets, layout.size, layout.size, dtype=torch.float32)
    kernels.bias_backward[offsets, heads, count](
        *inputs,
        grads,
        along,
        tops,
        pairs,
        batch,
        tokens,
        dim,
        *layout.cells,
        layout.block_rows,
        layout.block_columns,
        up,
        left,
        offset_columns,
        *layout.centre,
        *layout.kernel,
        *strides,
        **options,
    )
    dw = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    kernels.taps[triton.cdiv(layout.kernel[0] * layout.kernel[1], TAPS), heads](
        pairs,
        dw,
        count,
        offset_rows,
        offset_columns,
        up,
        left,
        *layout.centre,
        *layout.kernel,
        BLOCK=layout.size,
        ROWS=layout.shape[0],
        TAPS=TAPS,
    )
    return dq, dk, dv, dw


@_aft_conv_backward.register_fake
def _(grad, q, k, v, w, mask, means, numbers, rows, columns, prefix, causal):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, w))


def _keep(ctx, inputs, output):
    *tensors, rows, columns, prefix, causal, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.options = rows, columns, prefix, causal


def _differentiate(ctx, grad, *_):
    gradients = _aft_conv_backward(grad, *ctx.saved_tensors, *ctx.options)
    return *gradients, *(None,) * 6


_aft_conv.register_autograd(_differentiate, setup_context=_keep)
