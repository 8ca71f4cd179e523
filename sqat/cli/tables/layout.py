"""Tables, labelled paragraphs and number formats that the commands share."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from sqat.cli.printing import result_console

LABEL_WIDTH = 11


def new_table(first: str, *others: str) -> Table:
    """Create an empty table: a left-aligned first column that wraps, the others right-aligned."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column(first, overflow="fold")
    for title in others:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def natural_width(table: Table) -> int:
    """Return the number of columns that a table takes if nothing in it is wrapped."""
    wide = result_console(10_000)
    return Measurement.get(wide, wide.options, table).maximum


def print_paragraph(console: Console, label: str, text: str) -> None:
    """Print a text beside a label, wrapped between words."""
    lines = textwrap.wrap(text, console.width, initial_indent=f"{label:<{LABEL_WIDTH}}",
                          subsequent_indent=" " * LABEL_WIDTH, break_on_hyphens=False)  # fmt: skip
    for line in lines:
        console.print(Text.assemble((line[:LABEL_WIDTH], "bold"), line[LABEL_WIDTH:]), soft_wrap=True)


class Footnotes:
    """Letters for the reasons in a table's rows, and the lines below the table that explain them."""

    def __init__(self, reasons: Iterable[str]) -> None:
        self.counts = Counter(reason for reason in reasons if reason)
        self.letters = dict(zip(self.counts, "abcdefghijklmnopqrstuvwxyz", strict=False))

    def mark(self, text: str, reason: str) -> str:
        """Append the letter of a reason to a cell."""
        return f"{text} {self.letters.get(reason, '')}".strip()

    def print(self, console: Console, num_rows: int, prefix: str = "") -> None:
        """Print a line per reason."""
        console.print()
        for reason, count in self.counts.items():
            console.print(f"{self.letters.get(reason, '-')}: {prefix}{reason} ({count} of {num_rows} layers)")


def natural_order(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts layer 2 before layer 10."""
    return [(int(part) if part.isdecimal() else 0, part) for part in name.split(".")]


def common_prefix(names: Sequence[str]) -> str:
    """Return the part before the layer number that most names share, e.g. ``bert.encoder.layer.``."""
    prefixes = Counter(name[: match.start() + 1] for name in names if (match := re.search(r"\.\d+\.", name)))
    return prefixes.most_common(1)[0][0] if prefixes else ""


def shorten(name: str, prefix: str) -> str:
    """Replace the prefix of a layer's name by ``~``."""
    return f"~{name.removeprefix(prefix)}" if prefix and name.startswith(prefix) else name


def format_shape(shape: Iterable[int]) -> str:
    """Format a shape as ``384x1536``."""
    return "x".join(map(str, shape))


def format_count(count: int | None) -> str:
    """Format a count; three digits from 100,000 on, ``-`` for None."""
    if count is None:
        return "-"
    return f"{count:,}" if count < 100_000 else f"{count / 1e3:.0f}k" if count < 999_500 else f"{count / 1e6:.3g}M"


def format_digits(value: float) -> str:
    """Format a number with three digits, or with all digits before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def format_percent(share: float) -> str:
    """Format a share as ``12.3 %``."""
    return f"{100 * share:.1f} %"
