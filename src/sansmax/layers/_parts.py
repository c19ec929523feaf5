"""What several layers share."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._split import split_heads
from ..ops.external import external, external_map
from ._contract import Grid, Mixer

__all__ = ["HeadsMixer", "kept", "pulled_back", "recalled", "recalled_together", "state_dtype"]


def state_dtype(weight: Tensor) -> torch.dtype:
    """Streaming sums are kept in float32 or better."""
    return torch.promote_types(weight.dtype, torch.float32)


def recalled(
    x: Tensor, memory_k: Tensor, memory_v: Tensor, mask: Tensor | None, eps: float, drop: nn.Dropout
) -> Tensor:
    """External attention with dropout on its map, which is written out for that alone."""
    if drop.training and drop.p > 0:
        attention = drop(external_map(x, memory_k, mask=mask, eps=eps))
        return (attention @ memory_v.to(attention.dtype)).to(x.dtype)
    return external(x, memory_k, memory_v, mask=mask, eps=eps)


def kept(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Weights of tokens (B, N), 0 where they are masked."""
    return rows if mask is None else rows.masked_fill(~mask, 0)


def recalled_together(attention: Tensor, rows: Tensor) -> Tensor:
    """rows A, where A[n, m] = sum over s of a[n, s] a[m, s] / sum over m of a[m, s].

    Args:
        attention: a, (B, H, N, S), of tokens and memory rows.
        rows: (B, N).
    """
    used = attention.sum(-2, keepdim=True)
    share = attention / torch.where(used > 0, used, 1)
    return (rows[:, None, None].to(attention.dtype) @ attention @ share.mT).squeeze(-2)


def pulled_back(mix: Callable[[Tensor], Tensor], values: Tensor, rows: Tensor) -> Tensor:
    """rows A of y = mix(values) = A values, as the gradient of sum(rows y): at the cost of mix's backward.

    rows: what broadcasts to y; 0 where a token is masked.

    Raises:
        ValueError: within torch.export, whose graphs hold no gradient.
    """
    if torch.compiler.is_exporting():
        raise ValueError(
            "map: expected a call outside of torch.export, got one within, where a map that is found as a "
            "gradient cannot be written down; use SimA, XNorm, AFTSimple or External Attention"
        )
    with torch.inference_mode(False), torch.enable_grad():
        values = torch.zeros_like(values, requires_grad=True)
        y = mix(values)
        (found,) = torch.autograd.grad(y, values, rows.to(y.dtype).expand_as(y))
    return found


class HeadsMixer(Mixer):
    """qkv projection and heads as in timm's Attention around an operator on (B, H, N, D)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """q (B, H, N, D), k, v (B, H, M, D) -> (B, H, N, D)."""
        raise NotImplementedError

    def attend_step(self, q: Tensor, k: Tensor, v: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One token: q, k, v (B, H, D) -> (B, H, D) and the next state."""
        raise NotImplementedError

    def mix(
        self, x: Tensor, context: Tensor | None, mask: Tensor | None, causal: bool, grid: Grid | None
    ) -> Tensor:
        return self.attend(*self.heads(x, context), mask, causal).transpose(1, 2).flatten(2)

    def heads(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, N, C), context (B, M, C) -> q (B, H, N, D), k, v (B, H, M, D), strided views."""
        if context is None:
            q, k, v = split_heads(self.qkv(x), self.num_heads)
        else:
            weight, bias, rows = self.qkv.weight, self.qkv.bias, self.attn_dim
            q_bias, kv_bias = (None, None) if bias is None else (bias[:rows], bias[rows:])
            q = F.linear(x, weight[:rows], q_bias).unflatten(-1, (self.num_heads, self.head_dim))
            kv = F.linear(context, weight[rows:], kv_bias).unflatten(-1, (2, self.num_heads, self.head_dim))
            q, (k, v) = q.transpose(1, 2), kv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.q_norm(q), self.k_norm(k), v

    def queries(self, x: Tensor) -> Tensor:
        """q of `heads` without its k and v."""
        return self.heads(x, x[:, :0])[0]

    def keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """k and v of `heads` without its q."""
        return self.heads(x[:, :0], x)[1:]

    def map_product(
        self, x: Tensor, rows: Tensor, *, mask: Tensor | None = None, grid: Grid | None = None
    ) -> Tensor:
        x, _, mask = self.received(x, None, False, None, mask)
        q, k, v = self.heads(x)
        mix = partial(self.attend, q, k, mask=mask, causal=False)
        return pulled_back(mix, v[..., :1], kept(rows, mask)[:, None, :, None]).squeeze(-1)

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        self.check_tokens("x", x, ("B", self.dim))
        q, k, v = (t.squeeze(2) for t in self.heads(x[:, None]))
        y, state = self.attend_step(q, k, v, state)
        return self.output(y.flatten(1), x), state

    def attend_flops(self, n: int, m: int) -> int:
        """The operator's own count."""
        raise NotImplementedError

    def flops(self, n: int, m: int | None = None) -> int:
        m = n if m is None else m
        projections = 4 * self.dim * self.attn_dim * (n + m)
        return projections + self.attend_flops(n, m)
