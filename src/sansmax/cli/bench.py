"""Time, memory and share of the machine's ceilings of operators, layers and networks, checked first."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..bench.speed import Settings

Names = Annotated[tuple[str, ...], tyro.conf.Positional]
Flat = Annotated[Settings, tyro.conf.OmitArgPrefixes]
BOTH, FORWARD = Settings(), Settings(passes=("forward",))


def run(arguments: Sequence[str]) -> int:
    """Measures operators, layers or networks beside others, interleaved, and shows the figures.

    Every list is a sweep. Before it is timed every result is compared with float64: a wrong one gets no
    speed, and the exit code is 1.
    """
    commands = {"ops": ops, "layers": layers, "networks": networks, "changes": changes}
    return tyro.extras.subcommand_cli_from_dict(
        commands,
        args=arguments,
        prog="sansmax bench",
        description=run.__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def ops(
    names: Names = (),
    /,
    tokens: tuple[int, ...] = (196, 1024, 4096),
    batch: tuple[int, ...] = (1,),
    heads: tuple[int, ...] = (6,),
    dim: tuple[int, ...] = (64,),
    backend: tuple[Literal["auto", "fused", "triton", "reference"], ...] = ("auto",),
    causal: bool = False,
    settings: Flat = BOTH,
) -> int:
    """Operators against their published form and against F.scaled_dot_product_attention.

    Args:
        names: operators (default: all).
        tokens: keys and queries.
        batch: sequences.
        heads: AFT and External Attention see heads x dim channels.
        dim: width of a head.
        backend: which body of the operator.
        causal: every token sees itself and earlier ones alone; AFT-conv is then over a sequence.
    """
    from ..bench.measure import find_device
    from ..bench.ops import KERNEL, LANDMARKS, MEMORY, WINDOW, operator_cases
    from ..bench.speed import speed

    _check(tokens=tokens, batch=batch, heads=heads, dim=dim)
    if "train" in settings.passes:
        raise ValueError(
            "passes: an operator has no parameters to train, got train; use forward+backward, or bench layers"
        )
    device = find_device(settings.device)
    sizes = {"tokens": tokens, "batch": batch, "heads": heads, "dim": dim, "backend": backend}
    cases = operator_cases(names, **sizes, dtype=settings.dtype, device=device, causal=causal)
    sizes = {"landmarks": LANDMARKS, "memory": MEMORY, "window": WINDOW, "kernel": KERNEL, "causal": causal}
    return speed(cases, settings, device, kind="ops", **sizes)


def layers(
    names: Names = (),
    /,
    tokens: tuple[int, ...] = (196, 1024, 4096),
    batch: tuple[int, ...] = (1,),
    heads: tuple[int, ...] = (6,),
    dim: tuple[int, ...] = (384,),
    settings: Flat = BOTH,
) -> int:
    """Layers, their projections included, against timm's softmax attention of the same width.

    Args:
        names: layers (default: all).
        tokens: of a sequence, laid out as the most nearly square grid.
        batch: sequences.
        heads: of the layer.
        dim: width of all heads together.
    """
    from ..bench.layers import layer_cases
    from ..bench.measure import find_device
    from ..bench.speed import speed

    _check(tokens=tokens, batch=batch, heads=heads, dim=dim)
    device = find_device(settings.device)
    sizes = {"tokens": tokens, "batch": batch, "heads": heads, "dim": dim}
    cases = layer_cases(names, **sizes, dtype=settings.dtype, device=device)
    return speed(cases, settings, device, kind="layers")


def networks(
    names: Names = (),
    /,
    mechanism: tuple[str, ...] = (),
    against: tuple[str, ...] = (),
    img_size: tuple[int, ...] = (224, 384, 512),
    batch: tuple[int, ...] = (1,),
    settings: Flat = FORWARD,
) -> int:
    """Whole networks against timm's own.

    Args:
        names: networks of sansmax or timm (default: one of each paper).
        mechanism: what takes the place of their attention (default: their own).
        against: networks of timm (default: the same XCiT, or the DeiT nearest in parameters).
        img_size: sides of the square images.
        batch: images.
    """
    from ..bench.measure import find_device
    from ..bench.models import network_cases
    from ..bench.speed import speed

    _check(img_size=img_size, batch=batch)
    device = find_device(settings.device)
    sizes = {"mechanism": mechanism, "against": against, "img_size": img_size, "batch": batch}
    cases = network_cases(names, **sizes, dtype=settings.dtype, device=device)
    return speed(cases, settings, device, kind="networks")


def changes(
    old: Annotated[Path, tyro.conf.Positional],
    new: Annotated[Path, tyro.conf.Positional],
    /,
    fail_over: float = 0.1,
) -> int:
    """What has changed between two files of --out; measures nothing.

    Args:
        old: a .json file of `sansmax bench`.
        new: the one to judge.
        fail_over: exit code 1 where a row is slower, or takes more memory, by more than this share beyond the
            quartiles.
    """
    from ..bench import changes

    lines, worse = changes.compare(changes.read(old), changes.read(new), fail_over)
    print("\n".join(lines))
    return int(worse)


def _check(**sizes: tuple[int, ...]) -> None:
    for name, values in sizes.items():
        if not values or min(values) < 1:
            raise ValueError(
                f"{name}: expected whole numbers of at least 1, got {list(values)}; leave it out if unsure"
            )
