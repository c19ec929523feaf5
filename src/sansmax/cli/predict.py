"""What a trained network makes of any number of samples: classes into a table, or its task's files."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.constructors import PrimitiveConstructorSpec

ONE_OR_NONE = PrimitiveConstructorSpec(
    nargs=(0, 1),
    metavar="[INT]",
    instance_from_str=lambda words: int(words[0]) if words else 1024,
    is_instance=lambda value: value is None or isinstance(value, int),
    str_from_instance=lambda value: [str(value)],
)


def run(arguments: Sequence[str]) -> int:
    """sansmax predict WHAT INPUT [--flag value ...]; of a run of another task than classification, the flags
    are those of its task."""
    from ..train.trained import load_trained, module_of

    function, what = main, arguments[0] if arguments else ""
    if module := module_of(what):
        function, arguments = functools.partial(module.predict, load_trained(what)), arguments[1:]
    prog = f"sansmax predict {what}" if module else "sansmax predict"
    tyro.cli(function, args=arguments, prog=prog, config=(tyro.conf.FlagCreatePairsOff,))
    return 0


def main(
    what: Annotated[str, tyro.conf.Positional],
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="INPUT")],
    /,
    out: str = "predictions.csv",
    top_k: int = 5,
    embeddings: bool = False,
    img_size: int | None = None,
    batch_size: int = 128,
    part_size: int = 4096,
    tile: Annotated[int | None, ONE_OR_NONE] = None,
    scratch: Path | None = None,
    device: str = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
) -> None:
    """Writes the classes that WHAT sees in every image of INPUT to OUT, one row an image.

    The same command, given again after an interruption, goes on where it stood. With torchrun the parts are
    shared out to its processes. Columns: path, top1, top1_probability, top2, ..., error (why an image could
    not be read), and embedding.

    Args:
        what: a run folder, a .safetensors file, name=checkpoint, or a name of timm with weights.
        source: an image, a folder with all below it, a .tar, or shards as name-{0000..0099}.tar.
        out: a file that ends in .csv or .parquet; OUT.json tells how it was made.
        top_k: how many classes of each image.
        embeddings: add the input of the network's last layer.
        img_size: side of the images (default: the one the network was trained with).
        batch_size: images that the network takes at a time.
        part_size: images that are done again after an interruption, at most; a .tar is done again whole.
        tile: for images larger than memory, of networks of SimA, XNorm or AFT-simple: every image keeps its
            own size and goes through in tiles of so many pixels (1024 without a number), exactly as in one
            piece. Needs pip install sansmax[tiles].
        scratch: with --tile, the folder for the tokens, channels * 4 bytes a patch, twice that for SimA's and
            X-ViT's own networks (16,384 px in patches of 16 at 192 channels: 0.8 and 1.6 GB; default: the one
            for temporary files). Nothing is left in it whatever happens.
        device: auto, cpu or cuda.
        precision: fp32, or bf16 by autocast.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ..train._tables import first_row
    from ..train.network import load_network
    from ..train.predict import predict

    if tile is None and scratch is not None:
        raise ValueError(f"scratch: expected none without --tile, got {scratch}; leave it out")
    if tile is not None and img_size is not None:
        raise ValueError(
            f"img_size: expected none with --tile, which leaves images as they are, got {img_size}; leave "
            f"it out"
        )
    network = load_network(what, img_size=img_size)
    bar = (TextColumn("parts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*bar, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("parts", total=None)
        try:
            outcome = predict(
                network,
                source,
                out,
                top_k=top_k,
                embeddings=embeddings,
                batch_size=batch_size,
                part_size=part_size,
                tile=tile,
                scratch=scratch,
                device=device,
                precision=precision,
                progress=lambda done, parts: progress.update(task, completed=done, total=parts),
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt("interrupted; the same command goes on where it stood") from None
    if outcome.missing:
        print(f"{out}: {outcome.missing} parts are missing, which other processes write")
    else:
        print(f"{out}: {outcome.images:,} rows, {outcome.errors:,} of them with an error")
        if tile is not None and outcome.images == 1:
            row = first_row(Path(out).expanduser())
            for i in range(1, top_k + 1):
                if row.get(f"top{i}"):
                    print(f"{float(row[f'top{i}_probability']):7.2%}  {row[f'top{i}']}")
            if row["error"]:
                print(row["error"])
