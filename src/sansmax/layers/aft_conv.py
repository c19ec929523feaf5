"""AFT-conv: gated averages whose position bias is a small kernel around every token."""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.aft import aft_conv, aft_conv_init_state, aft_conv_step, reparameterize
from ..ops.aft.conv import AFTConvState, flops
from ..ops.aft.conv.fused import within
from ._aft import PAPER, AFTMixer
from ._contract import Grid, Traits
from ._parts import state_dtype

__all__ = ["AFTConv"]


class AFTConv(AFTMixer):
    """AFT-full with w_tu = kernel[u - t] inside a window and 0 outside; one kernel and one key per head.

    `qkv` has C + H + C rows: queries, one key per head, values. A kernel of head h is gamma_h (w_h - mean) /
    std + beta_h with gamma = beta = 0 at the start, so that training begins with a gated global average; the
    raw `w` gets no gradient until gamma has moved. Tokens in front of the grid (a class token) have bias 0
    with every token.

    Args:
        num_heads: H; the paper's image models have 16 to C of them.
        kernel_size: s, odd; 11 and 15 in the paper.
        kernel_dims: 2 for a grid of patches, 1 for a sequence, which can also be causal (the last of the s
            taps is then the token itself, and s may be even) and streams.
        normalise: the parameterisation above; False uses `w` as it is.
        unbiased: the standard deviation divides by the number of entries less 1 (the paper does not say).
        grid, num_prefix_tokens: as in set_input.
        out_proj: the linear layer `proj` behind.

    Other options: see Mixer.
    """

    traits = Traits(
        title="AFT-conv",
        paper=PAPER,
        computes="averages of the values, weighted by exp(key + a bias for near tokens), then gated",
        cost="N s^2 D",
        causal=True,
        cross=False,
        mask=True,
        streaming=True,
        exp_free=False,
        needs="grid",
    )
    head_norms = ()
    no_qk_norm = "it has one key number per head"

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *args,
        kernel_size: int = 11,
        kernel_dims: int = 2,
        normalise: bool = True,
        unbiased: bool = True,
        grid: Grid | None = None,
        num_prefix_tokens: int | None = None,
        **words,
    ) -> None:
        super().__init__(dim, num_heads, *args, inputs={"qkv": 2 * dim + num_heads}, **words)
        if kernel_dims not in (1, 2):
            raise ValueError(
                f"AFTConv: kernel_dims must be 2 (a grid) or 1 (a sequence), got {kernel_dims}; "
                f"use 2 for images"
            )
        if kernel_size < 1 or (kernel_size % 2 == 0 and kernel_dims == 2):
            raise ValueError(
                f"AFTConv: kernel_size must be odd, got {kernel_size}; use {max(kernel_size, 0) + 1}"
            )
        if normalise and kernel_size == 1:
            raise ValueError(
                "AFTConv: kernel_size must be at least 3 with normalise=True, got 1, whose spread is 0; "
                "use normalise=False"
            )
        if kernel_dims == 2:
            self.no_causal = "a kernel over a grid has no past"
        self.kernel_dims, self.normalise, self.unbiased = kernel_dims, normalise, unbiased
        self.bounded = False
        self.w = nn.Parameter(torch.empty(num_heads, *[kernel_size] * kernel_dims, **self.factory))
        if normalise:
            self.gamma = nn.Parameter(torch.empty(num_heads, **self.factory))
            self.beta = nn.Parameter(torch.empty(num_heads, **self.factory))
        if grid is not None:
            self.set_input(grid, num_prefix_tokens or 0)
        self.num_prefix_tokens = num_prefix_tokens
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if not self.normalise:
            nn.init.zeros_(self.w)
            return
        nn.init.normal_(self.w)
        nn.init.zeros_(self.gamma)
        nn.init.zeros_(self.beta)

    def kernel(self) -> Tensor:
        """w as the operator takes it: (H, s) or (H, s, s)."""
        if not self.normalise:
            return self.w
        return reparameterize(self.w, self.gamma, self.beta, unbiased=self.unbiased)

    def channels(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).split((self.dim, self.num_heads, self.dim), -1)
        return q, k, v

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, grid: Grid | None
    ) -> Tensor:
        if self.kernel_dims == 1:
            prefix = 0 if causal else self.num_prefix_tokens or 0
            return aft_conv(q, k, v, self.kernel(), causal=causal, mask=mask, prefix_tokens=prefix)
        rows, columns, prefix = self.layout(q.shape[1], grid)
        words: dict[str, Any] = {"grid": (rows, columns), "mask": mask, "prefix_tokens": prefix}
        return aft_conv(q, k, v, self.kernel(), bounded=self.bounded, **words)

    def fold_scales(self) -> None:
        """Writes the kernels down as the operator takes them: for inference alone."""
        kernel = self.kernel().detach()
        if self.normalise:
            del self.gamma, self.beta
        self.w, self.normalise = nn.Parameter(kernel, requires_grad=False), False
        self.bounded = within(kernel)

    @classmethod
    def sequence_words(cls, max_tokens: int) -> dict[str, Any]:
        return {"kernel_dims": 1}

    def no_weight_decay(self) -> set[str]:
        return {"w"}

    def attend_step(
        self, q: Tensor, k: Tensor, v: Tensor, state: AFTConvState
    ) -> tuple[Tensor, AFTConvState]:
        return aft_conv_step(q, k, v, self.kernel(), state)

    def init_state(self, batch_size: int) -> AFTConvState:
        if self.no_causal:
            raise ValueError(
                f"AFTConv: there is no streaming form because {self.no_causal}; use kernel_dims=1"
            )
        weight, size = self.qkv.weight, self.w.shape[-1]
        return aft_conv_init_state(
            batch_size, self.dim, self.num_heads, size, dtype=state_dtype(weight), device=weight.device
        )

    def state_size(self, n: int) -> int:
        return (self.dim + self.num_heads) * (self.w.shape[-1] - 1) + self.dim + 2 * self.num_heads

    def flops(self, n: int, m: int | None = None) -> int:
        return self.projection_flops(n) + flops(1, n, self.dim, self.num_heads, self.w[0].numel())
