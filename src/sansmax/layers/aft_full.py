"""AFT-full: gated averages with a learned bias for every pair of positions."""

import math

import torch
from torch import Tensor

from ..ops.aft import aft_full, aft_full_init_state, aft_full_step
from ..ops.aft.full import AFTFullState, flops
from ._aft import PAPER, PositionBiasMixer
from ._contract import Grid, Traits
from ._parts import state_dtype

__all__ = ["AFTFull"]


class AFTFull(PositionBiasMixer):
    """out_t = sigmoid(Q_t) * sum_u exp(K_u + w_tu) V_u / sum_u exp(K_u + w_tu), channel by channel.

    Args:
        max_tokens: rows of the biases, the longest sequence without a grid; 197 is 224 px in patches of 16
            and a class token.
        factor_dim: R of w = u v^T, `bias_u` and `bias_v` (T, R), 128 as on ImageNet; None for a table `bias`
            (T, T). Both start as N(0, 0.01^2).
        grid, num_prefix_tokens: as in set_input, in place of max_tokens.
        out_proj: the linear layer `proj` behind; the paper has none in its equations, its ImageNet models
            have it.

    Other options: see Mixer. num_heads matters to qk_norm alone.
    """

    traits = Traits(
        title="AFT-full",
        paper=PAPER,
        computes="averages of the values, weighted by exp(key + a bias per pair of positions), then gated",
        cost="N^2 D",
        causal=True,
        cross=False,
        mask=True,
        streaming=True,
        exp_free=False,
        needs="tokens",
    )

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, grid: Grid | None
    ) -> Tensor:
        return aft_full(q, k, v, self.position_bias(q.shape[1], grid), causal=causal, mask=mask)

    def map_row(
        self, x: Tensor, query: int, *, mask: Tensor | None = None, grid: Grid | None = None
    ) -> Tensor:
        x, _, mask = self.received(x, None, False, None, mask)
        work = torch.promote_types(x.dtype, torch.float32)
        logits = self.channels(x)[1].mT.to(work)  # (B, C, N)
        bias, tokens = self.position_bias(x.shape[1], grid), x.shape[1]
        if isinstance(bias, tuple):
            row = (bias[1][:tokens].to(work) @ bias[0][query].to(work)[:, None]).squeeze(-1)
        else:
            row = bias[query, :tokens].to(work)
        logits = logits + row
        if mask is None:
            return logits.softmax(-1)
        weights = logits.masked_fill(~mask[:, None], -math.inf).softmax(-1)
        return weights.masked_fill(~mask[:, query, None, None], 0)

    def attend_step(
        self, q: Tensor, k: Tensor, v: Tensor, state: AFTFullState
    ) -> tuple[Tensor, AFTFullState]:
        return aft_full_step(q, k, v, self.learned_bias(), state)

    def init_state(self, batch_size: int) -> AFTFullState:
        weight = self.qkv.weight
        return aft_full_init_state(batch_size, self.dim, dtype=state_dtype(weight), device=weight.device)

    def state_size(self, n: int) -> int:
        return 2 * n * self.dim

    def flops(self, n: int, m: int | None = None) -> int:
        return self.projection_flops(n) + flops(1, n, self.dim, self.factor_dim or 0)
