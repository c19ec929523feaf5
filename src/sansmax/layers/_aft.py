"""What the AFT layers share: channel projections, and position biases that follow the patch grid."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._eager import for_all
from ._contract import Grid, Mixer
from ._parts import kept, pulled_back

__all__ = ["PAPER", "AFTMixer", "PositionBiasMixer"]

PAPER = "Zhai et al., An Attention Free Transformer, 2021 (arXiv 2105.14103)"


class AFTMixer(Mixer):
    """q, k, v (B, T, C) of one projection around an AFT operator; heads matter to qk_norm alone."""

    no_cross = "its position biases belong to the tokens of one sequence"

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, grid: Grid | None
    ) -> Tensor:
        """(B, T, C) each -> (B, T, C)."""
        raise NotImplementedError

    def attend_step(self, q: Tensor, k: Tensor, v: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One token: (B, C) each -> (B, C) and the next state."""
        raise NotImplementedError

    def mix(
        self, x: Tensor, context: Tensor | None, mask: Tensor | None, causal: bool, grid: Grid | None
    ) -> Tensor:
        return self.attend(*self.channels(x), mask, causal, grid)

    def channels(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (..., C) -> q, k, v (..., C), views of one projection."""
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.by_head(self.q_norm, q), self.by_head(self.k_norm, k), v

    def by_head(self, norm: nn.Module, x: Tensor) -> Tensor:
        """`norm` on every head's channels."""
        if isinstance(norm, nn.Identity):
            return x
        return norm(x.unflatten(-1, (self.num_heads, self.head_dim))).flatten(-2)

    def map_product(
        self, x: Tensor, rows: Tensor, *, mask: Tensor | None = None, grid: Grid | None = None
    ) -> Tensor:
        """See Mixer; H is the channels. A is the weights exp(k + w) over their sum, in front of the gate."""
        x, _, mask = self.received(x, None, False, None, mask)
        q, k, v = self.channels(x)
        open_gate = torch.zeros_like(q)  # sigmoid 1/2

        def mix(values: Tensor) -> Tensor:
            return 2 * self.attend(open_gate, k, values, mask, False, grid)

        return pulled_back(mix, v, kept(rows, mask)[..., None]).mT

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        self.check_tokens("x", x, ("B", self.dim))
        y, state = self.attend_step(*self.channels(x), state)
        return self.output(y, x), state

    def projection_flops(self, n: int) -> int:
        """Of `qkv` and `proj`."""
        out = self.attn_dim * self.dim if isinstance(self.proj, nn.Linear) else 0
        return 2 * n * (self.qkv.weight.numel() + out)


class PositionBiasMixer(AFTMixer):
    """A learned bias w for every pair of positions: u v^T of factors (T, R), or a table (T, T).

    Shorter sequences crop it. Once set_input has told a grid, the rows belong to the patches (behind the
    prefix tokens) and another grid resamples them, bicubic.
    """

    def __init__(
        self,
        *args,
        max_tokens: int = 197,
        factor_dim: int | None = 128,
        grid: Grid | None = None,
        num_prefix_tokens: int = 0,
        **words,
    ) -> None:
        super().__init__(*args, **words)
        if grid is not None:
            max_tokens = num_prefix_tokens + grid[0] * grid[1]
        if max_tokens < 1 or (factor_dim is not None and factor_dim < 1):
            raise ValueError(
                f"{self.name}: max_tokens and factor_dim must be at least 1, got {max_tokens} and "
                f"{factor_dim}; factor_dim=None is a table without factors"
            )
        self.factor_dim = factor_dim
        for key in self.position_tables:
            width = max_tokens if factor_dim is None else factor_dim
            self.register_parameter(key, nn.Parameter(torch.empty(max_tokens, width, **self.factory)))
        if grid is not None:
            self.set_input(grid, num_prefix_tokens)
        self.reset_parameters()

    @classmethod
    def sequence_words(cls, max_tokens: int) -> dict[str, Any]:
        return {"max_tokens": max_tokens}

    @property
    def position_tables(self) -> tuple[str, ...]:
        """Names of the parameters that hold w."""
        return ("bias",) if self.factor_dim is None else ("bias_u", "bias_v")

    @property
    def max_tokens(self) -> int:
        """The longest sequence that the table serves."""
        return self.get_parameter(self.position_tables[0]).shape[0]

    def reset_parameters(self) -> None:
        for key in self.position_tables:
            nn.init.normal_(self.get_parameter(key), std=0.01)

    def no_weight_decay(self) -> set[str]:
        return set(self.position_tables)

    def position_bias(self, tokens: int, grid: Grid | None) -> Tensor | tuple[Tensor, Tensor]:
        """w for a sequence of `tokens` tokens, in the form that the operators take."""
        tables = [self.get_parameter(key) for key in self.position_tables]
        if self.grid is not None or grid is not None:
            rows, columns, prefix = self.layout(tokens, grid)
            if self.grid is not None:
                tables = [self._resampled(table, (rows, columns), prefix) for table in tables]
        if tokens > tables[0].shape[0]:
            raise ValueError(
                f"{self.name}: a sequence must have at most max_tokens={self.max_tokens} tokens, got "
                f"{tokens}; build the layer with a larger max_tokens, or tell it its patch grid with "
                f"set_input(grid, num_prefix_tokens)"
            )
        return tables[0] if self.factor_dim is None else (tables[0], tables[1])

    def learned_bias(self) -> Tensor | tuple[Tensor, Tensor]:
        """w for the longest sequence."""
        tables = [self.get_parameter(key) for key in self.position_tables]
        return tables[0] if self.factor_dim is None else (tables[0], tables[1])

    def resample(self, grid: Grid, num_prefix_tokens: int) -> None:
        for key in self.position_tables:
            old = self.get_parameter(key)
            new = self._resampled(old.detach(), grid, num_prefix_tokens)
            self.register_parameter(key, nn.Parameter(new, requires_grad=old.requires_grad))

    def _resampled(self, table: Tensor, grid: Grid, prefix: int) -> Tensor:
        if not for_all(*grid) and (self.grid, self.num_prefix_tokens) == (grid, prefix):
            return table
        return self.resampled(table, self.grid, grid, prefix)

    def resampled(self, table: Tensor, old: Grid | None, grid: Grid, prefix: int) -> Tensor:
        """A table of the grid `old` (None: one line of tokens) for another; both have the layer's prefix."""
        table = self._resampled_rows(table, old, grid, prefix)
        return self._resampled_rows(table.mT, old, grid, prefix).mT if self.factor_dim is None else table

    def _resampled_rows(self, table: Tensor, old: Grid | None, grid: Grid, prefix: int) -> Tensor:
        """(T, R) -> (prefix + rows * columns, R)."""
        known = min(prefix, len(table) - 1) if old is None else len(table) - math.prod(old)
        kept = min(known, prefix)
        head = F.pad(table[:kept], (0, 0, 0, prefix - kept))  # a prefix token without a row gets bias 0
        body = table[known:].mT.to(torch.promote_types(table.dtype, torch.float32))  # (R, patches)
        if old is not None:
            body = body.unflatten(1, old)[None]
            body = F.interpolate(body, grid, mode="bicubic")[0].flatten(1)
        elif body.shape[1] != grid[0] * grid[1]:
            body = F.interpolate(body[None], grid[0] * grid[1], mode="linear")[0]
        return torch.cat((head, body.mT.to(table.dtype)))
