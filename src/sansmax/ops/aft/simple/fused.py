"""AFT-simple in one pass over time; causal as a chunked scan."""

import torch
from torch import Tensor

from ..._backend import no_autocast
from ..._eager import finite, overwritable, readable
from ..._matmul import prefix_sums
from .. import _triple


def aft_simple(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Masked keys hold -inf, masked values 0."""
    dtype = q.dtype
    with no_autocast(q):
        if dtype in (torch.float16, torch.bfloat16):
            q, k, v = q.float(), k.float(), v.float()
        return (_causal(q, k, v) if causal else q.sigmoid() * _average(k, v)).to(dtype)


def _average(k: Tensor, v: Tensor) -> Tensor:
    if readable(k, v):
        average = (k.softmax(1) * v).sum(1, keepdim=True)
        if finite(average):  # where everything is masked it is not
            return average
    return _triple.finish(_sums(k, v))


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if readable(k, v) and _triple.near(k.detach()) and _triple.weighable(v.detach()):
        weights = k.exp()
        num, den = prefix_sums(weights * v, spare=True), prefix_sums(weights, spare=True)
        if finite(num[:, -1]):  # an overflow reaches the last row
            if den[:, 0].amin().item() == 0:  # masked
                den = den.masked_fill(den == 0, 1)
            in_place = overwritable(q, num, den)
            return num.div_(den).mul_(q.sigmoid()) if in_place else q.sigmoid() * (num / den)
    return q.sigmoid() * _triple.finish(_triple.scan(_triple.tokens(k, v)))


def _sums(k: Tensor, v: Tensor) -> _triple.Triple:
    top = k.detach().amax(1, keepdim=True)
    weights = _triple.weight(k, top)
    return _triple.Triple((weights * v).sum(1, keepdim=True), weights.sum(1, keepdim=True), top)
