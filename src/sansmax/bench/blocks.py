"""What a whole network takes, from one of its blocks and what lies around them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers import Mixer
from .measure import peak_memory

__all__ = ["Group", "Pieces", "groups", "step"]


@dataclass(frozen=True)
class Group:
    """`count` blocks with an attention in one container, alike and behind each other from `start` on."""

    container: str
    start: int
    count: int


def groups(network: nn.Module) -> list[Group]:
    """All of a network. A block alone is none: it stays where it is."""
    found = []
    for name, container in network.named_modules():
        if not isinstance(container, nn.ModuleList | nn.Sequential):
            continue
        kinds = [_kind(block) for block in container]
        start = 0
        while start < len(kinds):
            end = start
            while end < len(kinds) and kinds[end] == kinds[start]:
                end += 1
            if end - start > 1 and _mixes(container[start]):
                found.append(Group(name, start, end - start))
            start = end
    return found


def _mixes(block: nn.Module) -> bool:
    # The second is timm's own attention.
    return any(isinstance(module, Mixer) for module in block.modules()) or hasattr(block, "attn")


def _kind(block: nn.Module) -> tuple[object, ...]:
    return type(block), *((name, p.shape) for name, p in block.named_parameters())


@contextmanager
def kept(network: nn.Module, counts: Mapping[Group, int]) -> Iterator[None]:
    """Meanwhile the network has only so many blocks of each group; they map a shape to itself."""
    whole = {}
    for group, count in counts.items():
        container = network.get_submodule(group.container)
        modules = list(whole.setdefault(container, container._modules).values())
        dropped = set(range(group.start + count, group.start + group.count))
        container._modules = {
            str(i): modules[at] for i, at in enumerate(i for i in range(len(modules)) if i not in dropped)
        }
    try:
        yield
    finally:
        for container, modules in whole.items():
            container._modules = modules


def step(network: nn.Module, x: Tensor, train: bool) -> Callable[[], object]:
    """One call of the network: in evaluation, or in training with the gradients of all parameters."""
    network.train(train)
    if not train:
        return torch.inference_mode()(lambda: network(x))

    def forward_and_backward() -> None:
        network(x).square().mean().backward()
        network.zero_grad()  # behind, so that the peak memory of a call holds its own gradients alone

    return forward_and_backward


class Pieces:
    """A network as it is without its groups ("none"), and with one block of each of them.

    Time: none + sum over groups of count x (one - none). Memory in evaluation is that of the largest piece;
    in training each block more keeps what a second block keeps: two - one.

    Args:
        counts: how many blocks of each group the network stands for, where it was built with fewer.
    """

    def __init__(self, network: nn.Module, x: Tensor, train: bool, counts: Sequence[int] | None = None):
        self.groups = groups(network)
        self.counts = [g.count for g in self.groups] if counts is None else list(counts)
        self.network, self.train = network, train
        self.whole = step(network, x, train)

    def call(self, group: int | None = None, blocks: int = 1) -> Callable[[], object]:
        """A call with `blocks` blocks of one group and none of the others."""
        counts = {g: blocks if i == group else 0 for i, g in enumerate(self.groups)}

        def run() -> None:
            with kept(self.network, counts):
                self.whole()

        return run

    def calls(self) -> dict[str, Callable[[], object]]:
        """What must be timed: "none", and "0", "1" and so on for the groups."""
        return {"none": self.call(), **{str(i): self.call(i) for i in range(len(self.groups))}}

    def seconds(self, samples: Mapping[str, Sequence[float]]) -> list[float]:
        """Of the whole network, for each round of samples of `calls`."""
        rounds = range(len(samples["none"]))
        return [
            samples["none"][r]
            + sum(n * max(0.0, samples[str(i)][r] - samples["none"][r]) for i, n in enumerate(self.counts))
            for r in rounds
        ]

    def memory(self, device: str) -> int:
        """Peak bytes of the whole network, beyond weights and images."""
        none = peak_memory(self.call(), device)
        one = [peak_memory(self.call(i), device) for i in range(len(self.groups))]
        if not self.train:
            return max([none, *one])
        two = [peak_memory(self.call(i, 2), device) for i in range(len(self.groups))]
        held = [max(0, b - a) for a, b in zip(one, two, strict=True)]
        working = [max(0, a - none - b) for a, b in zip(one, held, strict=True)]
        return none + sum(n * b for n, b in zip(self.counts, held, strict=True)) + max(working, default=0)
