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
    from ..models._published import fill, own_state
    from ..train.checkpoint import replace_file

    name = pick("networks", model, models.networks())
    if out.suffix != ".safetensors":
        raise ValueError(f"out: expected a file that ends in .safetensors, got {out}; rename it")
    words: dict[str, Any] = {"img_size": img_size} if img_size != (224, 224) else {}
    if num_classes is not None:
        words["num_classes"] = num_classes
    cfg: Any = timm.get_pretrained_cfg(name)
    if "img_size" in words and cfg.input_size is None:
        raise ValueError(
            f"img_size: expected none because {name} takes no images, got {img_size}; leave it out"
        )
    network: Any = timm.create_model(name, **words)
    state = own_state(network, checkpoint)
    head = state.get(f"{cfg.classifier}.weight")
    if num_classes is None and head is not None and head.ndim:
        network.reset_classifier(len(head))
    fill(network, state, str(checkpoint))
    tensors = {key: value.contiguous() for key, value in network.state_dict().items()}
    content = safetensors.torch.save(tensors, {"model": name})
    replace_file(out, lambda path: path.write_bytes(content))
    parameters = sum(p.numel() for p in network.parameters())
    print(f"{out}: {name}, {len(tensors)} tensors, {parameters:,} parameters, {network.num_classes} classes")
