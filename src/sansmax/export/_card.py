"""The model card: what a folder of graphs holds, in Markdown."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

__all__ = ["card"]


def card(record: dict[str, Any]) -> str:
    """README.md of an export, of its report."""
    environment = Environment(
        loader=PackageLoader("sansmax.export", ""),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    environment.filters |= {"by": lambda size: " x ".join(map(str, size)) or "-"}
    return environment.get_template("_card.md.jinja").render(record)
