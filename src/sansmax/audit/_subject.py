"""The module under audit: how it is built, fed and called."""

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ._load import sentence

__all__ = ["Layout", "Refused", "Settings", "Subject", "distance"]

Layout = Literal["auto", "bnc", "nbc", "bchw", "bhnd"]

WIDTHS = [
    "dim",
    "embed_dim",
    "d_model",
    "in_channels",
    "channels",
    "hidden_size",
    "hidden_dim",
    "dim_in",
    "in_dim",
    "in_features",
    "model_dim",
    "embed_dims",
    "in_planes",
    "inplanes",
    "width",
    "n_embd",
    "dim_model",
    "c",
]
HEADS = ["num_heads", "heads", "n_heads", "nhead", "n_head", "num_attention_heads", "h"]
SAME = {"key", "value", "keys", "values", "k", "v", "context", "kv", "memory"}
ROWS, COLUMNS = {"h", "height", "rows"}, {"w", "width", "columns"}
GRIDS = {"grid", "hw", "hw_shape", "size", "resolution", "x_size", "input_resolution", "spatial_shape"}
CAUSAL = ("is_causal", "causal")


class Refused(Exception):
    """The module raised, or gave no output of the input's batch and tokens."""


@dataclass(frozen=True)
class Settings:
    """What is known about the module beforehand; see sansmax.audit for each."""

    tokens: int = 49
    dim: int | None = None
    layout: Layout = "auto"
    mechanism: str | None = None
    reference: Mapping[str, Any] = field(default_factory=dict)
    causal: bool = False
    mask: Literal["auto", "keep", "drop"] = "auto"
    positional: bool = False
    call: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0


