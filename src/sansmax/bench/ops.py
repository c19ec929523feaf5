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
    flops: Callable[[Shape], int]
    map: Callable[[Shape], int] = lambda _: 0  # entries of the published form's map of token pairs


def _qkv(s: Shape, randn: Randn) -> Leaves:
    return (randn(s.batch, s.tokens, 3 * s.channels),)


def _biased(s: Shape, randn: Randn) -> Leaves:
    return *_qkv(s, randn), randn(s.tokens, s.tokens)


def _of_heads(flops: Callable[..., int]) -> Callable[[Shape], int]:
    return lambda s: flops(s.batch, s.heads, s.tokens, s.tokens, s.dim, s.dim)


def _xnorm(s: Shape, qkv: Tensor, gamma: Tensor, backend: str) -> Tensor:
    return sansmax.xnorm(*s.split(qkv), gamma, backend=backend)


OPERATORS = {
    "softmax": Operator(
        _qkv,
        lambda s, qkv, **words: sansmax.softmax(*s.split(qkv), **words),
        lambda s, qkv: published.published_softmax(*s.unbind(qkv)),
        _of_heads(softmax.flops),
        lambda s: s.batch * s.heads * s.tokens**2,
    ),
    "sima": Operator(
        _qkv,
        lambda s, qkv, **words: sansmax.sima(*s.split(qkv), **words),
        lambda s, qkv: published.published_sima(*s.unbind(qkv)),
        _of_heads(sima.flops),
    ),
    "xnorm": Operator(
        lambda s, randn: (*_qkv(s, randn), 1 + 0.1 * randn(s.heads)),
        _xnorm,
        lambda s, qkv, gamma: published.published_xnorm(*s.unbind(qkv), gamma=gamma),
        _of_heads(xnorm.flops),
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
    ),
    "aft_full": Operator(
        _biased,
        lambda s, qkv, w, **words: sansmax.aft_full(*_channels(qkv), w, **words),
        lambda s, qkv, w: published.published_aft_full(*_channels(qkv), w),
        lambda s: full.flops(s.batch, s.tokens, s.channels),
        lambda s: s.tokens**2,
    ),
    "aft_local": Operator(
        _biased,
        lambda s, qkv, w, **words: sansmax.aft_local(*_channels(qkv), w, WINDOW, **words),
        lambda s, qkv, w: published.published_aft_local(*_channels(qkv), w, WINDOW),
        lambda s: local.flops(s.batch, s.tokens, s.channels, WINDOW),
        lambda s: s.tokens**2,
    ),
    "aft_simple": Operator(
        _qkv,
        lambda s, qkv, **words: sansmax.aft_simple(*_channels(qkv), **words),
        lambda s, qkv: published.published_aft_simple(*_channels(qkv)),
        lambda s: simple.flops(s.batch, s.tokens, s.channels),
    ),
    "aft_conv": Operator(
        lambda s, randn: (
            randn(s.batch, s.tokens, s.channels),
            randn(s.batch, s.tokens, s.heads),
            randn(s.batch, s.tokens, s.channels),
            randn(s.heads, KERNEL, KERNEL),
        ),
        lambda s, q, k, v, w, **words: sansmax.aft_conv(q, k, v, w, grid=s.grid(), **words),
        lambda s, q, k, v, w: published.published_aft_conv(q, k, v, w, s.grid()),
        lambda s: conv.flops(s.batch, s.tokens, s.channels, s.heads, KERNEL**2),
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
) -> Iterator[Case]:
    """Every operator at every combination of the others, the smallest first.

    Forms: "sansmax", "published" and "sdpa", F.scaled_dot_product_attention on q, k and v of the same shape.
    """
    chosen = [pick("operators", name, OPERATORS) for name in names or OPERATORS]
    for kind, h, d, b, n, served, name in itertools.product(
        dtype, heads, dim, batch, sorted(tokens), backend, chosen
    ):
        shape = Shape(b, n, h, d)
        about = {"op": name, "tokens": n, "batch": b, "heads": h, "dim": d}
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
            lambda x: F.scaled_dot_product_attention(*shape.unbind(x)),
            qkv,
            functools.partial(softmax.published, shape),
            softmax.flops(shape),
            scratch=MAP_BYTES * softmax.map(shape),
        ),
    }
