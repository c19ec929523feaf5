"""XNorm: l2 norms in place of softmax (UFO-ViT, X-ViT; without gamma the BiNorm of ViBid)."""

import torch
from torch import Tensor, nn

from ..ops import _check
from ..ops.xnorm import XNormState, flops, parts, xnorm, xnorm_init_state, xnorm_step
from ..ops.xnorm._norms import row_scale
from ._contract import Grid, Traits
from ._parts import HeadsMixer, kept, state_dtype

__all__ = ["XNorm"]


class XNorm(HeadsMixer):
    """out = gamma^2 (unit queries) (K^T V with unit columns) per head; qkv rows are [Q; K; V] as in softmax.

    Args:
        gamma: a learned number per head that scales both factors, 1 at the start (its init is not published;
            1 is BiNorm); False leaves it out, then the parameters are those of softmax.
        attn_dim: width of the attention, the bottleneck h of the papers' tables; None for dim.
        eps: floor of the l2 norms.

    Other options: see Mixer.
    """

    traits = Traits(
        title="XNorm",
        paper="Song and Lee, X-ViT: High Performance Linear Vision Transformer without Softmax, 2022 "
        "(arXiv 2205.13805); ViBid, UAI 2023 (PMLR 216)",
        computes="unit queries times K^T V with unit columns: a cosine similarity, at most gamma^2",
        cost="N D^2",
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
        gamma: bool = True,
        attn_dim: int | None = None,
        eps: float = 1e-12,
        **words,
    ) -> None:
        super().__init__(*args, attn_dim=attn_dim, **words)
        self.eps = eps
        self.gamma = nn.Parameter(torch.ones(self.num_heads, **self.factory)) if gamma else None

    def reset_parameters(self) -> None:
        if self.gamma is not None:
            nn.init.ones_(self.gamma)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        return xnorm(q, k, v, self.gamma, mask=mask, causal=causal, eps=self.eps)

    def map_product(
        self, x: Tensor, rows: Tensor, *, mask: Tensor | None = None, grid: Grid | None = None
    ) -> Tensor:
        """See Mixer. A[n, m] = gamma^2 (unit q_n . k_m) times the mean over the value channels e of
        1 / ||column e of K^T V||: each channel has a map of its own, and they differ by that factor."""
        x, _, mask = self.received(x, None, False, None, mask)
        q, k, v = (t.double() for t in self.heads(x))  # squares of K^T V leave float32
        k, v = _check.cleared(mask, k, v)
        norms = torch.linalg.vector_norm(k.mT @ v, dim=-2, keepdim=True).clamp(min=self.eps)
        q = q * row_scale(q, self.gamma, self.eps)
        rows = kept(rows, mask)[:, None, None].double()
        found = (rows @ q @ k.mT).squeeze(-2) * norms.reciprocal().mean(-1)
        return found.to(torch.promote_types(x.dtype, torch.float32))

    def token_sums(self, x: Tensor, before: XNormState | None = None) -> XNormState:
        return parts.summed(*self.keys(x), before)

    def from_sums(self, x: Tensor, sums: XNormState) -> Tensor:
        y = parts.applied(self.queries(x), sums, self.gamma, self.eps)
        return self.output(y.transpose(1, 2).flatten(2), x)

    def attend_step(self, q: Tensor, k: Tensor, v: Tensor, state: XNormState) -> tuple[Tensor, XNormState]:
        return xnorm_step(q, k, v, state, self.gamma, eps=self.eps)

    def init_state(self, batch_size: int) -> XNormState:
        weight = self.qkv.weight
        return xnorm_init_state(
            batch_size, self.num_heads, self.head_dim, dtype=state_dtype(weight), device=weight.device
        )

    def state_size(self, n: int) -> int:
        return self.attn_dim * self.head_dim

    def attend_flops(self, n: int, m: int) -> int:
        return flops(1, self.num_heads, n, m, self.head_dim, self.head_dim)
