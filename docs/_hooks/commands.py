"""What the package says of itself, put into a page when the site is built, so that it cannot drift.

`<!-- help: train digits_sima -->` is `sansmax train digits_sima --help`, and `<!-- supports: sima soft -->`
the traits of layers as a table.
"""

import contextlib
import io
import os
import re

from mkdocs.exceptions import PluginError

HELP = re.compile(r"^<!-- help:(.*?)-->$", re.MULTILINE)
SUPPORTS = re.compile(r"^<!-- supports:(.*?)-->$", re.MULTILINE)
WIDTH = "100"
FEATURES = {
    "mask": "key mask",
    "causal": "causal",
    "streaming": "token by token",
    "cross": "other keys (cross-attention)",
    "exp_free": "without exp",
}
NEEDS = {
    "": "any number of tokens",
    "tokens": "up to the length that it is made for; a patch grid of another size is resampled",
    "grid": "any patch grid",
}


def on_page_markdown(markdown, page, config, files):
    markdown = HELP.sub(lambda mark: f"```text\n{said(mark[1].split())}\n```", markdown)
    return SUPPORTS.sub(lambda mark: supports(mark[1].split()), markdown)


def said(words):
    """The text of `sansmax WORDS --help`."""
    from sansmax import cli

    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = WIDTH
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            code = cli.main([*words, "--help"])
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before
    lines = [line.rstrip() for line in text.getvalue().strip().splitlines()]
    if code or not lines:
        raise PluginError(f"help: expected a command of sansmax, got {' '.join(words)}: {' '.join(lines)}")
    return "\n".join(lines)


def supports(names):
    """A row a layer."""
    from sansmax import layers

    rows = [["layer", *FEATURES.values(), "input", "cost of mixing"], ["---"] * (len(FEATURES) + 3)]
    for name in names:
        traits = layers.mechanism(name).traits
        marks = ["yes" if getattr(traits, feature) else "no" for feature in FEATURES]
        rows.append([f"`{name}`", *marks, NEEDS[traits.needs], traits.cost])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