class Subject:
    """Builds copies of one module and calls them with tokens (B, N, W), whatever layout they take.

    W is the module's width; with layout bhnd and separate q, k, v it is the three side by side.

    Raises:
        ValueError: forward needs more than tokens, or does not take the first input.
    """

    def __init__(self, make: Callable[[], nn.Module], words: Mapping[str, Any], settings: Settings) -> None:
        self._make, self.settings = make, settings
        module = self._made()
        self.kind = type(module).__name__
        # A constructor's word counts before the attribute of that name, which may mean something else.
        self.words = {**_defaults(type(module)), **vars(module), **words}
        self.layout = settings.layout
        if self.layout == "auto":
            self.layout = "nbc" if getattr(module, "batch_first", True) is False else "bnc"
        self.heads = self._number(HEADS) or 1
        dim = settings.dim or self._number(WIDTHS)
        if not dim:
            raise ValueError(
                f"dim: expected the input's width under a usual name ({', '.join(WIDTHS[:4])}), got "
                f"{dict(words)}; give --dim"
            )
        self.dim = dim
        if self.layout == "bhnd" and self.dim % self.heads:
            raise ValueError(f"dim: expected a multiple of {self.heads} heads, got {self.dim}; give --dim")
        self.parameters = _forward_parameters(module)
        self.separate = False
        self._plan()
        self.width = self.dim * (3 if self.separate else 1)
        self.dtype = torch.float64
        try:
            self.value(self.module(), self.input())
        except Refused:
            self.dtype = torch.float32
            self._first_call()

    @property
    def tolerance(self) -> float:
        """Of a difference that rounding explains."""
        return 1e-9 if self.dtype == torch.float64 else 1e-4

    @property
    def claims_causal(self) -> bool:
        """Whether it is causal by itself, without being asked at each call."""
        return self.settings.causal or any(self.words.get(name) is True for name in CAUSAL)

    def module(
        self,
        dtype: torch.dtype | None = None,
        *,
        train: bool = False,
        biases: bool = True,
        jitter: float = 0.0,
    ) -> nn.Module:
        """A copy, always the same one.

        Args:
            biases: False sets the biases of linear layers to 0, behind which a small output would hide.
            jitter: the standard deviation of what is added to each parameter, so that what starts at zero
                takes part.
        """
        module = self._made().to(dtype or self.dtype).train(train)
        generator = torch.Generator().manual_seed(self.settings.seed + 1)
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.data += jitter * noise
            if not biases and parameter.ndim == 1 and name.endswith("bias"):
                parameter.data.zero_()
        return module

    def input(
        self, batch: int = 3, tokens: int | None = None, *, seed: int = 0, scale: float = 1.0
    ) -> Tensor:
        """Normal tokens (B, N, W) in the exact dtype."""
        generator = torch.Generator().manual_seed(self.settings.seed + 100 + seed)
        shape = batch, tokens or self.settings.tokens, self.width
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)

    def __call__(self, module: nn.Module, x: Tensor, **extra: Any) -> Tensor:
        """(B, N, W) -> (B, N, C); what the module raises becomes Refused."""
        return self.run(module, self.arranged(x), **extra)

    def value(self, module: nn.Module, x: Tensor, **extra: Any) -> Tensor:
        """The same without gradients."""
        with torch.no_grad():
            return self(module, x, **extra)

    def arranged(self, x: Tensor) -> list[Tensor]:
        """(B, N, W) as the tensors that forward takes, contiguous."""
        if self.layout == "bhnd":
            parts = x.chunk(3, -1) if self.separate else (x,)
            return [p.unflatten(-1, (self.heads, -1)).transpose(1, 2).contiguous() for p in parts]
        if self.layout == "nbc":
            x = x.transpose(0, 1)
        elif self.layout == "bchw":
            x = x.transpose(1, 2).unflatten(2, grid_of(x.shape[1]))
        return [x.contiguous()]

    def run(self, module: nn.Module, tensors: list[Tensor], **extra: Any) -> Tensor:
        """The module's first output as (B, N, C)."""
        first = tensors[0]
        batch, tokens = self._sizes(first)
        arguments = list(tensors)
        if not self.separate:
            arguments += [first] * self._repeats
        try:
            y = module(*arguments, **self.named(tokens), **self.settings.call, **extra)
        except Exception as error:  # it is somebody else's code
            raise Refused(sentence(error)) from error
        while isinstance(y, tuple | list | dict) and y:
            y = next(iter(y.values())) if isinstance(y, dict) else y[0]
        if not isinstance(y, Tensor):
            raise Refused(f"the output is a {type(y).__name__}, no tensor")
        if self.layout == "nbc" and y.ndim == 3:
            y = y.transpose(0, 1)
        elif self.layout == "bchw" and y.ndim == 4:
            y = y.flatten(2).transpose(1, 2)
        elif self.layout == "bhnd" and y.ndim == 4:
            y = y.transpose(1, 2).flatten(2)
        if y.ndim != 3 or tuple(y.shape[:2]) != (batch, tokens):
            raise Refused(f"the output has shape {tuple(y.shape)} for {batch} sequences of {tokens} tokens")
        return y

    def named(self, tokens: int) -> dict[str, Any]:
        """What else forward is told of so many tokens: their grid."""
        if not (self._rows or self._columns or self._grids):
            return {}  # the number is a symbol while a graph is made
        rows, columns = grid_of(tokens)
        found: dict[str, Any] = dict.fromkeys(self._rows, rows) | dict.fromkeys(self._columns, columns)
        return found | dict.fromkeys(self._grids, (rows, columns))

    @property
    def needs_grid(self) -> bool:
        """Whether its tokens lie on a grid that changes with their number."""
        return self.layout == "bchw" or bool(self._rows or self._grids)

    def _sizes(self, first: Tensor) -> tuple[int, int]:
        """Sequences and tokens of an input in the module's layout."""
        shape = first.shape
        if self.layout == "bchw":
            return shape[0], math.prod(shape[2:])
        if self.layout == "bhnd":
            return shape[0], shape[2]
        return (shape[1], shape[0]) if self.layout == "nbc" else (shape[0], shape[1])

    def refusal(self, tokens: int) -> str:
        """Why it does not take so many tokens; "" if it does."""
        try:
            self.value(self.module(), self.input(2, tokens))
        except Refused as refused:
            return str(refused)
        return ""

    def _made(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            return self._make()

    def _number(self, names: Sequence[str]) -> int | None:
        """A whole number under the first of `names`."""
        for name in names:
            value = self.words.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        return None

    def _plan(self) -> None:
        """Which of forward's parameters get the tokens again, and which the grid."""
        self._rows: list[str] = []
        self._columns: list[str] = []
        self._grids: list[str] = []
        self._repeats = 0
        unknown = []
        for at, (name, parameter) in enumerate(self.parameters.items()):
            required = parameter.default is inspect.Parameter.empty and parameter.kind in (
                inspect.Parameter.POSITIONAL_ONLY,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                inspect.Parameter.KEYWORD_ONLY,
            )
            if at == 0 or name in self.settings.call:
                continue
            if name == "grid" or (required and name.lower() in GRIDS):
                self._grids.append(name)
            elif required and name.lower() in SAME:
                self._repeats += 1
            elif required and name.lower() in ROWS:
                self._rows.append(name)
            elif required and name.lower() in COLUMNS:
                self._columns.append(name)
            elif required:
                unknown.append(name)
        if unknown:
            raise ValueError(
                f"forward: expected a module that is called with tokens, got {self.kind}.forward, which also "
                f"needs {', '.join(unknown)}; give them as JSON with --call"
            )
        self.separate = self.layout == "bhnd" and self._repeats == 2

    def _first_call(self) -> None:
        x = self.input()
        try:
            self.value(self.module(), x)
        except Refused as refused:
            shapes = " and ".join(str(tuple(t.shape)) for t in self.arranged(x)[:1])
            raise ValueError(
                f"forward: expected {self.kind} to take {shapes} (layout {self.layout}), got {refused}; give "
                f"--tokens, --dim, --layout or --call"
            ) from None


def grid_of(tokens: int) -> tuple[int, int]:
    """(rows, columns) of so many tokens, as square as their divisors allow."""
    rows = next(r for r in range(math.isqrt(tokens), 0, -1) if tokens % r == 0)
    return rows, tokens // rows


def distance(got: Tensor, want: Tensor) -> float:
    """The largest difference relative to the largest entry of `want`; inf where either is not finite."""
    if not (got.isfinite().all() and want.isfinite().all()):
        return math.inf
    scale = want.abs().max().item() or 1.0
    return (got.double() - want.double()).abs().max().item() / scale


def copied(module: nn.Module) -> Callable[[], nn.Module]:
    """Makes copies of a module."""
    return lambda: copy.deepcopy(module)


def _defaults(kind: type[nn.Module]) -> dict[str, Any]:
    """What its constructor and its bases' take without being told."""
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters.values()
            found |= {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return found


def _forward_parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(module.forward).parameters)
