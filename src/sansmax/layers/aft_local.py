"""AFT-local: AFT-full whose position biases are 0 outside a window."""

import math

import torch.nn.functional as F
from torch import Tensor

from ..ops.aft import aft_local, aft_local_init_state, aft_local_step
from ..ops.aft.local import AFTLocalState, flops
from ._aft import PAPER, PositionBiasMixer
from ._contract import Grid, Traits
from ._parts import state_dtype

__all__ = ["AFTLocal"]


class AFTLocal(PositionBiasMixer):
    """AFT-full with w_tu = 0 where |t - u| >= window: a far token is still seen, without a bias.

    Args:
        window: s, 2 s - 1 positions (s if causal); 0 is AFT-simple. 32 as on Enwik8. It runs along the token
            order, row by row on a grid.
        max_tokens, factor_dim, grid, num_prefix_tokens, out_proj: see AFTFull.

    Other options: see Mixer. num_heads matters to qk_norm alone.
    """

    traits = Traits(
        title="AFT-local",
        paper=PAPER,
        computes="averages of the values, weighted by exp(key + a learned bias inside a window), then gated",
        cost="N s D",
        causal=True,
        cross=False,
        mask=True,
        streaming=True,
        exp_free=False,
        needs="tokens",
    )

    def __init__(self, *args, window: int = 32, **words) -> None:
        super().__init__(*args, **words)
        if window < 0:
            raise ValueError(f"AFTLocal: window must be at least 0, got {window}; 0 is AFT-simple")
        self.window = window

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, grid: Grid | None
    ) -> Tensor:
        w = self.position_bias(q.shape[1], grid)
        return aft_local(q, k, v, w, self.window, causal=causal, mask=mask)

    def attend_step(
        self, q: Tensor, k: Tensor, v: Tensor, state: AFTLocalState
    ) -> tuple[Tensor, AFTLocalState]:
        return aft_local_step(q, k, v, self.learned_bias(), self.window, state)

    def init_state(self, batch_size: int) -> AFTLocalState:
        weight = self.qkv.weight
        return aft_local_init_state(batch_size, self.dim, dtype=state_dtype(weight), device=weight.device)

    def fixed_state(self, batch_size: int) -> AFTLocalState:
        state, missing = self.init_state(batch_size), (0, 0, max(self.window - 1, 0), 0)
        return state._replace(k=F.pad(state.k, missing, value=-math.inf), v=F.pad(state.v, missing))

    def state_size(self, n: int) -> int:
        return self.dim * (3 + 2 * min(n, max(self.window - 1, 0)))

    def flops(self, n: int, m: int | None = None) -> int:
        return self.projection_flops(n) + flops(1, n, self.dim, self.window, self.factor_dim or 0)
