"""A run that learns the next byte."""

from dataclasses import dataclass, field
from typing import ClassVar, Self

from .._run import Run, at_least, shares

__all__ = ["Recipe", "TextData"]


@dataclass(frozen=True)
class TextData:
    """Which bytes are learned, and which are held out."""

    root: str = "stdlib"
    """A file of any kind (.gz, .xz, .bz2 and .zip are unpacked), or a folder with train.*, valid.* and
    test.*; stdlib: the sources of Python's standard library, which every machine has."""
    val_split: str = "val"
    """What is held out: val or test."""
    splits: tuple[int, ...] = ()
    """Bytes of train, val and test in a single file, in this order; empty: 90, 5 and 5 million of enwik8's
    10^8, and the same shares of another file."""
    train_bytes: int | None = None
    """Learn from the first so many; None: all."""
    val_bytes: int | None = None
    """Hold out the first so many; None: all."""
    sequences: int | None = None
    """Sequences of an epoch, drawn anew in each; None: every byte once."""


@dataclass(frozen=True)
class Recipe(Run):
    """A causal network that learns the next byte of a text, or of any other file."""

    task: ClassVar[str] = "chars"
    evaluated: ClassVar[tuple[str, ...]] = ("data", "stride", "batch_size", "device", "precision")

    model: str = "decoder"
    mechanism: str | None = "aft_local"
    """Of the mechanisms with a causal form."""
    tokens: int = 1024
    """Bytes of a sequence."""
    stride: int | None = None
    """Held-out bytes are scored in windows of `tokens`, each so much further on than the last: every byte
    but the first of the split has then at least tokens - stride bytes before it. None: tokens, so that no
    byte is read twice."""
    dropout: float = 0.1
    data: TextData = field(default_factory=TextData)

    def checked(self) -> Self:
        at_least(1, {f"data.{k}": getattr(self.data, k) for k in ("train_bytes", "val_bytes", "sequences")})
        at_least(2, tokens=self.tokens)
        shares({"dropout": self.dropout})
        if self.stride is not None and not 1 <= self.stride <= self.tokens:
            raise ValueError(
                f"stride: expected 1 to {self.tokens}, the tokens of a window, got {self.stride}; lower it"
            )
        if self.model != "decoder":
            raise ValueError(f"model: expected decoder, got {self.model!r}; leave it out")
        return super().checked()
