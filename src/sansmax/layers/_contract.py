"""What every layer takes, returns, refuses, and tells of its cost."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..ops import _check

__all__ = ["Mixer", "Traits"]

Grid = tuple[int, int]


@dataclass(frozen=True)
class Traits:
    """What a mechanism is and can do; `list`, `compare` and the trunks read it."""

    title: str
    paper: str  # citation with its arXiv number
    computes: str  # the equation in one sentence
    cost: str  # growth of the mixing itself, projections apart: "N D^2"
    causal: bool
    cross: bool  # context= with another number of tokens
    mask: bool
    streaming: bool  # init_state and step
    exp_free: bool
    needs: Literal["", "tokens", "grid"] = ""  # what set_input tells it


class Mixer(nn.Module):
    """Base of all layers: (B, N, C) -> (B, N, C), with the constructor words of timm's Attention.

    A subclass names its linear layers in front (`inputs`: name -> rows) and writes `mix`; `norm`, `proj` and
    `proj_drop` follow it here.

    Args:
        dim: C.
        num_heads: H, a divisor of the attention's width.
        qkv_bias, proj_bias: biases of the linear layers in front and of `proj`.
        qk_norm: `norm_layer(head_dim)` on queries and on keys, head by head.
        scale_norm: `norm_layer(width)` before `proj`.
        attn_drop: dropout on the attention map; softmax and External Attention have one, the others refuse a
            value above 0.
        proj_drop: dropout behind `proj`.
        norm_layer: called as norm_layer(width, device=, dtype=).

    Options of its own are keywords; an unknown keyword is a TypeError.
    """

    traits: ClassVar[Traits]
    attention_map: ClassVar[bool] = False
    in_parts: ClassVar[bool] = False  # token_sums and from_sums
    head_norms: ClassVar[tuple[str, ...]] = ("q_norm", "k_norm")
    # Parameters that cancel in the output and are there for published weights.
    unused: tuple[str, ...] = ()
    # Why the layer cannot honour an argument; "" where it can.
    no_causal: str = ""
    no_cross: str = ""
    no_qk_norm: str = ""

    qkv: nn.Linear
    q_norm: nn.Module
    k_norm: nn.Module
    attn_drop: nn.Dropout

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        inputs: dict[str, int] | None = None,
        attn_dim: int | None = None,
        out_proj: bool = True,
    ) -> None:
        super().__init__()
        attn_dim = dim if attn_dim is None else attn_dim
        if dim < 1 or attn_dim < 1 or num_heads < 1 or attn_dim % num_heads:
            raise ValueError(
                f"{self.name}: num_heads must divide the width {attn_dim} into equal heads, got {num_heads}; "
                f"use one of {[h for h in range(1, attn_dim + 1) if attn_dim % h == 0]}"
            )
        if attn_drop > 0 and not self.attention_map:
            raise ValueError(
                f"{self.name}: attn_drop must be 0 because only softmax and External Attention drop from an "
                f"attention map, got {attn_drop}; use proj_drop"
            )
        if qk_norm and self.no_qk_norm:
            raise ValueError(
                f"{self.name}: qk_norm must be False because {self.no_qk_norm}, got True; use scale_norm"
            )
        if (qk_norm or scale_norm) and norm_layer is None:
            raise ValueError(
                f"{self.name}: qk_norm and scale_norm need a norm_layer, got None; pass nn.LayerNorm"
            )
        if not out_proj and attn_dim != dim:
            raise ValueError(
                f"{self.name}: out_proj=False needs an attention as wide as dim={dim}, got {attn_dim}"
            )
        self.dim, self.num_heads = dim, num_heads
        self.attn_dim, self.head_dim = attn_dim, attn_dim // num_heads
        self.factory = {"device": device, "dtype": dtype}
        self.grid: Grid | None = None
        self.num_prefix_tokens: int | None = None
        for key, rows in ({"qkv": 3 * attn_dim} if inputs is None else inputs).items():
            self.add_module(key, nn.Linear(dim, rows, bias=qkv_bias, **self.factory))
        for key in self.head_norms:
            self.add_module(key, norm_layer(self.head_dim, **self.factory) if qk_norm else nn.Identity())
        self.norm = norm_layer(attn_dim, **self.factory) if scale_norm else nn.Identity()
        self.proj = nn.Linear(attn_dim, dim, bias=proj_bias, **self.factory) if out_proj else nn.Identity()
        if self.attention_map:
            self.attn_drop = nn.Dropout(attn_drop)
        self.proj_drop = nn.Dropout(proj_drop)

    @property
    def name(self) -> str:
        """The class name, which begins every message."""
        return type(self).__name__

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
        """Mixes the tokens of each sequence.

        Args:
            x: (B, N, C).
            attn_mask: a key mask in the shapes of F.scaled_dot_product_attention: bool (B, 1, 1, M),
                (1, 1, 1, M) or (B, M), True = keep. Only softmax takes one per query.
            is_causal: token i sees tokens j <= i.
            context: (B, M, C), what keys and values are made of, in place of x.
            mask: (B, M) bool, True = keep: what a masked token holds changes nothing and gets no gradient.
            grid: (rows, columns) of the patch tokens, for layers that use it, in place of set_input's.

        Returns:
            (B, N, C).

        Raises:
            ValueError, TypeError: a shape does not fit or the layer cannot honour an argument.
        """
        x, context, mask = self.received(x, attn_mask, is_causal, context, mask)
        return self.output(self.mix(x, context, mask, is_causal, grid), x)

    def mix(
        self, x: Tensor, context: Tensor | None, mask: Tensor | None, causal: bool, grid: Grid | None
    ) -> Tensor:
        """(B, N, C) -> (B, N, attn_dim), everything in front of `norm`; masked tokens hold zeros."""
        raise NotImplementedError

    def output(self, y: Tensor, x: Tensor) -> Tensor:
        """y (..., attn_dim) -> (..., C); x is what the layer was given, for those that add it themselves."""
        return self.proj_drop(self.proj(self.norm(y)))

    def token_sums(self, x: Tensor, before: Any = None) -> Any:
        """What `forward` needs of all tokens, summed in float64 over x (B, N, C) on top of `before`.

        `before` is what the call for an earlier part of the tokens gave. Its size does not depend on their
        number.
        """
        raise ValueError(f"{self.name}: there is no form in parts; use SimA, XNorm or AFTSimple")

    def from_sums(self, x: Tensor, sums: Any) -> Tensor:
        """What `forward` gives for x (B, n, C), some of the tokens, where `sums` are the sums over all."""
        raise ValueError(f"{self.name}: there is no form in parts; use SimA, XNorm or AFTSimple")

    def map_product(
        self, x: Tensor, rows: Tensor, *, mask: Tensor | None = None, grid: Grid | None = None
    ) -> Tensor:
        """rows A, what flows from every token into the outputs that `rows` weighs, without the N x N map A.

        out[b, h, m] = sum over n of rows[b, n] A[b, h, n, m], where the mixing of head h is y_n = sum over m
        of A[n, m] v_m. A is what the class says of its map; the axis h of the AFT layers is the channels.

        Args:
            x: (B, N, C), what `forward` is given; mask and grid too.
            rows: (B, N). One-hot: what that token attends to.

        Returns:
            (B, H, N), signed where the mechanism is, in the dtype of the computation.
        """
        raise NotImplementedError

    def map_row(
        self, x: Tensor, query: int, *, mask: Tensor | None = None, grid: Grid | None = None
    ) -> Tensor:
        """A[:, :, query], what token `query` attends to: (B, H, N). At the cost of O(N)."""
        rows = x.new_zeros(x.shape[:2])
        rows[:, query] = 1
        return self.map_product(x, rows, mask=mask, grid=grid)

    def init_state(self, batch_size: int) -> Any:
        """The state of `step` before the first token."""
        raise ValueError(f"{self.name}: there is no streaming form; use Softmax, SimA, XNorm or an AFT layer")

    def fixed_state(self, batch_size: int) -> Any:
        """`init_state` with shapes that no step changes, where there is such a form; for graphs."""
        return self.init_state(batch_size)

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One token: x (B, C) -> (B, C) and the next state; equal to forward(..., is_causal=True)."""
        raise ValueError(f"{self.name}: there is no streaming form; use Softmax, SimA, XNorm or an AFT layer")

    def state_size(self, n: int) -> int:
        """Numbers kept for one sequence while decoding its token n + 1."""
        raise ValueError(f"{self.name}: there is no streaming form; use Softmax, SimA, XNorm or an AFT layer")

    def flops(self, n: int, m: int | None = None) -> int:
        """Two for each multiply-add of projections and mixing: one sequence, n tokens, m of context."""
        raise NotImplementedError

    def set_input(self, grid: Grid, num_prefix_tokens: int = 0) -> None:
        """Tells the layer its patch grid (rows, columns) and the number of tokens in front of it.

        Learned tables are resampled to it. Nothing happens in a layer that needs neither.
        """
        if len(grid) != 2 or min(grid) < 1 or num_prefix_tokens < 0:
            raise ValueError(
                f"{self.name}: set_input needs grid=(rows, columns), both at least 1, and "
                f"num_prefix_tokens >= 0, got grid={tuple(grid)} and num_prefix_tokens={num_prefix_tokens}"
            )
        if self.traits.needs:
            grid = int(grid[0]), int(grid[1])
            self.resample(grid, num_prefix_tokens)
            self.grid, self.num_prefix_tokens = grid, num_prefix_tokens

    def resample(self, grid: Grid, num_prefix_tokens: int) -> None:
        """Fits learned tables to a new grid; `self.grid` is still the old one."""

    def reset_parameters(self) -> None:
        """Draws the parameters that are no linear layer's, convolution's or norm's anew."""

    @classmethod
    def sequence_words(cls, max_tokens: int) -> dict[str, Any]:
        """The options that make the layer one for sequences of up to `max_tokens` tokens."""
        return {}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that should not decay although they are matrices."""
        return set()

    def layout(self, tokens: int, grid: Grid | None) -> tuple[int, int, int]:
        """(rows, columns, prefix tokens) of a sequence of `tokens` tokens.

        `grid` goes before set_input's. Where neither is known, a square number of tokens is a square grid,
        behind num_prefix_tokens tokens or, if that is unknown too, behind none or one (a class token).
        """
        grid = self.grid if grid is None else grid
        prefixes = (0, 1) if self.num_prefix_tokens is None else (self.num_prefix_tokens,)
        for prefix in prefixes:
            patches = tokens - prefix
            if patches < 1:
                continue
            # Not asked of a known grid: a symbolic number has no root in a graph.
            rows, columns = (math.isqrt(patches),) * 2 if grid is None else grid
            if rows * columns == patches:
                return rows, columns, prefix
        known = "no grid is known" if grid is None else f"the grid is {tuple(grid)}"
        raise ValueError(
            f"{self.name}: {tokens} tokens cannot be laid out: {known} and there are "
            f"{' or '.join(map(str, prefixes))} prefix tokens; pass grid=(rows, columns), "
            f"or tell the layer once with set_input(grid, num_prefix_tokens)"
        )

    def received(
        self, x: Tensor, attn_mask: Tensor | None, causal: bool, context: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x, context and one key mask (B, M) of `mask` and `attn_mask`, with zeros in masked tokens.

        Refuses what the layer cannot do.
        """
        self.check_tokens("x", x, ("B", "N", self.dim))
        if causal and self.no_causal:
            raise ValueError(
                f"{self.name}: is_causal must be False because {self.no_causal}, got True; "
                f"use Softmax, SimA, XNorm or an AFT layer"
            )
        if context is not None:
            if self.no_cross:
                raise ValueError(
                    f"{self.name}: context must be None because {self.no_cross}, got a tensor; "
                    f"use Softmax, SimA or XNorm for cross-attention"
                )
            if causal:
                raise ValueError(
                    f"{self.name}: is_causal=True is not defined with context, which has no order in common "
                    f"with x; use mask"
                )
            self.check_tokens("context", context, (x.shape[0], "M", self.dim))
        keys = x if context is None else context
        if attn_mask is not None:
            attn_mask = self._key_mask(attn_mask, x.shape[1], *keys.shape[:2])
            mask = attn_mask if mask is None else mask & attn_mask
        _check.key_mask(self.name, mask, keys.shape[0], keys.shape[1], keys)
        (keys,) = _check.cleared(mask, keys)
        return (keys, None, mask) if context is None else (x, keys, mask)

    def check_tokens(self, name: str, x: Tensor, expected: tuple[str | int, ...]) -> None:
        """Refuses what is no floating tensor of the expected shape."""
        _check.floating(self.name, **{name: x})
        _check.shape(
            self.name,
            name,
            x,
            expected,
            "a layer takes tokens; use x.flatten(2).transpose(1, 2) on a feature map",
        )

    def _key_mask(self, attn_mask: Tensor, queries: int, batch: int, keys: int) -> Tensor:
        shape = tuple(attn_mask.shape)
        if shape == (queries, keys) and queries == batch > 1:
            raise ValueError(
                f"{self.name}: attn_mask must say whether its first axis is the batch, got {shape} for "
                f"as many sequences as tokens; give a key mask as mask= or as ({batch}, 1, 1, {keys})"
            )
        wanted = [(first, *(1,) * ones, keys) for first in (batch, 1) for ones in (0, 2)]
        if attn_mask.dtype != torch.bool or shape not in wanted:
            raise ValueError(
                f"{self.name}: attn_mask must be a bool key mask of shape ({batch}, 1, 1, {keys}) or "
                f"({batch}, {keys}), True = keep, got {attn_mask.dtype} {shape}; a mask per query "
                f"exists only in Softmax, use is_causal or mask here"
            )
        return attn_mask.reshape(-1, keys).expand(batch, keys)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}"
