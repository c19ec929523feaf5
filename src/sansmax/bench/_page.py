"""Pages of HTML that need no network: one stylesheet, everything escaped."""

import base64
import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from . import _plots

__all__ = ["picture", "render"]


def render(template: str, **words: Any) -> str:
    """The template of this folder filled in."""
    environment = Environment(
        loader=PackageLoader("sansmax.bench", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"variable": _plots.name_variable, "powers": _powers}
    return environment.get_template(template).render(words)


def _powers(formula: str) -> Markup:
    """N D^2 with a raised 2."""
    return Markup(re.sub(r"\^(\w+)", r"<sup>\1</sup>", str(escape(formula))))


def picture(png: bytes) -> dict[str, Any]:
    """What an <img> shows; `pixels`: small pictures are shown as the squares they are."""
    return {
        "src": "data:image/png;base64," + base64.b64encode(png).decode(),
        # A PNG's header holds the width at byte 16.
        "pixels": int.from_bytes(png[16:20], "big") <= 64,
    }
