"""The mechanisms, what each supports, and what it costs."""

import json as json_module


def main(json: bool = False) -> None:
    """Prints what each mechanism supports: causal order, cross-attention, key masks, streaming.

    Costs count one layer without its projections: N tokens of head width D, m landmarks, S memory rows.

    Args:
        json: print one JSON object instead, with titles, papers and equations in words.
    """
    from dataclasses import asdict

    from sansmax import layers

    found = {name: layer.traits for name, layer in layers.mechanisms().items()}
    if json:
        print(json_module.dumps({name: asdict(traits) for name, traits in found.items()}, indent=2))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="bold", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("mechanism", no_wrap=True)
    features = ("causal", "cross", "mask", "streaming", "exp_free")
    for feature in features:
        table.add_column(feature.replace("_", "-"), justify="center")
    table.add_column("cost of mixing")
    for name, traits in found.items():
        marks = [Text("yes", style="green") if getattr(traits, f) else Text("-") for f in features]
        table.add_row(name, *marks, Text(traits.cost))
    Console().print(table)
