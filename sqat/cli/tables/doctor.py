"""Tables of `sqat doctor`: the machine, its backends and its targets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from sqat import __version__
from sqat.cli.printing import print_json, result_console
from sqat.cli.tables.layout import LABEL_WIDTH, new_table, print_paragraph
from sqat.hardware.choosing import SPARSE, title
from sqat.hardware.doctor import LACKING, PARTLY, READY, remedies

if TYPE_CHECKING:
    from sqat.hardware.doctor import Diagnosis, Verdict

COLOURS = {READY: "green", PARTLY: "yellow", LACKING: "red"}


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
    for command, names in remedies(diagnosis).items():
        print_paragraph(console, "to get", f"{', '.join(names)}:")
        console.print(Text(" " * LABEL_WIDTH + command), soft_wrap=True)


def machine_paragraphs(diagnosis: Diagnosis) -> Iterator[tuple[str, str]]:
    """Yield machine and versions as label and text."""
    machine, kernels = diagnosis.machine, diagnosis.kernels
    processor = machine.processor
    features = ", ".join(sorted(processor.features)) or "no int8 or wide vector features known"
    features += "" if processor.has_int8_dot else "; no exact int8 dot product"
    cores = f"{processor.cores} core{'s' * (processor.cores > 1)}"
    total, available = diagnosis.memory
    yield "sqat", f"{__version__} on Python {diagnosis.python}, {diagnosis.system}"
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


def gigabytes(size: int | None) -> str:
    """Format bytes as ``7.8 GB``."""
    return "unknown" if size is None else f"{size / 1e9:.1f} GB"
