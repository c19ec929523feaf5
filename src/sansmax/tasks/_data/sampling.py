"""Drawing tokens from a causal network one after the other."""

import json
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ...models import Decoder

__all__ = ["Sampler", "Stream"]


@dataclass(frozen=True)
class Sampler:
    """How a token is drawn from logits.

    Args:
        temperature: divides the logits; 0 takes the largest.
        top_k: only the so many largest; None: all.
        top_p: only the largest that together have this probability, at least one.

    Raises:
        ValueError: a number is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: expected a number of at least 0, got {self.temperature:g}; use 1")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: expected at least 1, got {self.top_k}; leave it out")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a share above 0 and up to 1, got {self.top_p:g}; leave it out")

    def __call__(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """logits (B, V) -> tokens (B,) int64, on the CPU."""
        logits = logits.double().cpu()
        if self.temperature == 0:
            return logits.argmax(1)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[1]:
            least = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        shares = logits.softmax(1)
        if self.top_p < 1:
            falling, index = shares.sort(1, descending=True)
            # What stands before a token reaches top_p already: the token is left out.
            shares = shares.scatter(
                1, index, falling.masked_fill(falling.cumsum(1) - falling >= self.top_p, 0)
            )
        return torch.multinomial(shares, 1, generator=generator)[:, 0]


class Stream:
    """One sequence that grows token by token.

    Where the network's sequences are limited, it begins anew from the last half of its limit whenever that
    is reached. Equal seeds give equal tokens, also behind `save` and `load`.
    """

    def __init__(self, network: Decoder, device: torch.device, seed: int = 0) -> None:
        self.network, self.device = network, device
        self.generator = torch.Generator().manual_seed(seed)
        self.state = network.init_state()
        self.logits: Tensor | None = None
        self.recent: deque[int] = deque(maxlen=(network.limit or 0) // 2)

    @torch.inference_mode()
    def feed(self, tokens: bytes) -> None:
        """Tokens that are given.

        Raises:
            ValueError: they are none, or more than the network's positions.
        """
        limit = self.network.limit
        if limit is not None and len(tokens) > limit:
            raise ValueError(
                f"prompt: expected at most {limit} bytes, for which positions are learned, got "
                f"{len(tokens)}; shorten it, or train with more tokens"
            )
        if not tokens:
            raise ValueError("prompt: expected at least one byte, got none; give a newline")
        for token in tokens:
            self._push(token)

    @torch.inference_mode()
    def next(self, sampler: Sampler) -> int:
        """Draws a token, which then belongs to the sequence."""
        if self.logits is None:
            raise ValueError("prompt: expected at least one byte, got none; feed one first")
        token = int(sampler(self.logits, self.generator))
        self._push(token)
        return token

    def _push(self, token: int) -> None:
        if self.network.limit is not None and self.state.tokens >= self.network.limit:
            self.state = self.network.init_state()
            for past in self.recent:
                self._step(past)
        self._step(token)
        self.recent.append(token)

    def _step(self, token: int) -> None:
        given = torch.tensor([token], device=self.device)
        self.logits, self.state = self.network.step(given, self.state)

    def save(self, path: Path) -> None:
        """Everything that the tokens to come depend on, into a .safetensors file.

        Raises:
            ValueError: the name ends otherwise, or nothing was fed.
        """
        if path.suffix != ".safetensors":
            raise ValueError(f"save_state: expected a file that ends in .safetensors, got {path}; rename it")
        if self.logits is None:
            raise ValueError("save_state: expected a sequence, got none; feed a prompt first")
        tensors = {
            f"state.{i}": torch.as_tensor(leaf).contiguous() for i, leaf in enumerate(_leaves(self.state))
        }
        tensors |= {"logits": self.logits.contiguous(), "generator": self.generator.get_state()}
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(
            {name: t.detach().cpu().clone() for name, t in tensors.items()},
            path,
            {"recent": json.dumps(list(self.recent))},
        )

    def load(self, path: Path) -> None:
        """What `save` wrote, of a network of the same layout.

        Raises:
            ValueError, OSError: it cannot be read or belongs to another network.
        """
        if not path.is_file():
            raise FileNotFoundError(
                f"state: expected a file of --save-state at {path}, got nothing; check the path"
            )
        try:
            with safetensors.safe_open(path, "pt") as content:
                tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
                recent = json.loads((content.metadata() or {})["recent"])
            own = list(_leaves(self.state))
            leaves = [tensors[f"state.{i}"] for i in range(len(own))]
            odd = len(tensors) != len(own) + 2 or any(
                torch.as_tensor(a).ndim != b.ndim or (b.ndim and a.shape[-1] != b.shape[-1])
                for a, b in zip(own, leaves, strict=True)
            )
            if odd:
                raise KeyError("other shapes")
            given = iter(leaves)
            self.state = _filled(self.state, given, self.device)
            self.logits = tensors["logits"].to(self.device)
            self.generator.set_state(tensors["generator"])
        except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"state: expected what --save-state wrote with this network, got {path} "
                f"({' '.join(str(error).split())}); give another"
            ) from None
        self.recent = deque(recent, maxlen=self.recent.maxlen)


def _leaves(state: Any) -> Any:
    """Tensors and numbers of nested tuples, in order."""
    if isinstance(state, tuple):
        for part in state:
            yield from _leaves(part)
    else:
        yield state


def _filled(state: Any, leaves: Any, device: torch.device) -> Any:
    """The nested tuples with other leaves."""
    if isinstance(state, tuple):
        parts = [_filled(part, leaves, device) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    leaf = next(leaves)
    return leaf.item() if isinstance(state, int) else leaf.to(device)
