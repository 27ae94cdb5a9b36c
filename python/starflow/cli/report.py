"""A report as one self-contained HTML file: text, tables, figures and clips, nothing fetched from anywhere."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from starflow.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.2rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
.clips { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; } figcaption { font-size: .85rem; }
.clips figure { width: 9rem; } .clips img { width: 9rem; image-rendering: pixelated; border-radius: 4px; }
img.wide { max-width: 100%; } .note { color: #555; font-size: .9rem; }
"""
_MEDIA = {".png": "image/png", ".gif": "image/gif", ".svg": "image/svg+xml"}


class Report:
    """Collects sections, then writes the page.

    Args:
        title: title of the page.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = []

    def heading(self, text: str) -> None:
        """Begins a section."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str, *, note: bool = False) -> None:
        """A paragraph; a note is set smaller."""
        self._parts.append(f"<p{' class=note' if note else ''}>{html.escape(text)}</p>")

    def table(self, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A table of text cells, the first column set left."""
        cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        self._parts.append(f"<table><tr>{cells}</tr>{body}</table>")

    def clips(self, pictures: Iterable[tuple[Path, str]]) -> None:
        """Pictures or GIFs side by side, each with its caption."""
        figures = "".join(
            f"<figure>{_image(path, text)}<figcaption>{html.escape(text)}</figcaption></figure>"
            for path, text in pictures
        )
        self._parts.append(f'<div class="clips">{figures}</div>')

    def plot(self, figure: Figure, description: str) -> None:
        """A matplotlib figure, as SVG."""
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", bbox_inches="tight")
        data = base64.b64encode(buffer.getvalue().encode()).decode()
        self._parts.append(
            f'<img class="wide" alt="{html.escape(description)}" src="data:{_MEDIA[".svg"]};base64,{data}">'
        )

    def write(self, path: Path) -> None:
        """Writes the page at once, so that a reader never sees half of it."""
        title = html.escape(self.title)
        page = (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
            f"<style>{_STYLE}</style><h1>{title}</h1>{''.join(self._parts)}</html>"
        )
        write_text(path, page)


def _image(path: Path, text: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(text)}" src="data:{_MEDIA[path.suffix]};base64,{data}">'
