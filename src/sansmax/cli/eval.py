"""How good a trained network is: top-1 and top-5 on labelled images at any sizes, or its task's figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ..train.recipe import Data

HELD_OUT = Data(root="", split="validation")


def run(arguments: Sequence[str]) -> int:
    """sansmax eval WHAT [--field value ...]: of a run of another task than classification, the flags are
    those fields of its recipe that an evaluation needs."""
    from ..train.trained import module_of

    if not (arguments and module_of(arguments[0])):
        tyro.cli(main, args=arguments, prog="sansmax eval", config=(tyro.conf.FlagCreatePairsOff,))
        return 0
    what, *flags = arguments
    _task(what, flags)
    return 0


def _task(what: str, flags: Sequence[str]) -> None:
    import dataclasses
    import typing

    from ..bench.measure import machine, versions
    from ..train.checkpoint import prepare_folder, write_json
    from ..train.trained import evaluate_run, load_trained

    trained = load_trained(what)
    own: Any = trained.recipe
    hints = typing.get_type_hints(type(own))
    fields = [(name, hints[name], getattr(own, name)) for name in own.evaluated]
    choice: Any = dataclasses.make_dataclass(
        "Evaluation",
        [
            *((n, h, dataclasses.field(default_factory=lambda v=v: v)) for n, h, v in fields),
            ("out", Path | None, None),
        ],
        frozen=True,
    )
    about = f"Evaluates {what} on its held-out samples, or on others of --data; --out: a .json file."
    chosen = tyro.cli(choice, args=flags, prog=f"sansmax eval {what}", description=about)
    out: Path | None = chosen.out
    if out is not None:
        if out.suffix != ".json":
            raise ValueError(f"out: expected a file that ends in .json, got {out}; rename it")
        prepare_folder(out.parent)
    recipe = dataclasses.replace(own, **{name: getattr(chosen, name) for name in own.evaluated}).checked()
    task, found, details = evaluate_run(trained, recipe)
    print(f"{what}: {task.words(found)}, {task.used:,} {task.unit}")
    if out is not None:
        told = {"what": what, "task": recipe.task, "figures": found, "samples": task.val_size}
        told |= {"details": details, "skipped": task.skipped, "recipe": recipe.to_json()}
        write_json(out, told | {"machine": machine(), "versions": versions()})


def main(
    what: Annotated[str, tyro.conf.Positional],
    /,
    data: Data = HELD_OUT,
    img_size: tuple[int, ...] = (),
    crop: Literal["centre", "full"] = "centre",
    batch_size: int = 128,
    device: str = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
    out: Path | None = None,
) -> None:
    """Evaluates WHAT on the split DATA.SPLIT of labelled images and prints a row for every image size.

    Args:
        what: a run folder, a .safetensors file, name=checkpoint, or a name of timm with weights.
        data: an empty root stands for the held-out images of the run.
        img_size: sides of the images (default: the one the network was trained with).
        crop: centre keeps the share of the resized side that the network was published with, full all of it.
        batch_size: images that the network takes at a time.
        device: auto, cpu or cuda.
        precision: fp32, or bf16 by autocast.
        out: a .json file for all figures, with those of every class and the images that could not be read.
    """
    import dataclasses

    from rich.console import Console

    from ..bench.measure import machine, versions
    from ..train.checkpoint import prepare_folder, write_json
    from ..train.evaluate import evaluate, open_labelled, table
    from ..train.network import load_network

    if batch_size < 1 or any(size < 1 for size in img_size):
        raise ValueError(
            "batch_size, img_size: expected whole numbers of at least 1; leave them out if unsure"
        )
    if out is not None:
        if out.suffix != ".json":
            raise ValueError(f"out: expected a file that ends in .json, got {out}; rename it")
        prepare_folder(out.parent)
    network = load_network(what, img_size=img_size[0] if img_size else None)
    data, split = open_labelled(what, data, network)
    rows = []
    for size in img_size or (network.img_size,):
        if size != network.img_size:
            network = load_network(what, img_size=size)
        rows.append(
            evaluate(
                network,
                split,
                crop=1.0 if crop == "full" else None,
                batch_size=batch_size,
                workers=data.workers or 0,
                device=device,
                precision=precision,
            )
        )
    Console().print(table(network, rows))
    if out is not None:
        write_json(
            out,
            {
                "network": network.name,
                "what": what,
                "data": dataclasses.asdict(data),
                "device": device,
                "precision": precision,
                "batch_size": batch_size,
                "machine": machine(),
                "versions": versions(),
                "sizes": rows,
            },
        )
