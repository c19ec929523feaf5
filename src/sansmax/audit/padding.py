"""What a masked token holds changes nothing, and nothing trains on it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import layers
from ._subject import Refused, Subject, distance
from ._verdict import Verdict

ARGUMENTS = [
    "key_padding_mask",
    "padding_mask",
    "mask",
    "attention_mask",
    "attn_mask",
    "key_mask",
    "pad_mask",
]


@dataclass(frozen=True)
class Form:
    """A way to say which tokens count."""

    argument: str
    shape: str
    keep: bool  # what True means
    additive: bool = False

    def words(self, keep: Tensor, like: Tensor) -> dict[str, Tensor]:
        """keep (B, N) as the argument of forward."""
        mask = keep if self.keep else ~keep
        if self.additive:
            mask = torch.zeros_like(keep, dtype=like.dtype).masked_fill(~keep, -math.inf)
        shaped = {"(B, N)": mask, "(B, 1, 1, N)": mask[:, None, None], "(B, 1, N)": mask[:, None]}
        return {self.argument: shaped[self.shape]}

    def told(self) -> str:
        meaning = "0 or -inf" if self.additive else f"True = {'keep' if self.keep else 'drop'}"
        return f"{self.argument} {self.shape}, {meaning}"


def check(subject: Subject) -> Verdict:
    """The mask's form and polarity are found: those under which kept tokens matter, and masked ones least.

    Masked tokens, at the end of each sequence, hold other numbers, 100 times as large; the gradients of kept
    outputs by inputs and parameters; and, where no grid changes with it, each sequence without its padding.
    """
    names = [name for name in ARGUMENTS if name in subject.parameters]
    if not names:
        return Verdict("padding", None, reason="forward takes no mask under a usual name")
    module = subject.module(jitter=0.1)
    n = subject.settings.tokens
    lengths = [n, n - max(2, n // 5), n - max(1, n // 3)]
    keep = torch.arange(n) < torch.tensor(lengths)[:, None]
    x = subject.input()
    padded = torch.where(keep[..., None], x, subject.input(seed=1, scale=100.0))
    others = torch.where(keep[..., None], subject.input(seed=2), x)
    found, refusals = [], []
    for form in _forms(subject, names):
        try:
            first, second, third = (
                subject.value(module, t, **form.words(keep, x))[keep] for t in (x, padded, others)
            )
        except Refused as refused:
            refusals.append(f"{form.told()}: {refused}")
            continue
        # Under the other polarity a kept output may depend on no token at all.
        answers = distance(third, first) > subject.tolerance
        found.append((distance(second, first) if answers else math.inf, form))
    if not found:
        return Verdict("padding", None, reason=f"not checked: no form of a mask is taken; {refusals[-1]}")
    content, form = min(found, key=lambda item: item[0])
    words = form.words(keep, x)
    numbers: dict[str, Any] = {"content": content, "mask": form.told()}
    gradients = [_gradients(subject, module, t, keep, words) for t in (x, padded)]
    numbers["input_gradient"] = max(
        g[0][~keep].abs().nan_to_num(nan=math.inf).max().item() for g in gradients
    )
    numbers["parameter_gradient"] = distance(gradients[1][1], gradients[0][1])
    if not _on_grid(subject):
        numbers["unpadded"] = _against_unpadded(subject, module, padded, lengths, words)
    hole = torch.where(keep[..., None], x, math.nan)
    numbers["nan_spreads"] = not subject.value(module, hole, **words)[keep].isfinite().all().item()
    limits = ("content", "input_gradient", "parameter_gradient", "unpadded")
    broken = [key for key in limits if not numbers.get(key, 0.0) <= subject.tolerance]
    names_of = {
        "content": "what masked tokens hold changes other outputs",
        "input_gradient": "masked tokens get a gradient",
        "parameter_gradient": "what masked tokens hold changes the parameters' gradients",
        "unpadded": "a padded sequence differs from the same without padding",
    }
    reason = "; ".join(names_of[key] for key in broken)
    told = "NaN in a masked token spreads" if numbers["nan_spreads"] else ""
    return Verdict("padding", not broken, numbers, reason or told)


def _forms(subject: Subject, names: list[str]) -> Iterator[Form]:
    polarity = subject.settings.mask
    for name in names:
        for shape in ("(B, N)", "(B, 1, 1, N)", "(B, 1, N)"):
            for keep in (True, False):
                if polarity == "auto" or (polarity == "keep") == keep:
                    yield Form(name, shape, keep)
            if polarity == "auto":
                yield Form(name, shape, True, additive=True)


def _on_grid(subject: Subject) -> bool:
    """Whether fewer tokens are another image."""
    mechanism = subject.settings.mechanism
    if mechanism is not None:
        return layers.mechanism(mechanism).traits.needs == "grid"
    return subject.needs_grid


def _gradients(
    subject: Subject, module: nn.Module, x: Tensor, keep: Tensor, words: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Of a random loss on kept outputs: by the input, and by all parameters in one vector."""
    x = x.clone().requires_grad_()
    parameters = [p for p in module.parameters() if p.requires_grad]
    y = subject(module, x, **words)[keep]
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y)
    by_x, *others = torch.autograd.grad((y * weights).sum(), [x, *parameters], materialize_grads=True)
    return by_x, torch.cat([by_x.new_zeros(1), *(g.flatten() for g in others)])


def _against_unpadded(
    subject: Subject, module: nn.Module, x: Tensor, lengths: list[int], words: dict[str, Tensor]
) -> float:
    y = subject.value(module, x, **words)
    alone = (subject.value(module, x[i : i + 1, :length]) for i, length in enumerate(lengths))
    pairs = zip(y, alone, lengths, strict=True)
    return max(distance(together[None, :length], apart) for together, apart, length in pairs)
