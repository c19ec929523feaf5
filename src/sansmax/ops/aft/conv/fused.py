"""AFT-conv as a depth-wise convolution with the kernel, plus the tokens that the kernel does not reach.

Numerators exp(k) v and denominators exp(k) are channels of one convolution. Eq. 6 convolves with exp(w) - 1
and adds the sum over ALL tokens: cheapest, but it cancels where a large key lies under a negative w. The
positive form convolves with exp(w) and sums the tokens out of reach apart, so that nothing is subtracted:
1.4 times the time, full precision until a sum underflows. `by_regions` gives each region a maximum of its
own and is always right. Causal, where one maximum for all rows would let the future decide, the positive form
has no maximum and serves keys near 0, sums before the kernel as prefix sums; else it is by regions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._backend import no_autocast
from ..._depthwise import depthwise
from ..._eager import finite, holds_values, overwritable, readable
from ..._matmul import prefix_sums
from .. import _triple
from ._regions import by_regions, distance

# Eq. 6 multiplies rounding errors by exp(-w), here at most 20.
_LOWEST_OF_EQ6 = -3.0

# A sum below exp(-60) of the largest key may lack terms that float32 flushed to zero, and exp(w) lifts those.
_LOWEST_SUM, _HIGHEST_W = -60.0, 40.0

# Up to this length a matrix sums the tokens out of reach faster than cumulative sums do.
_SHORT = 256


def within(w: Tensor) -> bool:
    """Whether Eq. 6 is exact with this kernel, whatever the keys."""
    low, high = w.detach().aminmax()
    return bool((low >= _LOWEST_OF_EQ6) & (high <= _HIGHEST_W))


def aft_conv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    grid: tuple[int, int],
    causal: bool,
    prefix: int,
    bounded: bool = False,
) -> Tensor:
    """w is (H, kernel rows, kernel columns), grid (rows, columns); masked keys hold -inf, masked values 0."""
    dtype = q.dtype
    with no_autocast(q):
        q, k, v, w = (t.to(torch.promote_types(dtype, torch.float32)) for t in (q, k, v, w))
        v = v.unflatten(-1, (k.shape[-1], -1))  # (B, T, H, dh)
        if causal:
            average = _causal(k, v, w)
            if average is None:
                average = by_regions(k.mT, v.transpose(1, 2), w, grid, prefix, short=None).transpose(1, 2)
        else:
            average = _centred(k, v, w, grid, prefix, bounded)
        average = average.flatten(-2)
        return (average.mul_(q.sigmoid()) if overwritable(q, average) else q.sigmoid() * average).to(dtype)


def _causal(k: Tensor, v: Tensor, w: Tensor) -> Tensor | None:
    """The averages (B, T, H, dh); None where keys, biases or values are extreme, or cannot be read.

    Weights are not scaled, so that rows do not depend on later ones.
    """
    if not (readable(k, v, w) and _triple.near(k.detach(), w.detach().abs().amax().item())):
        return None
    if not _triple.weighable(v.detach().flatten(-2)):
        return None
    heads, width = v.shape[-2:]
    weights, taps = k.exp(), w.exp()  # (B, T, H), (H, 1, s)
    num = _causal_sums((weights.unsqueeze(-1) * v).flatten(-2), taps.repeat_interleave(width, 0))
    if not finite(num):
        return None
    num, den = num.unflatten(-1, (heads, width)), _causal_sums(weights, taps)
    if den[:, 0].amin().item() == 0:  # masked
        den = den.masked_fill(den == 0, 1)
    den = den.unsqueeze(-1)
    return num.div_(den) if overwritable(num, den) else num / den


def _causal_sums(x: Tensor, taps: Tensor) -> Tensor:
    """x (B, T, C), taps (C, 1, s) -> the taps that end at each token plus the sum over all before them."""
    tokens, size = x.shape[1], taps.shape[2]
    near = depthwise(x.unsqueeze(1), taps.unsqueeze(1), (0, size - 1)).squeeze(1)[:, :tokens]
    if tokens <= size:
        return near
    far = prefix_sums(x, spare=True)[:, : tokens - size]
    if overwritable(near, far):
        near[:, size:] += far
        return near
    return near + F.pad(far, (0, 0, size, 0))


def _centred(k: Tensor, v: Tensor, w: Tensor, grid: tuple[int, int], prefix: int, bounded: bool) -> Tensor:
    """The averages (B, T, H, dh)."""
    if bounded:
        return _by_convolution(k, v, w, grid, prefix, None)[0]
    # A symbolic length is not an int: an exported graph serves all of them.
    short = (isinstance(grid[0], int) and grid[0] <= _SHORT, isinstance(grid[1], int) and grid[1] <= _SHORT)

    def regions(k, v, w, like):
        # A sequence's length is taken from its keys: torch 2.10's cond cannot take it from outside.
        inside = (1, k.shape[-1] - prefix) if grid[0] == 1 else grid
        average = by_regions(k, v, w, inside, prefix, short).transpose(1, 2)
        # Else an exported graph cannot see that the branches agree on the batch, and asks for two images.
        return average.clone(memory_format=torch.contiguous_format).view_as(like)

    compiling, readable = torch.compiler.is_compiling(), holds_values(k, v, w)
    if readable and within(w):
        return _by_convolution(k, v, w, grid, prefix, None)[0]
    average, exact = _by_convolution(k, v, w, grid, prefix, short)
    operands = (k.mT, v.transpose(1, 2), w, v)
    if not compiling:
        return average if readable and exact else regions(*operands)
    # cond wants the outputs and the gradients of both branches in one shape and memory layout.
    operands = tuple(t.contiguous() for t in operands)
    return torch.where(exact, average, torch.cond(exact, lambda *x: x[-1].clone(), regions, operands))


def _by_convolution(
    k: Tensor, v: Tensor, w: Tensor, grid: tuple[int, int], prefix: int, short: tuple[bool, bool] | None
) -> tuple[Tensor, Tensor]:
    """The averages (B, T, H, dh), and whether no sum underflowed; gradients are finite even then.

    `short` tells of each side of the grid whether a matrix serves it; None asks for Eq. 6.
    """
    heads, width = v.shape[-2:]
    top = k.detach().amax(1, keepdim=True)
    weights = _triple.weight(k, top)  # (B, T, H)
    x = torch.cat([(weights.unsqueeze(-1) * v).flatten(-2), weights], -1)  # (B, T, C + H)
    cells = x[:, prefix:].unflatten(1, grid)  # (B, rows, columns, C + H)
    taps = w.expm1() if short is None else w.clamp(max=_HIGHEST_W).exp()
    kernel = torch.cat([taps.repeat_interleave(width, 0), taps]).unsqueeze(1)
    sums = depthwise(cells, kernel)
    if short is None:
        sums = sums.flatten(1, 2) + x.sum(1, keepdim=True)
    else:
        sums = (sums + _out_of_reach(cells, w.shape[1] // 2, w.shape[2] // 2, short)).flatten(1, 2)
        if prefix:
            sums = sums + x[:, :prefix].sum(1, keepdim=True)
    if prefix:
        sums = torch.cat([x.sum(1, keepdim=True).expand(-1, prefix, -1), sums], 1)
    num, den = sums.split([heads * width, heads], -1)
    high = w.detach().max()
    lost = den < (high.clamp(min=0) + _LOWEST_SUM).exp()
    exact = ~(lost & (top > -torch.inf)).any() & (high <= _HIGHEST_W)
    return num.unflatten(-1, (heads, width)) / den.masked_fill(lost, 1).unsqueeze(-1), exact


def _out_of_reach(cells: Tensor, row_reach: int, column_reach: int, short: tuple[bool, bool]) -> Tensor:
    """For each cell of (B, rows, columns, C) the sum over all cells outside the kernel around it."""
    far_rows = _far(cells.sum(2), row_reach, short[0]).unsqueeze(2)
    far_columns = _far(cells, column_reach, short[1])
    if row_reach:
        near = (distance(cells.shape[1], cells.device) <= row_reach).to(cells.dtype)
        far_columns = (near @ far_columns.flatten(2)).view_as(cells)
    return far_rows + far_columns


def _far(x: Tensor, reach: int, short: bool) -> Tensor:
    """y_t = sum of x_u over |u - t| > reach; tokens in dimension -2."""
    length = x.shape[-2]
    if short:
        return (distance(length, x.device) > reach).to(x.dtype) @ x
    before = F.pad(x.cumsum(-2), (0, 0, reach + 1, 0)).narrow(-2, 0, length)
    after = F.pad(x.flip(-2).cumsum(-2).flip(-2), (0, 0, 0, reach + 1)).narrow(-2, reach + 1, length)
    return before + after
