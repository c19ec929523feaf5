"""AFT-local in blocks of queries: one batched product with the keys that any of them has in its window, and
the sums over all keys before and after, which carry no bias."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._backend import no_autocast
from ..._eager import exporting, for_all
from .. import _triple
from ..full import fused as full


class Blocks(NamedTuple):
    """Block i holds the queries from i size on and the keys [i size - behind, i size + size + ahead)."""

    window: int
    causal: bool
    size: int
    behind: int
    ahead: int

    @property
    def width(self) -> int:
        return self.behind + self.size + self.ahead

    def pad(self, x: Tensor, value: float | None = None) -> Tensor:
        """(T, ...) -> (behind + blocks size + ahead, ...)."""
        back = -x.shape[0] % self.size + self.ahead
        return F.pad(x, (0, 0) * (x.ndim - 1) + (self.behind, back), value=value)


def blocks(window: int, causal: bool) -> Blocks:
    behind = max(window - 1, 0)
    return Blocks(window, causal, 64 if window <= 64 else 128, behind, 0 if causal else behind)


def pairs(tokens: int, window: int, causal: bool) -> int:
    """Pairs of positions multiplied: all of them in a short sequence."""
    shape = blocks(window, causal)
    if _short(tokens, shape):
        return tokens * tokens
    return -(-tokens // shape.size) * shape.size * shape.width


def _short(tokens: int, shape: Blocks) -> bool:
    """Whether the T x T bias costs no more than its band."""
    return tokens <= max(2 * shape.width, shape.window)


def aft_local(q: Tensor, k: Tensor, v: Tensor, w: full.Bias, window: int, causal: bool) -> Tensor:
    """Masked keys are -inf and hold zeros in v."""
    dtype = q.dtype
    with no_autocast(q):
        if dtype in (torch.float16, torch.bfloat16):
            q, k, v = q.float(), k.float(), v.float()
        w = full.crop(w, k.shape[1])
        if torch.compiler.is_compiling():
            # An exported graph would fix the number of blocks.
            whole = for_all(k.shape[1])
        else:
            whole = _short(k.shape[1], blocks(window, causal))
        if whole:
            return full.aft_full(q, k, v, (_dense(w, window, k.dtype),), causal).to(dtype)
        return (torch.sigmoid(q) * _mean(k, v, w, causal, window)).to(dtype)


def _mean(k: Tensor, v: Tensor, w: full.Bias, causal: bool, window: int) -> Tensor:
    shape = blocks(window, causal)

    def reach(k: Tensor, w: full.Bias) -> Tensor:
        return full.depth(k, [_rows(w, shape, k.dtype)])

    def product(k: Tensor, v: Tensor, w: full.Bias) -> Tensor:
        return _product(k, v, _rows(w, shape, k.dtype), shape)

    def direct(k: Tensor, v: Tensor, w: full.Bias) -> Tensor:
        if exporting():
            dense = (_dense(w, window, k.dtype),)
            return full.exact(k, v, full.biases(dense, causal, k.dtype, k.shape[1]))
        return _exact(k, v, w, shape)

    return full.choose_range(
        k, v, w, reach, product, direct, lambda *first: _correct(*first, k, v, w, causal, window)
    )


_correct = full.correction("aft_local", _mean)


def _dense(w: full.Bias, window: int, dtype: torch.dtype) -> Tensor:
    dense = w[0].to(dtype) if len(w) == 1 else w[0].to(dtype) @ w[1].to(dtype).mT
    at = torch.arange(dense.shape[0], device=dense.device)
    return dense.masked_fill((at[:, None] - at).abs() >= window, 0)


def _rows(w: full.Bias, shape: Blocks, dtype: torch.dtype) -> Tensor:
    """w' (blocks, size, width + 1); -inf for keys that do not exist or lie in the future of a causal query.

    The last column is the bias 0 of the keys outside the block, -inf where there are none.
    """
    window, causal, size, behind, ahead = shape
    tokens, device = w[0].shape[0], w[0].device
    starts = torch.arange(0, tokens, size, device=device)
    reach = torch.arange(-behind, size + ahead, device=device)
    keys = starts[:, None] + reach  # (blocks, width)
    tail = (0, 0, 0, -tokens % size)
    if len(w) == 1:
        columns = keys.clamp(0, tokens - 1).repeat_interleave(size, 0)[:tokens]
        rows = F.pad(w[0].gather(1, columns).to(dtype), tail).unflatten(0, (-1, size))
    else:
        left, right = w[0].to(dtype), w[1].to(dtype)
        rows = F.pad(left, tail).unflatten(0, (-1, size)) @ shape.pad(right).unfold(0, shape.width, size)

    distance = torch.arange(size, device=device)[:, None] - reach  # query minus key
    excluded = ((keys < 0) | (keys >= tokens))[:, None]
    outside = starts > behind
    if causal:
        excluded = excluded | (distance < 0)
    else:
        outside = outside | (starts + size + ahead < tokens)
    rows = rows.masked_fill(distance.abs() >= window, 0).masked_fill(excluded, -torch.inf)
    rest = torch.zeros_like(rows[..., :1]).masked_fill(~outside[:, None, None], -torch.inf)
    return torch.cat([rows, rest], -1)


def _product(k: Tensor, v: Tensor, rows: Tensor, shape: Blocks) -> Tensor:
    batch, tokens, _ = k.shape
    top = k.detach().amax(1)
    weights = _triple.weight(shape.pad(k.transpose(0, 1), -torch.inf), top)  # (behind + .. + ahead, B, C)
    values = weights * shape.pad(v.transpose(0, 1))
    rows = full.powers(rows, -1)
    near, rest = rows[..., :-1], rows[..., -1:]
    overlap = shape.width - shape.size

    def total(x: Tensor) -> Tensor:
        x = x.flatten(1)
        far = _before(x[: x.shape[0] - overlap].unflatten(0, (-1, shape.size)).sum(1))
        if not shape.causal:
            far = far + _before(x[overlap:].unflatten(0, (-1, shape.size)).sum(1).flip(0)).flip(0)
        return torch.addcmul(near @ x.unfold(0, shape.width, shape.size).mT, rest, far[:, None])

    num, den = total(values), total(weights)
    out = full.ratio(num, den).flatten(0, 1)[:tokens]
    return out.unflatten(1, (batch, -1)).transpose(0, 1)


def _before(x: Tensor) -> Tensor:
    """Sums of the earlier entries; nothing is subtracted."""
    return F.pad(x.cumsum(0)[:-1], (0, 0, 1, 0))


def _exact(k: Tensor, v: Tensor, w: full.Bias, shape: Blocks) -> Tensor:
    """One exponent per (query, key of its block, channel), and the other keys as running sums."""
    batch, tokens, channels = k.shape
    fitting = full.ENTRIES // (batch * channels * shape.width)
    shape = shape._replace(size=max(1, min(shape.size, fitting)))
    size, width = shape.size, shape.width
    rows = _rows(w, shape, k.dtype)[..., :-1]
    k, v = shape.pad(k.transpose(0, 1), -torch.inf), shape.pad(v.transpose(0, 1))
    k, v = k.transpose(0, 1), v.transpose(0, 1)
    last = k.shape[1] - (width - size)
    far = _far(k[:, :last], v[:, :last], size)
    if not shape.causal:
        behind = _far(k[:, width - size :].flip(1), v[:, width - size :].flip(1), size)
        far = _triple.combine(far, _triple.flip(behind))
    parts = []
    for i, block in enumerate(rows):
        keys = slice(i * size, i * size + width)
        near = full.exact_rows(k[:, keys], v[:, keys], block)
        before = _triple.Triple(*(part[:, i : i + 1] for part in far))
        parts.append(_triple.finish(_triple.combine(near, before)))
    return torch.cat(parts, 1)[:, :tokens]


def _far(k: Tensor, v: Tensor, size: int) -> _triple.Triple:
    """The sums (B, blocks, C) over the keys before each block of `size`."""
    before = _triple.shift(_triple.scan(_triple.tokens(k, v)), 1)
    return _triple.Triple(*(part[:, ::size] for part in before))
