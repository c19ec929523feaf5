"""SimA: queries and keys divided by their l1 norm over the tokens."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import _check
from ..ops.sima import SimAState, flops, parts, sima, sima_init_state, sima_step
from ._contract import Grid, Traits
from ._parts import HeadsMixer, kept, state_dtype

__all__ = ["SimA"]


class State(NamedTuple):
    """The operator's sums and the number of tokens so far."""

    sums: SimAState
    tokens: int


class SimA(HeadsMixer):
    """out = Q^ (K^^T V), each channel of Q and K divided by its l1 norm over the tokens; softmax's weights.

    Args:
        token_scale: None as published: the output shrinks like 1/N, so a network meets another scale at
            another resolution. A number n0 multiplies it by n/n0, where n counts the tokens that are not
            masked (causal: the tokens so far; with context: the queries), so that repeating all tokens
            changes nothing and n0 tokens are treated as published.
        eps: floor of the l1 norms.
        order: see sansmax.ops.sima.

    Other options: see Mixer.
    """

    traits = Traits(
        title="SimA",
        paper="Koohpayegani and Pirsiavash, SimA: Simple Softmax-free Attention for Vision Transformers, "
        "WACV 2024 (arXiv 2206.08898)",
        computes="queries and keys divided by their l1 norm over the tokens, then plain products",
        cost="min(N D^2, N^2 D)",
        causal=True,
        cross=True,
        mask=True,
        streaming=True,
        exp_free=True,
    )
    in_parts = True

    def __init__(
        self,
        *args,
        token_scale: int | None = None,
        eps: float = 1e-12,
        order: str = "auto",
        **words,
    ) -> None:
        super().__init__(*args, **words)
        if token_scale is not None and token_scale < 1:
            raise ValueError(
                f"SimA: token_scale must be None or a number of tokens of at least 1, got {token_scale}; "
                f"use the count that the network is trained with, 196 for 224 px in patches of 16"
            )
        self.token_scale, self.eps, self.order = token_scale, eps, order

    def mix(
        self, x: Tensor, context: Tensor | None, mask: Tensor | None, causal: bool, grid: Grid | None
    ) -> Tensor:
        q, k, v = self.heads(x, context)
        if context is not None:
            # The operator reads N == M as self-attention, where a mask also leaves queries out.
            (k, v), mask = _check.cleared(mask, k, v), None
        return self.attend(q, k, v, mask, causal).transpose(1, 2).flatten(2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        y = sima(q, k, v, mask=mask, causal=causal, eps=self.eps, order=self.order)
        if self.token_scale is None:
            return y
        if mask is not None:
            tokens = mask.cumsum(1) if causal else mask.sum(1, keepdim=True)
            tokens = tokens[:, None, :, None]  # (B, 1, N or 1, 1)
        elif causal:
            tokens = torch.arange(1, q.shape[2] + 1, device=y.device)[:, None]
        else:
            return y * (q.shape[2] / self.token_scale)
        tokens = tokens.to(torch.promote_types(y.dtype, torch.float32))
        return y * (tokens / self.token_scale).to(y.dtype)

    def map_product(
        self, x: Tensor, rows: Tensor, *, mask: Tensor | None = None, grid: Grid | None = None
    ) -> Tensor:
        """See Mixer. With queries and keys exchanged the map is its transpose."""
        x, _, mask = self.received(x, None, False, None, mask)
        q, k, _ = self.heads(x)
        values = kept(rows, mask)[:, None, :, None].to(q.dtype).expand(-1, q.shape[1], -1, -1)
        return self.attend(k, q, values, mask, False).squeeze(-1)

    def token_sums(self, x: Tensor, before: State | None = None) -> State:
        sums, tokens = (None, 0) if before is None else before
        return State(parts.summed(*self.heads(x), sums), tokens + x.shape[1])

    def from_sums(self, x: Tensor, sums: State) -> Tensor:
        y = parts.applied(self.queries(x), sums.sums, self.eps)
        if self.token_scale is not None:
            y = y * (sums.tokens / self.token_scale)
        return self.output(y.transpose(1, 2).flatten(2), x)

    def attend_step(self, q: Tensor, k: Tensor, v: Tensor, state: State) -> tuple[Tensor, State]:
        y, sums = sima_step(q, k, v, state.sums, eps=self.eps)
        tokens = state.tokens + 1
        if self.token_scale is not None:
            y = y * (tokens / self.token_scale)
        return y, State(sums, tokens)

    def init_state(self, batch_size: int) -> State:
        weight = self.qkv.weight
        sums = sima_init_state(
            batch_size, self.num_heads, self.head_dim, dtype=state_dtype(weight), device=weight.device
        )
        return State(sums, 0)

    def state_size(self, n: int) -> int:
        return self.attn_dim * (self.head_dim + 2)

    def attend_flops(self, n: int, m: int) -> int:
        return flops(1, self.num_heads, n, m, self.head_dim, self.head_dim)
