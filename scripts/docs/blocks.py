"""Blocks of a page that scripts write: the text between ``<!-- name -->`` and ``<!-- end of name -->``."""

from __future__ import annotations

from collections.abc import Sequence


def replace_block(page: str, name: str, content: str) -> str:
    """Return the page with new content in one of its blocks."""
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    head, found, rest = page.partition(start)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"the page has no block {name!r}")
    return f"{head}{start}{content}{end}{tail}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; what would break it is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    cells = ([cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
