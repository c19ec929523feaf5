"""Triton kernels of AFT-conv: tiles of BLOCK queries and BLOCK keys as far as the kernel w reaches.

A block is a patch of ROWS rows and BLOCK / ROWS columns of the grid. The blocks that the kernel reaches from
a block of queries are a rectangle of blocks around it: in a tile the bias is w or 0, so that nothing needs
to be aligned with the kernel. What lies outside of the rectangle has the bias 0 for all queries alike and
comes from triples of whole blocks, added up before and after each block of a row, and before and after each
row of blocks. Prefix tokens are rows of blocks of their own, in front of the grid, which no tile reaches.

One key serves all channels of a head, so a tile is that of attention: p (BLOCK, BLOCK) times v (BLOCK, C),
with a maximum per query. Exponents are (k_u - top_t) + w_tu: k and top may be large, their difference is not.

The backward pass knows the mean r, top and 1 / den, so that

    p_tu = exp(k_u + w_tu - top_t)            g = grad sigmoid(q) / den
    dv_u = sum_t p_tu g_t     dk_u = sum_t p_tu g_t . (v_u - r_t)     dw_tu = sum_b p_tu g_t . (v_u - r_t)

g is rounded before g_t . v_u and g_t . r_t alike, and v is exact in the products, so that their difference
does not drown where values share a large number.
"""

# A launch, kernel[grid](...), is typed as a call of the kernel, and a reduction in it as a tuple.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false

import triton
import triton.language as tl

from ..._triton import kept
from .._triton import INFINITY, LOWEST, gate_of, joined, product, tile

# Where k is so large that top is rounded by more, an exponent is cut off.
LARGEST = tl.constexpr(20.0)


