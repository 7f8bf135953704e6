"""A hook of mkdocs: README.md and CONTRIBUTING.md are pages of the site too.

Links in the repository are relative files, so that they work where the repository is read. On the
site README.md is the first page, and what is no page (an example's source) is named, not linked.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages from outside of docs/."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_LINK.sub(_from_root, text)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links out of docs/ become links to pages, or text."""
    return _LINK.sub(_from_docs, markdown)


def _from_root(link: re.Match[str]) -> str:
    """A link of a page at the root of the repository, as a page in docs/ has it."""
    bang, text, target = link.groups()
    if re.match(r"[a-z]+:|#", target):
        return link[0]
    inside = target.removeprefix("docs/")
    return f"{bang}[{text}]({inside if inside != target else f'../{target}'})"


def _from_docs(link: re.Match[str]) -> str:
    bang, text, target = link.groups()
    if not target.startswith("../"):
        return link[0]
    path, hash_, anchor = target.removeprefix("../").partition("#")
    if path in PAGES:
        return f"{bang}[{text}]({PAGES[path]}{hash_}{anchor})"
    return text if PurePosixPath(path).name in text else f"{text} (`{path}`)"
