"""Layers that were swapped learn what the old ones did, each on the input that the old one had."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .swap import Report, Swapped

__all__ = ["LayerError", "layer_errors", "recover_layers"]

RIDGE = 1e-9  # of normal equations whose diagonal is 1


@dataclass
class LayerError:
    """Of a swapped layer: sum |new - old|^2 / sum |old - mean of old|^2 over tokens, the mean channel by
    channel. 0 is the old layer, 1 a layer that always says the mean."""

    name: str
    before: float
    after: float


@dataclass
class _Tally:
    """Sums over batches, float64."""

    sums: tuple[Tensor, Tensor, Tensor] | None = None  # of squared errors; channel by channel of y^2 and y
    count: int = 0

    def add(self, made: Tensor, wanted: Tensor) -> None:
        made, wanted = (t.flatten(0, -2).double() for t in (made, wanted))
        parts = (made - wanted).square().sum(), wanted.square().sum(0), wanted.sum(0)
        old = self.sums or (0, 0, 0)
        self.sums = parts[0] + old[0], parts[1] + old[1], parts[2] + old[2]
        self.count += len(wanted)

    def error(self) -> float:
        if self.sums is None:
            raise ValueError("batches: expected images, got none; give some")
        wrong, square, total = self.sums
        spread = (square - total.square() / self.count).sum()
        return (wrong / spread.clamp(min=torch.finfo(torch.float64).tiny)).item()


@dataclass
class _Pair:
    """A new layer and what it is to say."""

    one: Swapped
    args: tuple[Any, ...] = ()
    words: dict[str, Any] = field(default_factory=dict)
    wanted: Any = None

    def said(self) -> Tensor:
        return _tokens(self.one.after(*self.args, **self.words))


def _tokens(output: Any) -> Tensor:
    """Attentions of transformers also return a map."""
    return output[0] if isinstance(output, tuple) else output


def layer_errors(report: Report, batches: Iterable[Tensor]) -> dict[str, float]:
    """How far every swapped layer is from the old one, by name; see LayerError.

    Args:
        report: of sansmax.swap.
        batches: images as the network takes them.
    """
    tallies = {one.name: _Tally() for one in report.swapped}
    with _teacher(report) as (see, pairs), torch.no_grad():
        for images in batches:
            see(images)
            for pair in pairs:
                tallies[pair.one.name].add(pair.said(), pair.wanted)
    return {name: tally.error() for name, tally in tallies.items()}


def recover_layers(
    report: Report,
    batches: Callable[[], Iterable[Tensor]],
    held_out: Callable[[], Iterable[Tensor]],
    *,
    updates: int = 1000,
    lr: float = 1e-3,
) -> list[LayerError]:
    """Lets every swapped layer learn the output of the one that it replaced, on the inputs that this one has
    in the old network. Activations are used as they come and not kept; all layers learn from one pass.

    First `proj` in closed form: with z what stands in front of it and y what the old layer said, the W and b
    that minimise sum |W z + b - y|^2. (SimA's output is some N times smaller than softmax's, which no
    learning rate mends.) Then all parameters of the layer by gradient (AdamW, cosine), on |new - old|^2 over
    the spread of old. What stands around the layers keeps its weights.

    Args:
        report: of sansmax.swap, whose layers are changed in place.
        batches: a call gives images as the network takes them, once through; it is called again until there
            were enough.
        held_out: the same, for the errors that are told.
        updates: of the gradient; 0 for the closed form alone.
        lr: highest learning rate.

    Raises:
        ValueError: there are no images, or numbers are not finite.
    """
    before = layer_errors(report, held_out())
    _solve(report, batches())
    if updates:
        _descend(report, batches, updates, lr)
    after = layer_errors(report, held_out())
    return [LayerError(name, before[name], after[name]) for name in before]


def _solve(report: Report, batches: Iterable[Tensor]) -> None:
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    with _teacher(report) as (see, pairs), torch.no_grad():
        for images in batches:
            see(images)
            for pair in pairs:
                z, y = (t.flatten(0, -2).double() for t in (_in_front_of_proj(pair), pair.wanted))
                if pair.one.after.proj.bias is not None:
                    z = torch.cat([z, z.new_ones(len(z), 1)], 1)
                parts = z.mT @ z, z.mT @ y
                known = sums.get(pair.one.name)
                sums[pair.one.name] = parts if known is None else (known[0] + parts[0], known[1] + parts[1])
    for one in report.swapped:
        gram, cross = sums[one.name]
        # Each channel at its own size: SimA's are of the order of 1 / N^2, the bias's of 1.
        size = gram.diagonal().clamp(min=torch.finfo(torch.float64).tiny).rsqrt()[:, None]
        even = size * gram * size.mT + RIDGE * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        found = size * torch.linalg.solve(even, size * cross)
        if not found.isfinite().all():
            raise ValueError(
                f"batches: expected finite activations around {one.name}, got others; check the network and "
                "the images"
            )
        proj: Any = one.after.proj
        with torch.no_grad():
            if proj.bias is not None:
                proj.bias.copy_(found[-1])
                found = found[:-1]
            proj.weight.copy_(found.mT)


def _descend(report: Report, batches: Callable[[], Iterable[Tensor]], updates: int, lr: float) -> None:
    own = [p for one in report.swapped for p in one.after.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(own, lr, weight_decay=0.0)
    modes = [one.after.training for one in report.swapped]
    for one in report.swapped:
        one.after.train()
    passes = itertools.chain.from_iterable(batches() for _ in itertools.count())
    with _teacher(report) as (see, pairs):
        for number, images in enumerate(itertools.islice(passes, updates)):
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * number / updates)) / 2
            see(images)
            for pair in pairs:
                wanted = pair.wanted.float()
                spread = (wanted - wanted.mean((0, 1))).square().mean()
                loss = (pair.said().float() - wanted).square().mean() / spread.clamp(min=1e-12)
                if not loss.isfinite():
                    raise ValueError(
                        f"lr: expected finite losses, got {loss.item():g} in {pair.one.name} at update "
                        f"{number}; lower it from {lr:g}"
                    )
                loss.backward()
                nn.utils.clip_grad_norm_(pair.one.after.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    for one, mode in zip(report.swapped, modes, strict=True):
        one.after.train(mode)


@contextmanager
def _teacher(report: Report) -> Iterator[tuple[Callable[[Tensor], Any], list[_Pair]]]:
    """A call that shows images to the old network, and what its layers then had and said."""
    model = report.undo()
    modes = [(module, module.training) for module in model.modules()]
    pairs = {one.name: _Pair(one) for one in report.swapped}

    def note(pair: _Pair, args: tuple[Any, ...], words: dict[str, Any], output: Any) -> None:
        pair.args, pair.words, pair.wanted = args, words, _tokens(output)

    hooks = [
        one.before.register_forward_hook(
            lambda _, args, words, output, pair=pairs[one.name]: note(pair, args, words, output),
            with_kwargs=True,
        )
        for one in report.swapped
    ]

    @torch.no_grad()
    def see(images: Tensor) -> None:
        model(images)

    model.eval()
    try:
        yield see, list(pairs.values())
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
        report.redo()


def _in_front_of_proj(pair: _Pair) -> Tensor:
    seen: list[Tensor] = []
    hook = pair.one.after.proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        pair.said()
    finally:
        hook.remove()
    return seen[0]
