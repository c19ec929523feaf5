"""What the change of a network's attention cost and brought, in words."""

from typing import Any

__all__ = ["markdown"]

STAGES = {
    "before": "before",
    "at_once": "with all new layers at once",
    "layers": "after every layer has learned from the old one",
    "whole": "after the whole has learned from the whole",
}


def markdown(receipt: dict[str, Any]) -> str:
    """The receipt of sansmax.train.adapt.adapt as a page."""
    swapped, data = receipt["swap"]["layers"], receipt["data"]
    kept = [layer["name"] for layer in receipt["layers"] if layer["kept"]] + receipt["left"]
    lines = [
        f"# {receipt['mechanism']} in {receipt['network']}",
        "",
        f"{len(swapped)} attentions became {receipt['mechanism']}; {', '.join(kept) or 'none'} stayed. "
        f"{data['name']}: {data['train']:,} training and {data['val']:,} held-out images.",
        *(f"{name} could not be replaced, because {reason}." for name, reason in receipt["refused"]),
        "",
        *_table(["accuracy", "top-1, %", "minutes"], _stages(receipt)),
        "",
        "Error: of a layer's output on held-out images, as a share of the spread of the old one's on the "
        "same input. Alone: top-1 of the old network with this layer alone replaced, on "
        f"{receipt['tried']:,} images; cost: how far below the old network's, with its standard error.",
        "",
        *_table(
            ["layer", "error at once", "error learned", "alone, %", "cost, points", ""],
            [
                [
                    layer["name"],
                    f"{layer['before']:.3g}",
                    f"{layer['after']:.3g}",
                    f"{100 * layer['alone']:.1f}",
                    f"{100 * layer['cost']:.1f} ± {100 * layer['error']:.1f}",
                    "stayed" if layer["kept"] else "",
                ]
                for layer in receipt["layers"]
            ],
        ),
        "",
        _worth(receipt["layers"]),
        "",
        *_table(
            ["image, px", "before, ms", "after, ms", "faster", "before, MB", "after, MB"],
            [_speed(row) for row in receipt["speed"]],
        ),
        "",
        f"One image at a time; median and quartiles, taken in turn; {receipt['machine']['cpu']}.",
    ]
    return "\n".join(lines) + "\n"


def _stages(receipt: dict[str, Any]) -> list[list[str]]:
    return [
        [
            words,
            f"{100 * receipt['accuracy'][stage]:.2f}",
            f"{receipt['seconds'][stage] / 60:.1f}" if stage in receipt["seconds"] else "",
        ]
        for stage, words in STAGES.items()
        if stage in receipt["accuracy"]
    ]


def _worth(layers: list[dict[str, Any]]) -> str:
    """Which layers pay as they were: those whose replacement costs more than chance does."""
    dear = sorted(layers, key=lambda layer: -layer["cost"])
    dear = [layer for layer in dear if layer["cost"] > 2 * layer["error"]]
    if not dear:
        return "No layer alone costs more than chance: none is worth keeping."
    named = ", ".join(f"{layer['name']} ({100 * layer['cost']:.1f})" for layer in dear)
    return f"Worth keeping, the dearest first (points that each costs alone): {named}."


def _speed(row: dict[str, Any]) -> list[str]:
    if "skipped" in row:
        return [str(row["img_size"]), row["skipped"], "", "", "", ""]

    def spread(found: dict[str, float], digits: int) -> str:
        return f"{found['median']:.{digits}f} ({found['low']:.{digits}f} to {found['high']:.{digits}f})"

    return [
        str(row["img_size"]),
        spread(row["ms"]["before"], 1),
        spread(row["ms"]["after"], 1),
        spread(row["faster"], 2),
        f"{row['peak_mb']['before']:.1f}",
        f"{row['peak_mb']['after']:.1f}",
    ]


def _table(titles: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *rows)]
