"""Every operator against its published form and against F.scaled_dot_product_attention."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import sansmax

from .._find import pick
from ..ops import external, sima, soft, softmax, xnorm
from ..ops._split import split_heads
from ..ops.aft import conv, full, local, simple
from . import _published as published
from .cases import Case, Form

__all__ = ["OPERATORS", "Operator", "Shape", "operator_cases"]

LANDMARKS, MEMORY, WINDOW, KERNEL = 49, 64, 32, 11
# Of one entry of a map of token pairs in float64, with what the backward pass keeps beside it.
MAP_BYTES = 48

Leaves = tuple[Tensor, ...]
Randn = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    """Of the inputs: heads (B, H, N, D), channels (B, N, H D)."""

    batch: int
    tokens: int
    heads: int
    dim: int
    causal: bool = False

    @property
    def channels(self) -> int:
        """C, the width of all heads."""
        return self.heads * self.dim

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, 3 H D) -> q, k, v (B, H, N, D), strided views, split as our layers do."""
        return split_heads(qkv, self.heads)

    def unbind(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same, as timm's layers do."""
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def grid(self) -> tuple[int, int]:
        """The most nearly square grid of so many tokens."""
        n = self.tokens
        rows = max(r for r in range(1, math.isqrt(n) + 1) if n % r == 0)
        return rows, n // rows


def _channels(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, 3 C) -> q, k, v (B, T, C), views."""
    q, k, v = qkv.chunk(3, -1)
    return q, k, v


@dataclass(frozen=True)
class Operator:
    """The tensors that its gradients go to, its two forms as functions of the shape and of them, its cost."""

    leaves: Callable[[Shape, Randn], Leaves]
    ours: Callable[..., Tensor]  # shape, *leaves, backend=
    published: Callable[..., Tensor]  # shape, *leaves
    flops: Callable[[Shape], int]  # causal forms are counted like the others, maps of pairs half
    map: Callable[[Shape], int] = lambda _: 0  # entries of the published form's map of token pairs
    causal: bool = True  # whether there is a causal form


def _qkv(s: Shape, randn: Randn) -> Leaves:
    return (randn(s.batch, s.tokens, 3 * s.channels),)


def _biased(s: Shape, randn: Randn) -> Leaves:
    return *_qkv(s, randn), randn(s.tokens, s.tokens)


def _of_heads(flops: Callable[..., int]) -> Callable[[Shape], int]:
    return lambda s: flops(s.batch, s.heads, s.tokens, s.tokens, s.dim, s.dim)


def _pairs(s: Shape, flops: int) -> int:
    return flops // 2 if s.causal else flops


def _conv_leaves(s: Shape, randn: Randn) -> Leaves:
    tokens, sizes = (s.batch, s.tokens), (KERNEL,) if s.causal else (KERNEL, KERNEL)
    q, v = (randn(*tokens, s.channels) for _ in range(2))
    return q, randn(*tokens, s.heads), v, randn(s.heads, *sizes)


OPERATORS = {
    "softmax": Operator(
        _qkv,
        lambda s, qkv, **words: sansmax.softmax(*s.split(qkv), causal=s.causal, **words),
        lambda s, qkv: published.published_softmax(*s.unbind(qkv), causal=s.causal),
        lambda s: _pairs(s, _of_heads(softmax.flops)(s)),
        lambda s: s.batch * s.heads * s.tokens**2,
    ),
    "sima": Operator(
        _qkv,
        lambda s, qkv, **words: sansmax.sima(*s.split(qkv), causal=s.causal, **words),
        lambda s, qkv: published.published_sima(*s.unbind(qkv), causal=s.causal),
        _of_heads(sima.flops),
        lambda s: s.batch * s.heads * s.tokens**2 * s.causal,
    ),
    "xnorm": Operator(
        lambda s, randn: (*_qkv(s, randn), 1 + 0.1 * randn(s.heads)),
        lambda s, qkv, gamma, **words: sansmax.xnorm(*s.split(qkv), gamma=gamma, causal=s.causal, **words),
        lambda s, qkv, gamma: published.published_xnorm(*s.unbind(qkv), gamma=gamma, causal=s.causal),
        _of_heads(xnorm.flops),
        lambda s: s.batch * s.channels * s.tokens * s.dim * s.causal,
    ),
    "soft": Operator(
        lambda s, randn: (
            randn(s.batch, s.heads, s.tokens, s.dim) * s.dim**-0.25,
            randn(s.batch, s.heads, s.tokens, s.dim),
            F.gelu(randn(s.batch, s.heads, LANDMARKS, s.dim)),
        ),
        lambda s, q, v, landmarks, **words: sansmax.soft(q, v, landmarks, **words),
        lambda s, q, v, landmarks: published.published_soft(q, v, landmarks),
        lambda s: soft.flops(s.batch, s.heads, s.tokens, s.dim, s.dim, LANDMARKS),
        causal=False,
    ),
    "external": Operator(
        lambda s, randn: (
            randn(s.batch, s.tokens, s.channels),
            randn(MEMORY, s.channels) * (2 / s.channels) ** 0.5,
            randn(MEMORY, s.channels) * (2 / s.channels) ** 0.5,
        ),
        lambda s, x, memory_k, memory_v, **words: sansmax.external(x, memory_k, memory_v, **words),
        lambda s, x, memory_k, memory_v: published.published_external(x, memory_k, memory_v),
        lambda s: external.flops(s.batch, 1, s.tokens, s.channels, s.channels, MEMORY),
        causal=False,
    ),
    "aft_full": Operator(
        _biased,
        lambda s, qkv, w, **words: sansmax.aft_full(*_channels(qkv), w, causal=s.causal, **words),
        lambda s, qkv, w: published.published_aft_full(*_channels(qkv), w, s.causal),
        lambda s: _pairs(s, full.flops(s.batch, s.tokens, s.channels)),
        lambda s: s.tokens**2,
    ),
    "aft_local": Operator(
        _biased,
        lambda s, qkv, w, **words: sansmax.aft_local(*_channels(qkv), w, WINDOW, causal=s.causal, **words),
        lambda s, qkv, w: published.published_aft_local(*_channels(qkv), w, WINDOW, s.causal),
        lambda s: local.flops(s.batch, s.tokens, s.channels, WINDOW),
        lambda s: s.tokens**2,
    ),
    "aft_simple": Operator(
        _qkv,
        lambda s, qkv, **words: sansmax.aft_simple(*_channels(qkv), causal=s.causal, **words),
        lambda s, qkv: published.published_aft_simple(*_channels(qkv), s.causal),
        lambda s: simple.flops(s.batch, s.tokens, s.channels),
    ),
    "aft_conv": Operator(
        _conv_leaves,
        lambda s, q, k, v, w, **words: sansmax.aft_conv(
            q, k, v, w, grid=None if s.causal else s.grid(), causal=s.causal, **words
        ),
        lambda s, q, k, v, w: published.published_aft_conv(q, k, v, w, None if s.causal else s.grid()),
        lambda s: conv.flops(s.batch, s.tokens, s.channels, s.heads, KERNEL if s.causal else KERNEL**2),
    ),
}


def operator_cases(
    names: Sequence[str],
    *,
    tokens: Sequence[int],
    batch: Sequence[int],
    heads: Sequence[int],
    dim: Sequence[int],
    backend: Sequence[str],
    dtype: Sequence[str],
    device: str,
    causal: bool = False,
) -> Iterator[Case]:
    """Every operator at every combination of the others, the smallest first.

    Forms: "sansmax", "published" and "sdpa", F.scaled_dot_product_attention on q, k and v of the same shape.
    With `causal` all three are, and of the operators those that can be.
    """
    known = {name: op for name, op in OPERATORS.items() if op.causal or not causal}
    chosen = [pick("causal operators" if causal else "operators", name, known) for name in names or known]
    for kind, h, d, b, n, served, name in itertools.product(
        dtype, heads, dim, batch, sorted(tokens), backend, chosen
    ):
        shape = Shape(b, n, h, d, causal)
        about = {"op": name, "tokens": n, "batch": b, "heads": h, "dim": d}
        if causal:
            about["causal"] = True
        yield Case(
            about | {"backend": served, "dtype": kind, "device": device},
            functools.partial(_forms, OPERATORS[name], shape, served, getattr(torch, kind), device),
            yardstick="published",
            tolerance="operator",
        )


def _forms(op: Operator, shape: Shape, backend: str, dtype: torch.dtype, device: str) -> dict[str, Form]:
    generator = torch.Generator().manual_seed(shape.tokens)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    leaves, qkv = (
        tuple(t.to(device, dtype).requires_grad_() for t in make(shape, randn)) for make in (op.leaves, _qkv)
    )
    known, flops, scratch = functools.partial(op.published, shape), op.flops(shape), MAP_BYTES * op.map(shape)
    softmax = OPERATORS["softmax"]
    return {
        "sansmax": Form(
            functools.partial(op.ours, shape, backend=backend), leaves, known, flops, scratch=scratch
        ),
        "published": Form(known, leaves, known, flops, scratch=scratch),
        "sdpa": Form(
            lambda x: F.scaled_dot_product_attention(*shape.unbind(x), is_causal=shape.causal),
            qkv,
            functools.partial(softmax.published, shape),
            softmax.flops(shape),
            scratch=MAP_BYTES * softmax.map(shape),
        ),
    }
