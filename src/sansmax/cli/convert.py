"""Published weights into a safetensors file with this package's names."""

from pathlib import Path
from typing import Annotated, Any

import tyro


def main(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    /,
    model: str,
    num_classes: int | None = None,
    img_size: tuple[int, int] = (224, 224),
) -> None:
    """Reads an author's checkpoint, checks every key and shape against the network, and writes OUT.

    Nothing in the checkpoint is executed. sansmax.load_published and timm (checkpoint_path=) read OUT.

    Args:
        checkpoint: the file (.pth, .pt, .bin, .safetensors).
        out: the file to write, .safetensors.
        model: the network's name (soft_tiny).
        num_classes: of the head; as many as the checkpoint has by default.
        img_size: height and width that the positions are resampled to, where the network has a table of them.
    """
    import safetensors.torch
    import timm

    from .. import models
    from .._find import pick
    from ..models._published import read_state
    from ..train.checkpoint import replace_file

    name = pick("networks", model, models.networks())
    if out.suffix != ".safetensors":
        raise ValueError(f"out: expected a file that ends in .safetensors, got {out}; rename it")
    state = read_state(checkpoint)
    if num_classes is None:
        num_classes = len(state["head.weight"]) if "head.weight" in state else 1000
    words: dict[str, Any] = {"img_size": img_size} if img_size != (224, 224) else {}
    network = models.load_published(timm.create_model(name, num_classes=num_classes, **words), checkpoint)
    tensors = {key: value.contiguous() for key, value in network.state_dict().items()}
    replace_file(out, lambda path: safetensors.torch.save_file(tensors, path, metadata={"model": name}))
    parameters = sum(p.numel() for p in network.parameters())
    print(f"{out}: {name}, {len(tensors)} tensors, {parameters:,} parameters, {num_classes} classes")
