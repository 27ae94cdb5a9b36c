"""What mkdocs asks for while it builds the site."""

from __future__ import annotations

import re


def on_page_markdown(markdown: str, **_: object) -> str:
    """Turns links to files of the checkout, which the site does not hold, into their text."""
    return re.sub(r"\[([^\]]+)\]\((?:\.\./)+[^)]*\)", r"\1", markdown)