@triton.jit
def cells(row, column, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Grid rows and columns of the block at (row, column)."""
    i = tl.arange(0, BLOCK)
    COLUMNS: tl.constexpr = BLOCK // ROWS
    return row * ROWS + i // COLUMNS, column * COLUMNS + i % COLUMNS


@triton.jit
def tokens_at(r, c, prefix, rows, columns):
    """The tokens of cells, and which of them are there."""
    return prefix + r * columns + c, (r < rows) & (c < columns)


@triton.jit
def place(block, prefix, rows, columns, prefix_rows, block_columns, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """The row of a block (negative in the prefix) and its column, grid rows and columns, tokens, and which
    of them are there."""
    row, column = block // block_columns - prefix_rows, block % block_columns
    r, c = cells(row, column, BLOCK, ROWS)
    n, inside = tokens_at(r, c, prefix, rows, columns)
    front = block * BLOCK + tl.arange(0, BLOCK)
    in_front = row < 0
    return row, column, r, c, tl.where(in_front, front, n), tl.where(in_front, front < prefix, inside)


@triton.jit
def reached(row, column, block_rows, block_columns, up, down, left, right, COLUMNS, ROWS):
    """The rectangle of blocks that cells so far away lie in: first and end of rows, of columns."""
    row_first = tl.maximum(row * ROWS - up, 0) // ROWS
    row_end = tl.minimum((row * ROWS + ROWS - 1 + down) // ROWS + 1, block_rows)
    first = tl.maximum(column * COLUMNS - left, 0) // COLUMNS
    end = tl.minimum((column * COLUMNS + COLUMNS - 1 + right) // COLUMNS + 1, block_columns)
    # Nothing of a prefix.
    return tl.where(row < 0, block_rows, row_first), tl.where(row < 0, block_rows, row_end), first, end


@triton.jit
def entry(sums, side, groups, group, at, size, c, dim):
    """The triple that `scan` left for block `at` of a group, or for row `at`."""
    step = groups.to(tl.int64) * (size + 1) * dim
    at = sums + side * 3 * step + (group * (size + 1) + at) * dim + c
    inside = c < dim
    a, b = tl.load(at, mask=inside, other=0.0), tl.load(at + step, mask=inside, other=0.0)
    return a, b, tl.load(at + 2 * step, mask=inside, other=LOWEST)


@triton.jit
def beyond(
    strips,
    whole,
    image,
    images,
    row_first,
    row_end,
    first,
    end,
    prefix_rows,
    block_rows,
    block_columns,
    c,
    dim,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    SEVERAL: tl.constexpr,
):
    """The triple of all blocks outside of a rectangle: rows above and below, strips before and after it."""
    all_rows = prefix_rows + block_rows
    a, b = tl.zeros([c.shape[0]], tl.float32), tl.zeros([c.shape[0]], tl.float32)
    top = tl.full([c.shape[0]], LOWEST, tl.float32)
    if SEVERAL:
        a, b, top = entry(whole, 0, images, image, row_first + prefix_rows, all_rows, c, dim)
        other_a, other_b, other_top = entry(whole, 1, images, image, row_end + prefix_rows, all_rows, c, dim)
        a, b, top = joined(a, b, top, other_a, other_b, other_top)
    groups = images * all_rows
    for row in range(row_first, row_end):
        group = image * all_rows + prefix_rows + row
        if BEFORE:
            other_a, other_b, other_top = entry(strips, 0, groups, group, first, block_columns, c, dim)
            a, b, top = joined(a, b, top, other_a, other_b, other_top)
        if AFTER:
            other_a, other_b, other_top = entry(strips, 1, groups, group, end, block_columns, c, dim)
            a, b, top = joined(a, b, top, other_a, other_b, other_top)
    return a, b, top


@triton.jit
def keys_of(k, batch, n, keep, stride_b, stride_n):
    """Keys of one head, -inf for those left out."""
    at = k + batch * stride_b + n.to(tl.int64) * stride_n
    return tl.where(keep, tl.load(at, mask=keep, other=0.0).to(tl.float32), -INFINITY)


@triton.jit
def bias_of(
    w,
    t_r,
    t_c,
    u_r,
    u_c,
    centre_row,
    centre_column,
    kernel_rows,
    kernel_columns,
    w_r,
    w_c,
    CAUSAL: tl.constexpr,
):
    """w for the queries t and the keys u, 0 outside the kernel; causal, -inf for keys of the future."""
    row, column = u_r - t_r + centre_row, u_c - t_c + centre_column
    inside = (row.to(tl.uint32) < kernel_rows) & (column.to(tl.uint32) < kernel_columns)
    at = (u_r * w_r + u_c * w_c) - ((t_r - centre_row) * w_r + (t_c - centre_column) * w_c)
    bias = tl.load(w + at, mask=inside, other=0.0).to(tl.float32)
    return tl.where(u_c <= t_c, bias, -INFINITY) if CAUSAL else bias


@triton.jit
def power(exponent):
    return tl.exp(tl.minimum(exponent, LARGEST))


@triton.jit
def rounded(p, DTYPE: tl.constexpr):
    """p as `product` takes it: a weight in the numerator is then the same in the denominator."""
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        return p.to(tl.bfloat16).to(tl.float32)
    if DTYPE == tl.float16:  # noqa: SIM300
        return (p.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return p


@triton.jit
def put(sums, images, image, blocks, block, c, dim, a, b, top):
    """The triple of a block, (3, images, blocks, dim)."""
    step = images.to(tl.int64) * blocks * dim
    at = sums + (image * blocks + block) * dim + c
    tl.store(at, a, mask=c < dim)
    tl.store(at + step, b, mask=c < dim)
    tl.store(at + 2 * step, tl.zeros([c.shape[0]], tl.float32) + top, mask=c < dim)


@triton.jit
def key_totals(
    k,
    v,
    mask,
    sums,
    dim,
    prefix,
    rows,
    columns,
    prefix_rows,
    block_columns,
    k_b,
    k_n,
    k_h,
    v_b,
    v_n,
    v_c,
    mask_b,
    mask_n,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Triples (num, den, top) of the keys of each block."""
    block, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    c = tl.arange(0, C)
    _, _, _, _, u, inside = place(block, prefix, rows, columns, prefix_rows, block_columns, BLOCK, ROWS)
    keep = kept(mask, batch, u, inside, mask_b, mask_n, MASKED)
    x = keys_of(k + head * k_h, batch, u, keep, k_b, k_n)
    y = tile(v + head * dim * v_c, batch, u, c, keep, dim, v_b, v_n, v_c)
    top = tl.maximum(tl.max(x, 0), LOWEST)
    p = tl.exp(x - top)
    num, den = tl.sum(p[:, None] * y, 0), tl.zeros([C], tl.float32) + tl.sum(p, 0)
    images = tl.num_programs(2) * heads
    put(sums, images, batch * heads + head, tl.num_programs(0), block, c, dim, num, den, top)


@triton.jit
def forward(
    q,
    k,
    v,
    w,
    mask,
    strips,
    whole,
    out,
    means,
    tops,
    inverse,
    tokens,
    dim,
    prefix,
    rows,
    columns,
    prefix_rows,
    block_rows,
    block_columns,
    up,
    down,
    left,
    right,
    centre_row,
    centre_column,
    kernel_rows,
    kernel_columns,
    q_b,
    q_n,
    q_c,
    k_b,
    k_n,
    k_h,
    v_b,
    v_n,
    v_c,
    w_h,
    w_r,
    w_c,
    mask_b,
    mask_n,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    CAUSAL: tl.constexpr,
    BEYOND: tl.constexpr,
    SEVERAL: tl.constexpr,
    MASKED: tl.constexpr,
    KEPT: tl.constexpr,
):
    """A block of queries of one head."""
    block, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    image = batch * heads + head
    c = tl.arange(0, C)
    row, column, t_r, t_c, t, inside = place(
        block, prefix, rows, columns, prefix_rows, block_columns, BLOCK, ROWS
    )
    row_first, row_end, first, end = reached(
        row, column, block_rows, block_columns, up, down, left, right, BLOCK // ROWS, ROWS
    )
    num, den = tl.zeros([BLOCK, C], tl.float32), tl.zeros([BLOCK], tl.float32)
    top = tl.full([BLOCK], LOWEST, tl.float32)
    if BEYOND:
        a, b, high = beyond(
            strips,
            whole,
            image,
            heads * tl.num_programs(2),
            row_first,
            row_end,
            first,
            end,
            prefix_rows,
            block_rows,
            block_columns,
            c,
            dim,
            True,
            not CAUSAL,
            SEVERAL,
        )
        num, den, top = num + a[None, :], den + tl.max(b, 0), tl.maximum(top, tl.max(high, 0))
    width = end - first
    for i in range((row_end - row_first) * width):
        u_r, u_c = cells(row_first + i // width, first + i % width, BLOCK, ROWS)
        u, there = tokens_at(u_r, u_c, prefix, rows, columns)
        keep = kept(mask, batch, u, there, mask_b, mask_n, MASKED)
        x = keys_of(k + head * k_h, batch, u, keep, k_b, k_n)
        y = tile(v + head * dim * v_c, batch, u, c, keep, dim, v_b, v_n, v_c)
        bias = bias_of(
            w + head * w_h,
            t_r[:, None],
            t_c[:, None],
            u_r[None, :],
            u_c[None, :],
            centre_row,
            centre_column,
            kernel_rows,
            kernel_columns,
            w_r,
            w_c,
            CAUSAL,
        )
        raised = tl.maximum(top, tl.max(x[None, :] + bias, 1))
        p = rounded(power((x[None, :] - raised[:, None]) + bias), v.dtype.element_ty)
        by = tl.exp(top - raised)
        num = num * by[:, None] + product(p, y, v.dtype.element_ty)
        den = den * by + tl.sum(p, 1)
        top = raised
    empty = den == 0
    den = tl.where(empty, 1.0, den)
    r = num / den[:, None]
    gate = gate_of(tile(q + head * dim * q_c, batch, t, c, inside, dim, q_b, q_n, q_c))
    at = (batch * tokens + t.to(tl.int64)[:, None]) * heads * dim + head * dim + c[None, :]
    here = inside[:, None] & (c < dim)[None, :]
    tl.store(out + at, (gate * r).to(out.dtype.element_ty), mask=here)
    if KEPT:
        tl.store(means + at, r, mask=here)
        tl.store(tops + image * tokens + t, tl.where(empty, -LOWEST, top), mask=inside)
        tl.store(inverse + image * tokens + t, tl.where(empty, 0.0, 1 / den), mask=inside)


@triton.jit
def query_totals(
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
    prefix,
    rows,
    columns,
    prefix_rows,
    block_columns,
    grad_b,
    grad_n,
    grad_c,
    q_b,
    q_n,
    q_c,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    BEYOND: tl.constexpr,
):
    """g, g . r, dq, and triples (sum g, sum g r) of each block of queries with the exponents -top."""
    block, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    image = batch * heads + head
    c = tl.arange(0, C)
    _, _, _, _, t, inside = place(block, prefix, rows, columns, prefix_rows, block_columns, BLOCK, ROWS)
    gate = gate_of(tile(q + head * dim * q_c, batch, t, c, inside, dim, q_b, q_n, q_c))
    g = tile(grad + head * dim * grad_c, batch, t, c, inside, dim, grad_b, grad_n, grad_c)
    g *= gate
    at = (batch * tokens + t.to(tl.int64)[:, None]) * heads * dim + head * dim + c[None, :]
    here = inside[:, None] & (c < dim)[None, :]
    r = tl.load(means + at, mask=here, other=0.0)
    tl.store(dq + at, (g * r * (1 - gate)).to(dq.dtype.element_ty), mask=here)
    g *= tl.load(inverse + image * tokens + t, mask=inside, other=0.0)[:, None]
    g = rounded(g, q.dtype.element_ty)
    tl.store(along + image * tokens + t, tl.sum(g * r, 1), mask=inside)
    tl.store(grads + at, g.to(grads.dtype.element_ty), mask=here)
    if BEYOND:
        top = tl.load(tops + image * tokens + t, mask=inside, other=-LOWEST)
        high = -tl.min(top, 0)
        g *= tl.exp(-top - high)[:, None]
        images = tl.num_programs(2) * heads
        put(sums, images, image, tl.num_programs(0), block, c, dim, tl.sum(g, 0), tl.sum(g * r, 0), high)


@triton.jit
def queries_of(grads, along, tops, batch, head, heads, t, c, inside, tokens, dim):
    """g, g . r and top of a block of queries; outside as without keys."""
    at = (batch * tokens + t.to(tl.int64)[:, None]) * heads * dim + head * dim + c[None, :]
    here = inside[:, None] & (c < dim)[None, :]
    g = tl.load(grads + at, mask=here, other=0.0).to(tl.float32)
    at = (batch * heads + head) * tokens + t
    e = tl.load(along + at, mask=inside, other=0.0)
    return g, e, tl.load(tops + at, mask=inside, other=-LOWEST)


@triton.jit
def backward(
    k,
    v,
    w,
    mask,
    strips,
    whole,
    grads,
    along,
    tops,
    dk,
    dv,
    tokens,
    dim,
    prefix,
    rows,
    columns,
    prefix_rows,
    block_rows,
    block_columns,
    up,
    down,
    left,
    right,
    centre_row,
    centre_column,
    kernel_rows,
    kernel_columns,
    k_b,
    k_n,
    k_h,
    v_b,
    v_n,
    v_c,
    w_h,
    w_r,
    w_c,
    mask_b,
    mask_n,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    CAUSAL: tl.constexpr,
    BEYOND: tl.constexpr,
    SEVERAL: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dk and dv of a block of keys of one head."""
    block, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    c = tl.arange(0, C)
    row, column, u_r, u_c, u, there = place(
        block, prefix, rows, columns, prefix_rows, block_columns, BLOCK, ROWS
    )
    # The queries that reach these keys.
    row_first, row_end, first, end = reached(
        row, column, block_rows, block_columns, down, up, right, left, BLOCK // ROWS, ROWS
    )
    keep = kept(mask, batch, u, there, mask_b, mask_n, MASKED)
    x = keys_of(k + head * k_h, batch, u, keep, k_b, k_n)
    y = tile(v + head * dim * v_c, batch, u, c, keep, dim, v_b, v_n, v_c)
    to_k, to_v = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK, C], tl.float32)
    if BEYOND:
        a, b, high = beyond(
            strips,
            whole,
            batch * heads + head,
            heads * tl.num_programs(2),
            row_first,
            row_end,
            first,
            end,
            prefix_rows,
            block_rows,
            block_columns,
            c,
            dim,
            not CAUSAL,
            True,
            SEVERAL,
        )
        far = power(x + tl.max(high, 0))
        to_v += far[:, None] * a[None, :]
        to_k += far * tl.sum(y * a[None, :] - b[None, :], 1)
    width = end - first
    for i in range((row_end - row_first) * width):
        t_r, t_c = cells(row_first + i // width, first + i % width, BLOCK, ROWS)
        t, inside = tokens_at(t_r, t_c, prefix, rows, columns)
        g, e, top = queries_of(grads, along, tops, batch, head, heads, t, c, inside, tokens, dim)
        bias = bias_of(
            w + head * w_h,
            t_r[None, :],
            t_c[None, :],
            u_r[:, None],
            u_c[:, None],
            centre_row,
            centre_column,
            kernel_rows,
            kernel_columns,
            w_r,
            w_c,
            CAUSAL,
        )
        p = power((x[:, None] - top[None, :]) + bias)
        to_v += product(p, g, v.dtype.element_ty)
        s = product(y, tl.trans(g), v.dtype.element_ty) - e[None, :]
        to_k += tl.sum(p * s, 1)
    at = (batch * tokens + u.to(tl.int64)) * heads + head
    tl.store(dk + at, to_k.to(dk.dtype.element_ty), mask=there)
    here = there[:, None] & (c < dim)[None, :]
    tl.store(dv + at[:, None] * dim + c[None, :], to_v.to(dv.dtype.element_ty), mask=here)


@triton.jit
def bias_backward(
    k,
    v,
    w,
    mask,
    grads,
    along,
    tops,
    pairs,
    batches,
    tokens,
    dim,
    prefix,
    rows,
    columns,
    block_rows,
    block_columns,
    before_row,
    before_column,
    offset_columns,
    centre_row,
    centre_column,
    kernel_rows,
    kernel_columns,
    k_b,
    k_n,
    k_h,
    v_b,
    v_n,
    v_c,
    w_h,
    w_r,
    w_c,
    mask_b,
    mask_n,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dw (parts, H, offsets, BLOCK, BLOCK) by pairs of cells of two blocks that lie so many blocks apart."""
    offset, head, part = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    offsets, heads, parts = tl.num_programs(0), tl.num_programs(1), tl.num_programs(2)
    c = tl.arange(0, C)
    by_row, by_column = offset // offset_columns - before_row, offset % offset_columns - before_column
    t_r, t_c = cells(0, 0, BLOCK, ROWS)
    u_r, u_c = cells(by_row, by_column, BLOCK, ROWS)
    bias = bias_of(
        w + head * w_h,
        t_r[:, None],
        t_c[:, None],
        u_r[None, :],
        u_c[None, :],
        centre_row,
        centre_column,
        kernel_rows,
        kernel_columns,
        w_r,
        w_c,
        CAUSAL,
    )
    # The blocks of queries whose partner is in the grid.
    row_first, column_first = tl.maximum(-by_row, 0), tl.maximum(-by_column, 0)
    height, width = block_rows - tl.abs(by_row), block_columns - tl.abs(by_column)
    count = batches * height * width
    per_part = (count + parts - 1) // parts
    to_w = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i in range(part * per_part, tl.minimum((part + 1) * per_part, count)):
        batch = (i // (height * width)).to(tl.int64)
        row, column = row_first + i // width % height, column_first + i % width
        t_r, t_c = cells(row, column, BLOCK, ROWS)
        t, inside = tokens_at(t_r, t_c, prefix, rows, columns)
        g, e, top = queries_of(grads, along, tops, batch, head, heads, t, c, inside, tokens, dim)
        u_r, u_c = cells(row + by_row, column + by_column, BLOCK, ROWS)
        u, there = tokens_at(u_r, u_c, prefix, rows, columns)
        keep = kept(mask, batch, u, there, mask_b, mask_n, MASKED)
        x = keys_of(k + head * k_h, batch, u, keep, k_b, k_n)
        y = tile(v + head * dim * v_c, batch, u, c, keep, dim, v_b, v_n, v_c)
        s = product(g, tl.trans(y), v.dtype.element_ty) - e[:, None]
        to_w += power((x[None, :] - top[:, None]) + bias) * s
    i = tl.arange(0, BLOCK)
    at = pairs + ((part * heads + head) * offsets + offset) * BLOCK * BLOCK
    tl.store(at + i[:, None] * BLOCK + i[None, :], to_w)


@triton.jit
def taps(
    pairs,
    dw,
    parts,
    offset_rows,
    offset_columns,
    before_row,
    before_column,
    centre_row,
    centre_column,
    kernel_rows,
    kernel_columns,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TAPS: tl.constexpr,
):
    """dw (H, kernel rows, kernel columns): each tap adds up the pairs of cells that lie so far apart."""
    head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    COLUMNS: tl.constexpr = BLOCK // ROWS
    tap = tl.program_id(0) * TAPS + tl.arange(0, TAPS)
    t_r, t_c = cells(0, 0, BLOCK, ROWS)
    # The cell of the key, counted from the first block of the first offset.
    r = t_r[None, :] + (tap // kernel_columns - centre_row + before_row * ROWS)[:, None]
    c = t_c[None, :] + (tap % kernel_columns - centre_column + before_column * COLUMNS)[:, None]
    inside = (r >= 0) & (r < offset_rows * ROWS) & (c >= 0) & (c < offset_columns * COLUMNS)
    inside &= (tap < kernel_rows * kernel_columns)[:, None]
    offset = r // ROWS * offset_columns + c // COLUMNS
    at = (offset * BLOCK + tl.arange(0, BLOCK)[None, :]) * BLOCK + r % ROWS * COLUMNS + c % COLUMNS
    size = offset_rows * offset_columns * BLOCK * BLOCK
    acc = tl.zeros([TAPS, BLOCK], tl.float32)
    for part in range(parts):
        acc += tl.load(pairs + (part * heads + head) * size + at, mask=inside, other=0.0)
    count = kernel_rows * kernel_columns
    tl.store(dw + head * count + tap, tl.sum(acc, 1).to(dw.dtype.element_ty), mask=tap < count)
