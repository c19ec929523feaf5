"""Sums of exponentially weighted values that neither overflow nor vanish, whatever the keys are.

A `Triple` (num, den, top) stands for the sums `num * exp(top)` = sum_u exp(k_u) v_u and `den * exp(top)` =
sum_u exp(k_u). `top` is the largest exponent inside, so that `den >= 1`, or 0 where all exponents lie near
it; `top = -inf` marks an empty sum, whatever num and den then hold. Tokens lie in dimension -2. `den` and
`top` may have one channel where `num` has many (a key shared by the channels of a head).

Gradients reach the keys through the `top` of single tokens alone; a `top` that `combine`, `scan` or `total`
returns is detached, since the sums do not depend on it.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._eager import exporting, finite, readable
from .._matmul import prefix_sums

# A sum over 2^20 tokens of exp(40) leaves float32 34 nats for large values, exp(-40) 47 for small ones.
NEAR = {torch.float32: 40.0, torch.float64: 300.0}

# Times exp(-NEAR), and a millionth of it too, they are normal numbers.
SMALLEST = {torch.float32: 1e-12, torch.float64: 1e-170}

# Tokens of a chunk of `scan`. Two levels of 32 leave (T / 1024)^2 pairs: fewer than T while T < 2^20.
_CHUNK, _LEVELS = 32, 2


class Triple(NamedTuple):
    num: Tensor
    den: Tensor
    top: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "Triple":
        """`function` of each of the three tensors."""
        return Triple(function(self.num), function(self.den), function(self.top))


def tokens(k: Tensor, v: Tensor, mask: Tensor | None = None) -> Triple:
    """One triple per token; `mask` (True = keep, broadcastable to k and to v) empties a token."""
    if mask is not None:
        k, v = k.masked_fill(~mask, -torch.inf), v.masked_fill(~mask, 0)
    return Triple(v, torch.ones_like(k), k)


def empty(num_shape: tuple[int, ...], den_shape: tuple[int, ...], like: Tensor) -> Triple:
    """The sum over nothing, in the dtype and on the device of `like`."""
    return Triple(like.new_zeros(num_shape), like.new_zeros(den_shape), like.new_full(den_shape, -torch.inf))


def weight(exponent: Tensor, top: Tensor) -> Tensor:
    """exp(exponent - top); 0 for an empty sum (exponent -inf), also where `top` is -inf."""
    return (exponent - top.clamp(min=torch.finfo(top.dtype).min)).exp_()


def combine(*parts: Triple) -> Triple:
    """The sum of disjoint sums."""
    top = parts[0].top.detach()
    for part in parts[1:]:
        top = torch.maximum(top, part.top.detach())
    weights = [weight(part.top, top) for part in parts]
    num, den = parts[0].num * weights[0], parts[0].den * weights[0]
    for part, w in zip(parts[1:], weights[1:], strict=True):
        num, den = torch.addcmul(num, part.num, w), torch.addcmul(den, part.den, w)
    return Triple(num, den, top)


def total(x: Triple) -> Triple:
    """The sum over the tokens, kept as one token."""
    top = x.top.detach().amax(-2, keepdim=True)
    weights = weight(x.top, top)
    num, den = ((weights * part).sum(-2, keepdim=True) for part in (x.num, x.den))
    return Triple(num, den, top)


def finish(x: Triple) -> Tensor:
    """num / den, and 0 for an empty sum; `x` comes from `combine`, `scan`, `total` or `empty`."""
    return x.num / x.den.masked_fill(x.den == 0, 1)


def shift(x: Triple, by: int) -> Triple:
    """Entry t becomes entry t - by and the first `by` are empty: `shift(scan(x), 1)` leaves t itself out."""
    return Triple(_shift(x.num, by), _shift(x.den, by), _shift(x.top, by, -torch.inf))


def flip(x: Triple) -> Triple:
    """Tokens in reverse order: `flip(scan(flip(x)))` sums from t to the end."""
    return x.map(lambda part: part.flip(-2))


def scan(x: Triple) -> Triple:
    """Prefix sums, entry t inclusive. Any length, no branch on the length; on values in eager code alone.

    Where all exponents lie near 0, none is put aside: a sixth of the time (3072 tokens, 512 channels), and
    rows do not depend on later ones by a single bit. `den` may then be as small as exp(-NEAR).
    """
    if readable(*x) and near(x.top.detach()) and weighable(x.num.detach()):
        weights = x.top.exp()
        num, den = (prefix_sums(part * weights, spare=True) for part in (x.num, x.den))
        if finite(num[..., -1, :]):  # an overflow reaches the last row
            return Triple(num, den, torch.zeros_like(den.detach()).masked_fill_(den == 0, -torch.inf))
    top = x.top.detach().cummax(-2).values
    weights = weight(x.top, top)
    num, den = _decayed_cumsum([x.num * weights, x.den * weights], top, _LEVELS)
    return Triple(num, den, top)


def near(top: Tensor, bias: float = 0.0) -> bool:
    """Whether exp(top), also with a bias up to +-`bias`, and its sums need no scale; -inf counts as empty."""
    limit, low = NEAR[top.dtype] - bias, top.amin(-2)
    if low.sum().item() == -math.inf:
        low = top.masked_fill(top == -torch.inf, 0).amin(-2)
    return max(top.amax(-2).amax().item(), -low.amin().item()) <= limit


def weighable(v: Tensor) -> bool:
    """Whether exp(-NEAR) times what matters of each channel of v (..., T, C) is no subnormal number."""
    return torch.linalg.vector_norm(v, math.inf, -2).amin().item() >= SMALLEST[v.dtype]


def _decayed_cumsum(xs: list[Tensor], top: Tensor, levels: int) -> list[Tensor]:
    """y_t = sum_{u<=t} exp(top_u - top_t) x_u for each x (..., T, C); `top` never falls, so nothing grows."""
    if levels == 0:
        return _in_pairs(xs, top)
    length = top.shape[-2]
    # At least one chunk of padding, `unfold` and `index_select`: views would compare sizes with one another,
    # and an exported graph would then hold for one length only.
    front = ((length + _CHUNK - 1) // _CHUNK + 1) * _CHUNK - length
    xs = [_chunked(x, front) for x in xs]  # (..., chunks, _CHUNK, C)
    top = _chunked(top, front, -torch.inf)
    # A compiler fuses the pairs; a loop of 32 steps would take it minutes.
    inside = (_in_pairs if torch.compiler.is_compiling() else _in_turn)(xs, top)
    last = top[..., -1, :]
    carried = _decayed_cumsum([y[..., -1, :] for y in inside], last, levels - 1)
    reach = weight(_shift(last, 1, -torch.inf).unsqueeze(-2), top)
    ys = [
        torch.addcmul(y, _shift(carry, 1).unsqueeze(-2), reach)
        for y, carry in zip(inside, carried, strict=True)
    ]
    kept = torch.arange(length, device=top.device) + front
    if exporting():
        # Torch 2.10 compares sizes that are flattened.
        return [y[..., kept // _CHUNK, kept % _CHUNK, :] for y in ys]
    return [y.flatten(-3, -2).index_select(-2, kept) for y in ys]


def _chunked(x: Tensor, front: int, value: float = 0.0) -> Tensor:
    x = F.pad(x, (0, 0, front, 0), value=value).unfold(-2, _CHUNK, _CHUNK).mT
    return x.contiguous() if exporting() else x  # torch 2.10 compares the strides of views


def _in_turn(xs: list[Tensor], top: Tensor) -> list[Tensor]:
    """Token by token, all chunks at once: each entry is read once, 2 times faster than doubling strides."""
    decay = weight(top[..., :-1, :], top[..., 1:, :]).unbind(-2)
    ys = [list(x.unbind(-2)) for x in xs]
    for y in ys:
        for t in range(1, len(y)):
            y[t] = torch.addcmul(y[t], y[t - 1], decay[t - 1])
    return [torch.stack(y, -2) for y in ys]


def _in_pairs(xs: list[Tensor], top: Tensor) -> list[Tensor]:
    length = top.shape[-2]
    future = torch.ones(length, length, dtype=torch.bool, device=top.device).triu(1).unsqueeze(-1)
    weights = weight(top.unsqueeze(-3), top.unsqueeze(-2)).masked_fill(future, 0)  # (..., t, u, C)
    return [(weights * x.unsqueeze(-3)).sum(-2) for x in xs]


def _shift(x: Tensor, by: int, value: float = 0.0) -> Tensor:
    return F.pad(x, (0, 0, by, 0), value=value).narrow(-2, 0, x.shape[-2])
