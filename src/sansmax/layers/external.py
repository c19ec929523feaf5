"""External Attention: tokens against two small learned memories, with a double normalisation."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.external import external_map, flops
from ._contract import Grid, Mixer, Traits
from ._parts import recalled, recalled_together

__all__ = ["ExternalAttention"]


class ExternalAttention(Mixer):
    """out = A M_v with A = softmax over tokens, then l1 over the S memory rows, of query(x) M_k^T.

    One head as published: num_heads is accepted and has no effect. Tokens meet in the softmax over them
    alone, so pool them (class_token=False): a class token learns little of the others.

    Args:
        memory: S, rows of the memories `memory_k` and `memory_v` (S, C).
        tie: one parameter `memory` for both. Off: two parameters that start equal, as published.
        eps: added to the l1 norm; 1e-9 as published, 0 for the form without it.
        query_proj: the linear layer `query` in front; its bias is qkv_bias (the published one has it).
        out_proj: the linear layer `proj` behind (the published one has no bias: proj_bias=False).
        memory_bias: a bias `memory_v_bias` (C,) behind M_v, as in the token layers of EAMLP.
        attn_drop: dropout on the map of tokens and memory rows.
        block: the whole published module around it: BatchNorm behind `proj`, the input added, ReLU. In
            training the batch statistics then couple the sequences of a batch.

    Other options: see Mixer. Published names (model_torch.py of EANet): query = conv1, memory_k =
    linear_0.weight, memory_v = linear_1.weight transposed, proj = conv2.0, bn = conv2.1.
    """

    traits = Traits(
        title="External Attention",
        paper="Guo et al., Beyond Self-attention: External Attention using Two Linear Layers for Visual "
        "Tasks, TPAMI 2022 (arXiv 2105.02358)",
        computes="tokens look up a learned memory, normalised over the tokens, then over the memory",
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
        num_heads: int = 1,
        *args,
        memory: int = 64,
        tie: bool = False,
        eps: float = 1e-9,
        query_proj: bool = True,
        out_proj: bool = True,
        memory_bias: bool = False,
        block: bool = False,
        **words,
    ) -> None:
        inputs = {"query": dim} if query_proj else {}
        super().__init__(dim, 1, *args, inputs=inputs, out_proj=out_proj, **words)
        if memory < 1:
            raise ValueError(
                f"ExternalAttention: memory must be at least 1 row, got {memory}; 64 is published"
            )
        self.eps, self.query_proj = eps, query_proj
        if tie:
            self.memory = nn.Parameter(torch.empty(memory, dim, **self.factory))
        else:
            self.memory_k = nn.Parameter(torch.empty(memory, dim, **self.factory))
            self.memory_v = nn.Parameter(torch.empty(memory, dim, **self.factory))
        self.memory_v_bias = nn.Parameter(torch.empty(dim, **self.factory)) if memory_bias else None
        self.tie = tie
        self.bn = nn.BatchNorm1d(dim, **self.factory) if block else None
        self.reset_parameters()

    @property
    def memories(self) -> tuple[Tensor, Tensor]:
        """M_k and M_v, each (S, C)."""
        return (self.memory, self.memory) if self.tie else (self.memory_k, self.memory_v)

    def reset_parameters(self) -> None:
        memory_k, memory_v = self.memories
        nn.init.normal_(memory_k, std=math.sqrt(2 / self.dim))
        with torch.no_grad():
            memory_v.copy_(memory_k)
        if self.memory_v_bias is not None:
            nn.init.zeros_(self.memory_v_bias)

    def mix(
        self, x: Tensor, context: Tensor | None, mask: Tensor | None, causal: bool, grid: Grid | None
    ) -> Tensor:
        memory_k, memory_v = self.memories
        query = self.query(x) if self.query_proj else x
        y = recalled(query.to(memory_k.dtype), memory_k, memory_v, mask, self.eps, self.attn_drop)
        return (y if self.memory_v_bias is None else y + self.memory_v_bias).to(query.dtype)

    def map_product(
        self, x: Tensor, rows: Tensor, *, mask: Tensor | None = None, grid: Grid | None = None
    ) -> Tensor:
        """See Mixer; H = 1. No value flows between tokens: A[n, m] = sum over s of a[n, s] a[m, s] / sum over
        m of a[m, s], how much token m has of the use of the memory rows that token n looks up."""
        x, _, mask = self.received(x, None, False, None, mask)
        query = self.query(x) if self.query_proj else x
        attention = external_map(query.to(self.memories[0].dtype), self.memories[0], mask=mask, eps=self.eps)
        return recalled_together(attention[:, None], rows)

    def output(self, y: Tensor, x: Tensor) -> Tensor:
        y = super().output(y, x)
        return y if self.bn is None else F.relu(self.bn(y.mT).mT + x)

    def flops(self, n: int, m: int | None = None) -> int:
        projections = self.query_proj + isinstance(self.proj, nn.Linear)
        return 2 * n * self.dim * self.dim * projections + flops(
            1, 1, n, self.dim, self.dim, self.memories[0].shape[0]
        )
