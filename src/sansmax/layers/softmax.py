"""Softmax attention, the baseline: timm's Attention with the arguments that all layers share."""

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.softmax import flops, softmax
from ._contract import Grid, Traits
from ._parts import HeadsMixer, kept, pulled_back

__all__ = ["Softmax"]


class KeysValues(NamedTuple):
    """Keys and values (B, H, n, D) of the tokens so far."""

    k: Tensor
    v: Tensor


class Softmax(HeadsMixer):
    """out = softmax(Q K^T / sqrt(D)) V per head, with the parameters of timm's Attention.

    Options are timm's (see Mixer). attn_mask may be anything that F.scaled_dot_product_attention takes; it
    can be combined with is_causal and mask. Streaming keeps all keys and values.
    """

    traits = Traits(
        title="Softmax attention",
        paper="Vaswani et al., Attention Is All You Need, NeurIPS 2017 (arXiv 1706.03762)",
        computes="averages of the values, weighted by the softmax of scaled dot products",
        cost="N^2 D",
        causal=True,
        cross=True,
        mask=True,
        streaming=True,
        exp_free=False,
    )
    attention_map = True

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        grid: Grid | None = None,
    ) -> Tensor:
        drop = self.attn_drop.p if self.training else 0.0
        if attn_mask is None and not drop:
            return super().forward(x, None, is_causal, context=context, mask=mask)
        x, context, mask = self.received(x, None, is_causal, context, mask)
        q, k, v = self.heads(x, context)
        if attn_mask is None and mask is None:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=drop, is_causal=is_causal)
            return self.output(y.transpose(1, 2).flatten(2), x)
        bias = torch.zeros(1, 1, dtype=q.dtype, device=q.device) if attn_mask is None else attn_mask
        if bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=q.dtype).masked_fill(~bias, -math.inf)
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None, None], -math.inf)
        if is_causal:
            future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
            bias = bias.masked_fill(future, -math.inf)
        # A query without any key is NaN in some SDPA kernels: let it see everything, then clear it.
        empty = (bias == -math.inf).all(-1, keepdim=True)
        bias = bias.masked_fill(empty, 0).to(q.dtype).expand(*bias.shape[:-1], k.shape[2])
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=drop)
        return self.output(y.masked_fill(empty, 0).transpose(1, 2).flatten(2), x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        return softmax(q, k, v, mask=mask, causal=causal)

    def map_row(
        self, x: Tensor, query: int, *, mask: Tensor | None = None, grid: Grid | None = None
    ) -> Tensor:
        x, _, mask = self.received(x, None, False, None, mask)
        q, k, v = self.heads(x)
        mix = partial(self.attend, q[:, :, query : query + 1], k, mask=mask, causal=False)
        row = kept(x.new_ones(x.shape[0], 1), None if mask is None else mask[:, query : query + 1])
        return pulled_back(mix, v[..., :1], row[:, None, :, None]).squeeze(-1)

    def attend_step(self, q: Tensor, k: Tensor, v: Tensor, state: KeysValues) -> tuple[Tensor, KeysValues]:
        k = torch.cat((state.k, k[:, :, None].to(state.k.dtype)), 2)
        v = torch.cat((state.v, v[:, :, None].to(state.v.dtype)), 2)
        return softmax(q[:, :, None].to(k.dtype), k, v).squeeze(2).to(q.dtype), KeysValues(k, v)

    def init_state(self, batch_size: int) -> KeysValues:
        empty = self.qkv.weight.new_empty(batch_size, self.num_heads, 0, self.head_dim)
        return KeysValues(empty, empty)

    def state_size(self, n: int) -> int:
        return 2 * n * self.attn_dim

    def attend_flops(self, n: int, m: int) -> int:
        return flops(1, self.num_heads, n, m, self.head_dim, self.head_dim)
