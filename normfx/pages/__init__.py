"""Pages: a report as one HTML file that needs no network. Text is escaped, whatever it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write(path: str | Path, name: str, **values: Any) -> Path:
    """Writes a page and returns its path.

    Args:
        path: of the file; one that is there is replaced.
        name: of the template beside this file, without its endings.
        values: what the template shows.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("normfx", "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(f"{name}.html.jinja").render(name=name, **values)
    path = Path(path)
    path.write_text(page, encoding="utf-8")
    return path
