"""What mkdocs does to a page of docs/ before it renders it.

`<!-- from FILE -->` is replaced by the file, and `<!-- from FILE: NAME -->` by what stands between its `<!-- NAME:begin -->`
and `<!-- NAME:end -->`, or under its heading `## NAME`: a table or a text has one place, and the site shows it. A link that
leaves docs/ leads nowhere on the site: it becomes the path that it names.
"""

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
# Files beside docs/ that are pages of the site.
PAGES = {ROOT / "CONTRIBUTING.md": DOCS / "contributing.md", ROOT / "CHANGELOG.md": DOCS / "changes.md"}
INCLUDE = re.compile(r"<!-- from ([\w./]+)(?:: ([^>]+))? -->")
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")


def part_of(text: str, name: str) -> str:
    """Between its marks, or under its heading."""
    marked = re.search(rf"<!-- {re.escape(name)}:begin -->\n(.*?)\n<!-- {re.escape(name)}:end -->", text, re.S)
    headed = re.search(rf"^## {re.escape(name)}\n+(.*?)\s*(?=^## |\Z)", text, re.S | re.M)
    found = marked or headed
    if found is None:
        raise ValueError(f"{name!r} is neither between marks nor under a heading")
    return found[1]


def relinked(text: str, written_in: Path, shown_in: Path) -> str:
    """The text with its links, which are relative to the folder `written_in`, relative to the folder `shown_in`."""

    def link(match: re.Match[str]) -> str:
        words, target, anchor = match[1], (written_in / match[2]).resolve(), match[3] or ""
        target = PAGES.get(target, target)
        if DOCS in target.parents:
            return f"[{words}]({Path(os.path.relpath(target, shown_in)).as_posix()}{anchor})"
        path = target.relative_to(ROOT).as_posix()
        return f"`{path}`" if words == path else f"{words} (`{path}`)"

    return LINK.sub(link, text)


def page_of(text: str, folder: Path) -> str:
    """What mkdocs is given for a page of that folder."""

    def part(match: re.Match[str]) -> str:
        file, name = match.groups()
        whole = (ROOT / file).read_text()
        return relinked(part_of(whole, name) if name else whole, (ROOT / file).parent, folder)

    return INCLUDE.sub(part, relinked(text, folder, folder))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    return page_of(markdown, Path(page.file.abs_src_path).parent)
