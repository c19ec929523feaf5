"""Multi-head External Attention: widened heads that share two small memories."""

import torch
from torch import Tensor, nn

from ..ops.external import external_map, flops
from ._contract import Grid, Mixer, Traits
from ._parts import recalled, recalled_together

__all__ = ["ExternalAttentionMultihead"]


class ExternalAttentionMultihead(Mixer):
    """External Attention in coef * num_heads heads of width C / num_heads, behind a layer C -> coef * C.

    Args:
        coef: how much wider and how many times as many heads; 4 as published.
        memory: S, rows of `memory_k` and `memory_v` (S, C / num_heads) of all heads; None for 256 // coef.
        eps: added to the l1 norm.
        attn_drop: dropout on the map of tokens and memory rows.
        dead_bias: keeps `memory_k_bias` (S,) of published checkpoints, without a gradient: a constant per
            memory row cancels in the softmax over tokens, so it is never used.

    Tokens meet in the softmax over them alone, so pool them (class_token=False). Other options: see Mixer;
    qkv_bias is the bias of `query` (always on in the published one). Published names
    (multi_head_attention_torch.py of EANet): query = trans_dims, memory_k = linear_0.weight, memory_k_bias =
    linear_0.bias, memory_v = linear_1.weight transposed, memory_v_bias = linear_1.bias, proj = proj.
    """

    traits = Traits(
        title="Multi-head External Attention",
        paper="Guo et al., Beyond Self-attention: External Attention using Two Linear Layers for Visual "
        "Tasks, TPAMI 2022 (arXiv 2105.02358)",
        computes="the heads of a token look up one learned memory, normalised over tokens and memory",
        cost="N S D",
        causal=False,
        cross=False,
        mask=True,
        streaming=False,
        exp_free=False,
    )
    attention_map = True
    head_norms = ()
    no_causal = "the softmax runs over all tokens"
    no_cross = "its keys and values are learned memories"
    no_qk_norm = "its keys are a learned memory"
    unused = ("query.bias",)  # the same for all tokens, so it cancels in the softmax over them

    query: nn.Linear

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *args,
        coef: int = 4,
        memory: int | None = None,
        eps: float = 1e-9,
        dead_bias: bool = False,
        **words,
    ) -> None:
        memory = 256 // max(coef, 1) if memory is None else memory
        if coef < 1 or memory < 1 or num_heads < 1 or dim % num_heads:
            raise ValueError(
                f"ExternalAttentionMultihead: coef and memory must be at least 1 and num_heads must divide "
                f"dim={dim}, got coef={coef}, memory={memory}, num_heads={num_heads}; "
                f"coef=4 and 64 rows are published"
            )
        inputs = {"query": coef * dim}
        super().__init__(dim, coef * num_heads, *args, inputs=inputs, attn_dim=coef * dim, **words)
        self.eps = eps
        self.memory_k = nn.Parameter(torch.empty(memory, self.head_dim, **self.factory))
        self.memory_v = nn.Parameter(torch.empty(memory, self.head_dim, **self.factory))
        self.memory_v_bias = nn.Parameter(torch.empty(self.head_dim, **self.factory))
        bias = nn.Parameter(torch.zeros(memory, **self.factory), requires_grad=False) if dead_bias else None
        self.memory_k_bias = bias
        if dead_bias:
            self.unused = (*self.unused, "memory_k_bias")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.memory_k, std=0.02)
        nn.init.trunc_normal_(self.memory_v, std=0.02)
        nn.init.zeros_(self.memory_v_bias)
        if self.memory_k_bias is not None:
            nn.init.zeros_(self.memory_k_bias)

    def mix(
        self, x: Tensor, context: Tensor | None, mask: Tensor | None, causal: bool, grid: Grid | None
    ) -> Tensor:
        query = self.query(x)
        heads = query.to(self.memory_k.dtype).unflatten(-1, (self.num_heads, -1))  # (B, N, H, D)
        y = (
            recalled(heads.transpose(1, 2), self.memory_k, self.memory_v, mask, self.eps, self.attn_drop)
            + self.memory_v_bias
        )
        return y.transpose(1, 2).flatten(2).to(query.dtype)

    def map_product(
        self, x: Tensor, rows: Tensor, *, mask: Tensor | None = None, grid: Grid | None = None
    ) -> Tensor:
        """See ExternalAttention, head by head."""
        x, _, mask = self.received(x, None, False, None, mask)
        heads = self.query(x).to(self.memory_k.dtype).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return recalled_together(external_map(heads, self.memory_k, mask=mask, eps=self.eps), rows)

    def flops(self, n: int, m: int | None = None) -> int:
        projections = 4 * n * self.dim * self.attn_dim
        return projections + flops(1, self.num_heads, n, self.head_dim, self.head_dim, self.memory_k.shape[0])
