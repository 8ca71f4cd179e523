"""Tables of `sqat doctor`: the machine, its backends and its targets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from sqat import __version__
from sqat.cli.printing import print_json, result_console
from sqat.cli.tables.layout import LABEL_WIDTH, new_table, print_paragraph
from sqat.hardware.targets import MISSING, PARTLY, READY

if TYPE_CHECKING:
    from sqat.hardware.doctor import Diagnosis
    from sqat.hardware.targets import Verdict

COLOURS = {READY: "green", PARTLY: "yellow", MISSING: "red"}


def print_diagnosis(diagnosis: Diagnosis, *, as_json: bool = False) -> None:
    """Print the machine, a row per backend and target, and the commands that install what is missing."""
    if as_json:
        print_json(diagnosis.as_json())
        return
    console = result_console()
    for label, text in machine_paragraphs(diagnosis):
        print_paragraph(console, label, text)
    console.print()
    print_verdicts(console, ("backend", "here", "runs", "lacks"), diagnosis.backends)
    print_verdicts(console, ("target", "here", "served by", "lacks"), diagnosis.targets)
    for command, names in diagnosis.remedies().items():
        print_paragraph(console, "to get", f"{', '.join(names)}:")
        console.print(Text(" " * LABEL_WIDTH + command), soft_wrap=True)


def machine_paragraphs(diagnosis: Diagnosis) -> Iterator[tuple[str, str]]:
    """Yield machine and versions as label and text."""
    total, available = (f"{size / 1e9:.1f} GB" for size in diagnosis.memory)
    yield "sqat", f"{__version__} on Python {diagnosis.python}, {diagnosis.system}"
    yield from (each for each in diagnosis.machine.paragraphs() if each[0] != "packages")
    yield "memory", f"{total}, {available} available"
    yield "load", f"{diagnosis.load:.2f} processes in the last minute"
    yield "packages", ", ".join(f"{name} {version}" for name, version in diagnosis.versions.items() if version)
    yield "without", ", ".join(name for name, version in diagnosis.versions.items() if not version) or "nothing"


def print_verdicts(console: Console, titles: Sequence[str], verdicts: Sequence[Verdict]) -> None:
    """Print a row per backend or target."""
    table = new_table("")
    table.columns[0].header = titles[0]
    table.columns[0].no_wrap = True
    table.add_column(titles[1], no_wrap=True)
    for title_ in titles[2:]:
        table.add_column(title_, overflow="fold")
    for verdict in verdicts:
        table.add_row(verdict.name, Text(verdict.state, COLOURS[verdict.state]), verdict.has, verdict.lacks)
    console.print(table)
    console.print()
