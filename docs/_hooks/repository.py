"""Links of a page that leave docs/ lead to copies of the repository's files in the site.

benchmarks/README.md is a page; a folder of files is a page that lists them.
"""

import os
import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")
PAGES = ["benchmarks/README.md"]
FOLDERS = ["benchmarks/results"]


def on_files(files, config):
    root = Path(config.config_file_path).parent
    for name in PAGES:
        files.append(File.generated(config, name, abs_src_path=str(root / name)))
    wanted = set()
    for folder in FOLDERS:
        names = sorted(path.name for path in (root / folder).iterdir())
        wanted |= {f"{folder}/{name}" for name in names}
        listed = "\n".join(f"- [{name}]({name})" for name in names)
        files.append(File.generated(config, f"{folder}/index.md", content=f"# {folder}\n\n{listed}\n"))
    for file in files.documentation_pages():
        for link in LINK.finditer(file.content_string):
            target = _target(file.src_uri, link[2])
            if target and target not in PAGES and (root / target).is_file():
                wanted.add(target)
    for name in sorted(wanted):
        files.append(File.generated(config, name, abs_src_path=str(root / name)))
    return files


def on_page_markdown(markdown, page, config, files):
    here = page.file.src_uri

    def relinked(link):
        target = _target(here, link[2])
        if target is None:
            return link[0]
        if target in FOLDERS:
            target += "/index.md"
        target = target.removeprefix("docs/")
        if files.get_file_from_path(target) is None:
            raise PluginError(
                f"{here}: expected a link to a file of the repository, got {link[2]}; mend the link"
            )
        return link[1] + os.path.relpath(target, os.path.dirname(here) or ".") + link[3]

    return LINK.sub(relinked, markdown)


def _target(uri, link):
    """The path in the repository of what `link` on the page `uri` means, where it leaves docs/ or comes from
    outside."""
    outside = uri in PAGES
    path = os.path.normpath(os.path.join("" if outside else "docs", os.path.dirname(uri), link))
    if path.startswith("docs/") and not outside:
        return None
    return path
