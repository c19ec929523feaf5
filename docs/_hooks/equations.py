"""Blocks of ```math become MathML when the site is built: a page needs no script and no font for them."""

from latex2mathml.converter import convert


def on_config(config):
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "equation", "format": mathml})


def mathml(source, language, css_class, options, md, **kwargs):
    """One equation a line."""
    lines = (convert(line, display="block") for line in source.splitlines() if line.strip())
    return f'<div class="{css_class}">{"".join(lines)}</div>'
