"""Which mechanism pays in a network on this machine, and from which image size on."""

from pathlib import Path
from typing import Annotated, Literal

import tyro


def main(
    network: Annotated[str, tyro.conf.Positional],
    /,
    img_size: tuple[int, ...] = (224, 512, 1024),
    batch: int = 8,
    mechanisms: tuple[str, ...] = (),
    train: bool = False,
    budget: float = 60.0,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str = "auto",
    out: Path | None = None,
) -> None:
    """Times NETWORK with softmax and with every mechanism, and says where each begins to pay.

    One block of each network is timed with what lies around it, and the rest is multiplied: right to some
    10 %, in about as many seconds as BUDGET says.

    Args:
        network: a trunk that sansmax.create_model takes (vit, deit, xcit, vit_tiny_patch16_224, soft_tiny).
        img_size: sides of the square images.
        batch: images at a time.
        mechanisms: names from `sansmax list` (default: all).
        train: forward and backward in training, in place of forward in evaluation.
        budget: seconds; what would take longer is skipped, and told.
        dtype: of images and weights.
        device: auto, cpu or cuda.
        out: a .json file for all figures.
    """
    from rich.console import Console

    from ..bench.which_table import ask

    ask(network, img_size, batch, mechanisms, train, budget, dtype, device, out, Console())
