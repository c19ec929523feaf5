"""What is exported: a module whose inputs and outputs are named tensors, and how to make examples of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import Mixer
from ..models import Decoder
from ..models._decoder import DecoderState

__all__ = ["Size", "Subject", "images", "point_clouds", "stream"]

Size = tuple[int, ...]


@dataclass(frozen=True)
class Subject:
    """Positional tensors in, tensors out, the batch in front.

    Attributes:
        axes: of each input, the axes besides the batch that may turn out free, and their names.
        unbatched: inputs without a batch.
        example: (batch, size) -> inputs, the same for the same numbers.
        size: of the example that is traced, in the order of the names of `axes`.
        others: further sizes to be tried, the first that the network takes.
        start: the first state of a stream, of one sample.
        facts: what the card says of it besides.
    """

    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    example: Callable[[int, Size], tuple[Tensor, ...]]
    size: Size = ()
    axes: dict[str, dict[int, str]] = field(default_factory=dict)
    others: tuple[Size, ...] = ()
    unbatched: tuple[str, ...] = ()
    start: tuple[Tensor, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


def images(model: nn.Module, channels: int, size: tuple[int, int]) -> Subject:
    """(B, channels, height, width), normalised -> logits."""

    def example(batch: int, size: Size) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(batch)
        return (torch.randn(batch, channels, *size, generator=generator),)

    height, width = size
    others = tuple((height + step, width + 2 * step) for step in (32, 16, 8, 4, 2, 1))
    return Subject(
        model, ("image",), ("logits",), example, size, {"image": {2: "height", 3: "width"}}, others
    )


def point_clouds(model: nn.Module, channels: int, points: int, categories: int = 0) -> Subject:
    """(B, points, channels), and with `categories` (B,) int64 what each cloud is -> logits."""

    def example(batch: int, size: Size) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(batch)
        cloud = torch.nn.functional.normalize(
            torch.randn(batch, size[0], channels, generator=generator), dim=2
        )
        return (cloud, torch.arange(batch) % categories) if categories else (cloud,)

    inputs = ("points", "label") if categories else ("points",)
    axes = {"points": {1: "points"}}
    return Subject(_Clouds(model), inputs, ("logits",), example, (points,), axes, ((points + 37,),))


class _Clouds(nn.Module):
    """Arguments by position."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, points: Tensor, label: Tensor | None = None) -> Tensor:
        return self.model(points) if label is None else self.model(points, label=label)


def stream(decoder: Decoder) -> Subject:
    """One step: token (B,) int64, position (1,) int64 and the layers' states -> logits (B, V) of the next
    token, and position and states as they are then.

    A state whose size depends on the number of tokens has that as an axis "past", from 0.
    """
    module = _Step(decoder)
    before, after = (module.flat(module.states(decoder, 1, count)) for count in (3, 4))
    axes = {}
    for name, old, new in zip(module.names, before, after, strict=True):
        if grown := [i for i, (a, b) in enumerate(zip(old.shape, new.shape, strict=True)) if a != b]:
            axes[f"state_{name}"] = {grown[0]: "past"}

    def example(batch: int, size: Size) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(batch)
        count = size[0] if size else 3
        tokens = torch.randint(decoder.num_tokens, (batch,), generator=generator)
        return tokens, torch.tensor([count]), *module.flat(module.states(decoder, batch, count))

    return Subject(
        module,
        ("token", "state_position", *(f"state_{name}" for name in module.names)),
        ("logits", "next_position", *(f"next_{name}" for name in module.names)),
        example,
        (3,) if axes else (),
        axes,
        unbatched=(
            "state_position",
            *(f"state_{n}" for n, x in zip(module.names, before, strict=True) if not x.ndim),
        ),
        start=(torch.zeros(1, dtype=torch.int64), *module.flat(module.states(decoder, 1, 0))),
        facts={"tokens": decoder.num_tokens, "longest": decoder.limit},
    )


class _Step(nn.Module):
    """Decoder.step with every tensor of its state by itself."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder
        self.like = self.states(decoder, 1, 0)
        self.names = [f"{i}_{name}" for i, state in enumerate(self.like) for name, _ in _leaves(state)]

    @staticmethod
    def states(decoder: Decoder, batch: int, count: int) -> tuple[Any, ...]:
        """The layers' behind `count` tokens."""
        mixers: list[Mixer] = decoder.mixers()
        state = DecoderState(tuple(mixer.fixed_state(batch) for mixer in mixers), 0)
        for token in torch.randint(
            decoder.num_tokens, (count, batch), generator=torch.Generator().manual_seed(5)
        ):
            with torch.no_grad():
                _, state = decoder.step(token, state)
        return state.layers

    @staticmethod
    def flat(states: tuple[Any, ...]) -> tuple[Tensor, ...]:
        return tuple(leaf for state in states for _, leaf in _leaves(state))

    def forward(self, token: Tensor, position: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
        leaves = iter(flat)
        states = tuple(_filled(state, leaves) for state in self.like)
        logits, states = self.decoder.advance(token, position, states)
        return logits, position + 1, *self.flat(states)


def _leaves(state: Any, name: str = "") -> list[tuple[str, Tensor]]:
    """Of nested named tuples, with the names of their fields; a number is a tensor without axes."""
    if isinstance(state, int | Tensor):
        return [(name, torch.as_tensor(state))]
    fields = state._asdict().items()
    return [leaf for key, part in fields for leaf in _leaves(part, f"{name}_{key}" if name else key)]


def _filled(like: Any, leaves: Any) -> Any:
    """A state built like `like` of the next of `leaves`."""
    if isinstance(like, int | Tensor):
        return next(leaves)
    return type(like)(*(_filled(part, leaves) for part in like))
