"""What a token of an image attends to, as a picture."""

from pathlib import Path
from typing import Annotated

import tyro


def main(
    what: Annotated[str, tyro.conf.Positional],
    image: Annotated[Path, tyro.conf.Positional],
    /,
    query: tuple[int, int] | None = None,
    layer: str = "-1",
    rollout: bool = False,
    img_size: int | None = None,
    side: int = 512,
    out: Path = Path("map.png"),
) -> None:
    """Lays the attention map of one token over IMAGE: red where it weighs more, blue where it is negative.

    Args:
        what: a run folder, a .safetensors file, name=checkpoint, or a name of timm with weights.
        image: a file.
        query: row and column in the layer's grid of tokens, from 0; default: the class token, or else the
            middle of the grid.
        layer: its number in the order in which they run, negative from the last, or its name.
        rollout: through this layer and those below it, in place of the layer alone.
        img_size: side of the image that the network is given (default: the one it was trained with).
        side: of the picture.
        out: a .png file.
    """
    from PIL import Image

    from ..maps import attention_map, attention_rollout, or_middle, overlay
    from ..maps import picture as seen
    from ..tasks._data._decode import reason, to_rgb
    from ..tasks._run import at_least
    from ..train.network import load_network

    at_least(1, side=side)
    if out.suffix != ".png":
        raise ValueError(f"out: expected a file that ends in .png, got {out}; rename it")
    network = load_network(what, img_size=img_size)
    try:
        with Image.open(image) as opened:
            picture = to_rgb(opened)
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error and more
        raise ValueError(
            f"image: expected a picture that can be read, got {image} ({reason(error, image)}); give another"
        ) from None
    pixels = network.transform()(picture)
    find = attention_rollout if rollout else attention_map
    chosen: int | str = int(layer) if layer.lstrip("-").isdecimal() else layer
    weights, query = or_middle(find, network.model, pixels, query, chosen)
    shown = seen(pixels, network.mean, network.std, side)
    out.parent.mkdir(parents=True, exist_ok=True)
    overlay(shown, weights, query).save(out)
    token = "the class token" if query is None else f"row {query[0]}, column {query[1]}"
    rows, columns = weights.shape
    print(
        f"{out}: {'rollout' if rollout else 'map'} of {token} over {rows} x {columns} tokens, weights from "
        f"{weights.min().item():.3g} to {weights.max().item():.3g}"
    )
