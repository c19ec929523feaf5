"""AFT-simple: one gated average over all tokens, without position biases."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.aft import aft_simple, aft_simple_init_state, aft_simple_step
from ..ops.aft._triple import Triple
from ..ops.aft.simple import flops, parts
from ._aft import PAPER, AFTMixer
from ._contract import Grid, Traits
from ._parts import kept, state_dtype

__all__ = ["AFTSimple"]


class AFTSimple(AFTMixer):
    """out = sigmoid(Q) * sum_t softmax over tokens (K)_t * V_t, channel by channel; parameters as in softmax.

    Args:
        out_proj: the linear layer `proj` behind; the paper has none in its equations.

    Other options: see Mixer. num_heads matters to qk_norm alone.
    """

    traits = Traits(
        title="AFT-simple",
        paper=PAPER,
        computes="one average of the values for all tokens, weighted by exp(key), then gated",
        cost="N D",
        causal=True,
        cross=False,
        mask=True,
        streaming=True,
        exp_free=False,
    )
    in_parts = True

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, grid: Grid | None
    ) -> Tensor:
        return aft_simple(q, k, v, causal=causal, mask=mask)

    def map_product(
        self, x: Tensor, rows: Tensor, *, mask: Tensor | None = None, grid: Grid | None = None
    ) -> Tensor:
        """See Mixer. All queries have the same weights, softmax over the tokens of k."""
        x, _, mask = self.received(x, None, False, None, mask)
        k = self.channels(x)[1].mT
        k = k.to(torch.promote_types(k.dtype, torch.float32))
        hidden = None if mask is None else ~mask[:, None]
        weights = (k if hidden is None else k.masked_fill(hidden, -torch.inf)).softmax(-1)
        weights = weights if hidden is None else weights.masked_fill(hidden, 0)
        return weights * kept(rows, mask).sum(1)[:, None, None].to(weights.dtype)

    def token_sums(self, x: Tensor, before: Triple | None = None) -> Triple:
        _, k, v = self.channels(x)
        return parts.summed(k, v, before)

    def from_sums(self, x: Tensor, sums: Triple) -> Tensor:
        bias = None if self.qkv.bias is None else self.qkv.bias[: self.attn_dim]
        q = self.by_head(self.q_norm, F.linear(x, self.qkv.weight[: self.attn_dim], bias))
        return self.output(parts.applied(q, sums), x)

    def attend_step(self, q: Tensor, k: Tensor, v: Tensor, state: Triple) -> tuple[Tensor, Triple]:
        return aft_simple_step(q, k, v, state)

    def init_state(self, batch_size: int) -> Triple:
        weight = self.qkv.weight
        return aft_simple_init_state(batch_size, self.dim, dtype=state_dtype(weight), device=weight.device)

    def state_size(self, n: int) -> int:
        return 3 * self.dim

    def flops(self, n: int, m: int | None = None) -> int:
        return self.projection_flops(n) + flops(1, n, self.dim)
