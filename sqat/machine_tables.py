"""The tables of `sqat doctor` and `sqat bench`, made to be read at 80 columns, each also as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from sqat import __version__
from sqat.choosing import SPARSE, title
from sqat.console import print_json, result_console
from sqat.doctor import LACKING, PARTLY, READY, remedies
from sqat.tables import new_table

if TYPE_CHECKING:
    from sqat.doctor import Diagnosis, Verdict

COLOURS = {READY: "green", PARTLY: "yellow", LACKING: "red"}
LABEL = 11


def print_diagnosis(diagnosis: Diagnosis, *, as_json: bool = False) -> None:
    """What `sqat doctor` found."""
    if as_json:
        print_json(diagnosis.as_json())
        return
    console = result_console()
    for label, text in machine_paragraphs(diagnosis):
        print_paragraph(console, label, text)
    console.print()
    for what, verdicts in (("backend", diagnosis.backends), ("target", diagnosis.targets)):
        print_verdicts(console, what, verdicts)
        console.print()
    for command, names in remedies(diagnosis).items():
        print_paragraph(console, "to get", f"{', '.join(names)}:")
        console.print(Text(" " * LABEL + command), soft_wrap=True)


def machine_paragraphs(diagnosis: Diagnosis) -> Iterable[tuple[str, str]]:
    """Machine and versions as label and text."""
    machine, kernels = diagnosis.machine, diagnosis.kernels
    processor = machine.processor
    features = ", ".join(sorted(processor.features)) or "no int8 or wide vector features known"
    cores = f"{processor.cores} core{'s' * (processor.cores > 1)}"
    total, available = diagnosis.memory
    yield "sqat", f"{__version__} on Python {diagnosis.python}, {diagnosis.system}"
    features += "" if processor.has_int8_dot else "; no exact int8 dot product"
    yield "cpu", f"{processor.name or processor.machine or 'unknown'}, {cores}; {features}"
    yield "runtime", f"{kernels.instruction_set} (sqat.runtime)" if kernels.instruction_set else kernels.problem
    yield "memory", f"{gigabytes(total)}, {gigabytes(available)} of it available" if total else "unknown"
    yield "load", "unknown" if diagnosis.load is None else f"{diagnosis.load:.2f} processes in the last minute"
    sparse = {True: "2:4 sparse tensor cores", False: "no sparse tensor cores"}
    gpus = [f"{title(gpu)}, {sparse[gpu.capability >= SPARSE]}" for gpu in machine.gpus]
    yield "gpu", "; ".join(gpus) or "no NVIDIA GPU"
    yield "packages", ", ".join(f"{name} {version}" for name, version in diagnosis.versions.items() if version)
    yield "without", ", ".join(name for name, version in diagnosis.versions.items() if not version) or "nothing"
    for problem in machine.unknown:
        yield "not known", problem


def print_paragraph(console: Console, label: str, text: str) -> None:
    """A label in a column of its own, and a text wrapped between words beside it."""
    rest = " " * LABEL
    lines = textwrap.wrap(text, console.width, initial_indent=f"{label:<{LABEL}}", subsequent_indent=rest,
                          break_on_hyphens=False)  # fmt: skip
    for line in lines:
        console.print(Text.assemble((line[:LABEL], "bold"), line[LABEL:]), soft_wrap=True)


def print_verdicts(console: Console, what: str, verdicts: Sequence[Verdict]) -> None:
    """A row for each target or backend."""
    table = new_table(what)
    table.columns[0].no_wrap = True
    table.add_column("here", no_wrap=True)
    table.add_column("runs" if what == "backend" else "served by", overflow="fold")
    table.add_column("lacks", overflow="fold")
    for verdict in verdicts:
        table.add_row(verdict.name, Text(verdict.state, COLOURS[verdict.state]), verdict.has, verdict.lacks)
    console.print(table)


def gigabytes(size: int | None) -> str:
    """Bytes as ``7.8 GB``."""
    return "unknown" if size is None else f"{size / 1e9:.1f} GB"
