"""The build fails where a page, a style or a picture of it would ask another host for something."""

import re
from html.parser import HTMLParser
from pathlib import Path

from mkdocs.exceptions import PluginError

FOREIGN = re.compile(r"\s*(?:https?:)?//", re.IGNORECASE)
STYLE = re.compile(r"""(?:url\(\s*["']?|@import\s+["']?)((?:https?:)?//[^"')\s]+)""", re.IGNORECASE)
# What a browser fetches unasked; an `a` is followed by its reader alone.
FETCHED = {
    "script": ("src",),
    "link": ("href",),
    "img": ("src", "srcset"),
    "iframe": ("src",),
    "source": ("src", "srcset"),
    "video": ("src", "poster"),
    "audio": ("src",),
    "object": ("data",),
    "embed": ("src",),
    "image": ("href", "xlink:href"),
    "use": ("href", "xlink:href"),
}


class _Fetches(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            value = value or ""
            if name in FETCHED.get(tag, ()) and FOREIGN.match(value):
                self.found.append(f"<{tag} {name}={value}>")
            if name == "style":
                self.found += STYLE.findall(value)


def fetches(name, text):
    """What a browser would fetch from another host for a file of the site."""
    if name.endswith(".css"):
        return STYLE.findall(text)
    parser = _Fetches()
    parser.feed(text)
    return parser.found + STYLE.findall("\n".join(re.findall(r"<style.*?</style>", text, re.DOTALL)))


def on_post_build(config):
    for path in sorted(Path(config.site_dir).rglob("*")):
        if path.suffix in (".html", ".css", ".svg") and (
            found := fetches(path.name, path.read_text(encoding="utf-8"))
        ):
            where = path.relative_to(config.site_dir)
            raise PluginError(
                f"{where}: expected nothing from another host, got {found[0]}; keep it among the site's files"
            )
