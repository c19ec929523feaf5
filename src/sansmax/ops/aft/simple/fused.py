"""AFT-simple in one pass over time; causal as a chunked scan."""

import torch
from torch import Tensor

from ..._backend import no_autocast
from .. import _triple


def aft_simple(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Masked keys hold -inf, masked values 0."""
    dtype = q.dtype
    with no_autocast(q):
        if dtype in (torch.float16, torch.bfloat16):
            q, k, v = q.float(), k.float(), v.float()
        sums = _triple.scan(_triple.tokens(k, v)) if causal else _sums(k, v)
        return (q.sigmoid() * _triple.finish(sums)).to(dtype)


def _sums(k: Tensor, v: Tensor) -> _triple.Triple:
    top = k.detach().amax(1, keepdim=True)
    weights = _triple.weight(k, top)
    return _triple.Triple((weights * v).sum(1, keepdim=True), weights.sum(1, keepdim=True), top)
