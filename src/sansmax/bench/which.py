"""Which mechanism pays in a network on this machine, and from which image size on, in seconds.

A network is not timed whole: its time is that of everything around its blocks and, for each block, that of
one (sansmax.bench.blocks), which is right to some 10 %. So a mechanism counts as faster from PAYS on.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import layers
from ..models import create_model
from .blocks import Pieces, groups
from .measure import free_memory, interleaved, spread

__all__ = [
    "BASELINE",
    "Found",
    "Question",
    "Timing",
    "is_faster",
    "mechanisms",
    "time_size",
    "which",
    "words",
]

BASELINE = "softmax"
PAYS = 1.05
# Of each piece, besides one to measure its memory and one to warm up.
ROUNDS = 3
CALLS = ROUNDS + 2


@dataclass(frozen=True)
class Question:
    """What is asked: a trunk of sansmax.create_model, and how it is run."""

    network: str
    batch: int
    mechanisms: tuple[str, ...]
    train: bool = False
    dtype: str = "float32"
    device: str = "cpu"


# {"ms_per_image": {"median", "low", "high"}, "peak_mb", "batch"} or {"skipped": why}
Found = dict[str, Any]
Before = Mapping[int, Mapping[str, Found]]
Timing = Callable[[Question, int, float, Before], Mapping[str, Found]]


def which(
    question: Question,
    sizes: Sequence[int],
    budget: float,
    *,
    timing: Timing | None = None,
    done: Callable[[int, Mapping[str, Found]], None] | None = None,
) -> dict[int, Mapping[str, Found]]:
    """image size -> mechanism, softmax first -> what it takes, or why it was skipped.

    Args:
        sizes: sides of square images.
        budget: seconds for all of it. A larger image gets a larger share, and what smaller ones left over.
        timing: in place of `time_size`.
        done: called after every size.
    """
    end = time.perf_counter() + budget
    sizes = sorted(set(sizes))
    found: dict[int, Mapping[str, Found]] = {}
    for i, size in enumerate(sizes):
        left = max(0.0, end - time.perf_counter())
        share = size**2 / sum(s**2 for s in sizes[i:])
        found[size] = (timing or time_size)(question, size, left * share, found)
        if done is not None:
            done(size, found[size])
    return found


def time_size(question: Question, size: int, seconds: float, before: Before) -> dict[str, Found]:
    """Every mechanism at one size; softmax first, which tells how many images at a time can be afforded.

    Args:
        before: what smaller sizes took; what would not fit into memory is skipped by it.
    """
    end = time.perf_counter() + seconds
    found: dict[str, Found] = {}
    pieces: dict[str, Pieces] = {}
    batch, counts, options = question.batch, None, {}
    for name in question.mechanisms:
        if too_large := _too_large(name, size, before, free_memory(question.device) / 1e6):
            found[name] = {"skipped": too_large}
            continue
        try:
            network = _build(question, name, size, options)
            if counts is None:
                counts, options = _shallow(network)
        except ValueError as error:
            if name == BASELINE:
                raise
            found[name] = {"skipped": str(error)}
            continue
        if name == BASELINE:
            batch = _affordable(question, network, counts, size, seconds)
        x = torch.randn(batch, 3, size, size).to(question.device, getattr(torch, question.dtype))
        piece = Pieces(network, x, question.train, counts)
        found[name] = _probed(piece, batch, question, end - time.perf_counter())
        if "skipped" not in found[name]:
            pieces[name] = piece
    _sample(pieces, found, batch, max(0.0, end - time.perf_counter()), question)
    return found


def _too_large(name: str, size: int, before: Before, free_mb: float) -> str:
    """Why not, from the largest size before: memory grows with the tokens, or with the pairs of them."""
    measured = [s for s, row in before.items() if "peak_mb" in row.get(name, {})]
    if not measured:
        return ""
    # F.scaled_dot_product_attention keeps no map.
    pairs = name != BASELINE and layers.mechanism(name).traits.cost.startswith("N^2")
    growth = (size / max(measured)) ** (4 if pairs else 2)
    expected = before[max(measured)][name]["peak_mb"] * growth
    if expected <= free_mb:
        return ""
    return f"it may need {expected / 1e3:.1f} GB and {free_mb / 1e3:.1f} GB are free"


def _build(question: Question, mechanism: str, size: int, options: Mapping[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    network = create_model(question.network, mechanism, img_size=size, **options)
    return network.to(question.device, getattr(torch, question.dtype))


def _shallow(network: nn.Module) -> tuple[list[int], dict[str, int]]:
    """How many blocks each group has, and the words that build two of them where that is enough."""
    found = groups(network)
    depths = {group.container: group.count for group in found}
    shallow = depths.get("blocks") == len(getattr(network, "blocks", ())) > 2
    return [group.count for group in found], {"depth": 2} if shallow else {}


def _affordable(
    question: Question, network: nn.Module, counts: Sequence[int], size: int, seconds: float
) -> int:
    """How many images all mechanisms can be timed with in so many seconds, softmax being typical."""
    batch = question.batch
    if batch == 1:
        return 1
    x = torch.randn(1, 3, size, size).to(question.device, getattr(torch, question.dtype))
    piece = Pieces(network, x, question.train, counts)
    samples = interleaved(piece.calls(), seconds=0, rounds=1, warmup=1, device=question.device)
    took = sum(map(sum, samples.values())) * CALLS * len(question.mechanisms)
    return max(1, min(batch, int(seconds / took)))


def _probed(piece: Pieces, batch: int, question: Question, left: float) -> Found:
    """The peak memory, measured in a first call of everything; skipped where the others would not fit."""
    if left <= 0:
        return {"skipped": "the time is used up; a larger --budget has more"}
    try:
        for call in piece.calls().values():
            call()  # fills caches
        start = time.perf_counter()
        memory = piece.memory(question.device)
        took = time.perf_counter() - start
    except torch.OutOfMemoryError:
        return {"skipped": "it does not fit into memory"}
    if (ROUNDS + 1) * took > left:
        return {"skipped": f"its samples would take {(ROUNDS + 1) * took:.0f} s and {left:.0f} s are left"}
    return {"peak_mb": memory / 1e6 * question.batch / batch, "batch": batch}


def _sample(
    pieces: Mapping[str, Pieces], found: dict[str, Found], batch: int, seconds: float, question: Question
) -> None:
    calls = {(name, key): call for name, p in pieces.items() for key, call in p.calls().items()}
    if not calls:
        return
    flat = {f"{name} {key}": call for (name, key), call in calls.items()}
    samples = interleaved(flat, seconds=min(seconds, 10.0), rounds=ROUNDS, warmup=1, device=question.device)
    took = {
        name: piece.seconds({key: samples[f"{name} {key}"] for key in piece.calls()})
        for name, piece in pieces.items()
    }
    for name, seconds_each in took.items():
        found[name]["ms_per_image"] = spread(seconds_each, 1e3 / batch)
        if BASELINE in took:
            ratios = [a / b for a, b in zip(took[BASELINE], seconds_each, strict=True)]
            found[name]["faster"] = spread(ratios)


def mechanisms(chosen: Sequence[str]) -> tuple[str, ...]:
    """Known names, softmax before them; all by default."""
    from .._find import names, pick

    known = names(layers.__name__)
    return tuple(dict.fromkeys([BASELINE, *(pick("mechanisms", n, known) for n in chosen or known)]))


def words(found: Mapping[int, Mapping[str, Found]]) -> list[str]:
    """Where each mechanism begins to pay, a line each, and up to where to stay with softmax."""
    lines = []
    names = dict.fromkeys(name for row in found.values() for name in row if name != BASELINE)
    for name in names:
        pays = {size: is_faster(row[name]) for size, row in found.items() if _told(row, name)}
        lines.append(f"{name}: {_begins(pays)}")
    told = {size: row for size, row in found.items() if any(_told(row, name) for name in names)}
    none = [
        size
        for size, row in told.items()
        if not any(_told(row, name) and is_faster(row[name]) for name in names)
    ]
    if not told:
        lines.append("nothing could be compared with softmax: give a larger --budget or smaller images")
    elif none:
        largest = ", the largest measured" if max(none) == max(told) else ""
        lines.append(f"stay with softmax up to {max(none)} px{largest}")
    else:
        lines.append(f"softmax is the fastest nowhere from {min(told)} to {max(told)} px")
    return lines


def is_faster(row: Found) -> bool:
    """Than softmax, by more than the method's error and in three rounds of four."""
    return row["faster"]["median"] >= PAYS and row["faster"]["low"] > 1


def _told(row: Mapping[str, Found], name: str) -> bool:
    return "faster" in row.get(name, {})


def _begins(pays: Mapping[int, bool]) -> str:
    """Of image size -> whether it is faster than softmax, by growing size."""
    sizes = list(pays)
    if not sizes:
        return "not compared"
    slower = [size for size in sizes if not pays[size]]
    faster = [size for size in sizes if pays[size]]
    if not faster:
        return f"does not pay up to {sizes[-1]} px"
    if not slower:
        return f"from {sizes[0]} px" + (", the smallest measured" if len(sizes) > 1 else "")
    if max(slower) < min(faster):
        return f"from {min(faster)} px (begins between {max(slower)} and {min(faster)} px)"
    return f"at {', '.join(map(str, faster))} px, not at {', '.join(map(str, slower))} px"
