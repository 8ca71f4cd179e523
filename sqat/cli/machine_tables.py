"""The tables of `sqat doctor`, `sqat bench` and `sqat analyze`, made to be read at 80 columns, each also as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from sqat import __version__
from sqat.cli.console import nearby, print_json, result_console
from sqat.cli.tables import common_prefix, new_table, shorten
from sqat.hardware.choosing import SPARSE, title
from sqat.hardware.doctor import LACKING, PARTLY, READY, remedies

if TYPE_CHECKING:
    from sqat.analyze.findings import Choice, Findings, Harm, Shares
    from sqat.bench.measuring import Report, Setting, Timing
    from sqat.bench.parity import Parity
    from sqat.hardware.doctor import Diagnosis, Verdict

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


def print_bench(report: Report) -> None:
    """What `sqat bench` measured: the candidates, then a table for each size."""
    console = result_console()
    threads = f"{report.threads} of {report.cores} cores, a thread each"
    load = " to ".join(f"{value:.1f}" for value in report.load)
    print_paragraph(console, "cpu", f"{report.cpu or 'unknown'}, {threads}" + (f"; load {load}" if load else ""))
    print_paragraph(console, "with", ", ".join(f"{name} {version}" for name, version in report.versions.items()))
    print_paragraph(console, "baseline", report.baseline)
    console.print()
    print_subjects(console, report)
    for setting in report.settings:
        console.print()
        print_setting(console, report, setting)
    console.print()
    for line in bench_notes(report):
        console.print(line, soft_wrap=False)


def print_subjects(console: Console, report: Report) -> None:
    """Sizes on disk and in memory."""
    table = new_table("candidate")
    for title_ in ("file MB", "memory MB"):
        table.add_column(title_, justify="right", no_wrap=True)
    for name, subject in report.subjects.items():
        memory = "-" if subject.memory_bytes is None else show_digits(subject.memory_bytes / 1e6)
        table.add_row(name, show_digits(subject.file_bytes / 1e6), memory)
    console.print(table)


def print_setting(console: Console, report: Report, setting: Setting) -> None:
    """One size: a row for each candidate."""
    from sqat.bench.measuring import size_text

    table = new_table(size_text(setting.batch, setting.sequence))
    for title_ in ("p50 ms", "+-%", "p95 ms", "rows/s", "speed-up", "difference"):
        table.add_column(title_, justify="right", no_wrap=True)
    for name, timing in setting.rows.items():
        p50 = timing.p50_ms
        cells = (show_digits(p50.median), f"{100 * p50.half_width:.1f}", show_digits(timing.p95_ms))
        table.add_row(name, *cells, show_digits(timing.rows_per_second), speedup(timing), difference(timing.parity))
    console.print(table)
    goal = f"{100 * report.within:g} %"
    end = f"all ratios within {goal}" if setting.reached else f"time limit, not all ratios within {goal}"
    console.print(f"{setting.rounds} rounds; {end}")


def speedup(timing: Timing) -> str:
    """``1.37 (1.35-1.39)``."""
    ratio = timing.speedup
    if ratio is None:
        return "baseline"
    form = ".2f" if ratio.median >= 0.1 else ".1g"
    return f"{ratio.median:{form}} ({ratio.low:{form}}-{ratio.high:{form}})"


def difference(parity: Parity | None) -> str:
    """The largest difference of outputs, marked where decisions differ."""
    if parity is None:
        return "-"
    return "?" if parity.problem else f"{parity.largest:.1e}{' !' if parity.differing else ''}"


def show_digits(value: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def bench_notes(report: Report) -> Iterable[str]:
    """What the figures mean, and what is to be said of some of them."""
    yield "p50 and speed-up: medians, with 95 % bootstrap intervals over the rounds."
    yield "difference: largest of the outputs from the baseline's, same random inputs (of"
    yield "which decisions are closer calls than of real ones; sqat evaluate takes those)."
    yield "memory: growth of a process of its own, at the largest size."
    for setting in report.settings:
        size = f"{setting.batch}x{setting.sequence}" if setting.sequence else str(setting.batch)
        for name, timing in setting.rows.items():
            if timing.parity is not None and timing.parity.differing:
                yield f"! {size} {name}: {timing.parity.differing} of {timing.parity.rows} decisions differ"
            if timing.parity is not None and timing.parity.problem:
                yield f"? {size} {name}: not compared, {timing.parity.problem}"
    if any(subject.backend == "torch" for subject in report.subjects.values()):
        yield "torch computes int8 layers in float, rounded: a reference, not their speed."
    reasons: dict[str, list[str]] = {}
    for name, reason in report.left_out.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        yield f"left out: {', '.join(names)}: {reason}"
    for name, reason in report.no_memory.items():
        yield f"memory of {name} was not measured: {reason}"
    if report.load and max(report.load) > report.cores:
        yield f"load {max(report.load):.1f} on {report.cores} cores: other work slowed these calls, the ratios less."


def print_sensitivity(findings: Findings) -> None:
    """What `sqat analyze` found: a row a layer, all of them together, and what keeps within the budget."""
    console = result_console()
    stages = [f"{name} ({kind})" for kind, name in (("prune", findings.prune), ("int8", findings.calibrate)) if name]
    print_paragraph(console, "model", nearby(Path(findings.checkpoint)))
    print_paragraph(console, "as in", ", ".join(stages))
    figures = ", ".join(f"{name} {value:.4g}" for name, value in findings.plain.items())
    print_paragraph(console, "plain", f"{figures} ({findings.rows} rows of {findings.split})")
    print_paragraph(console, "damage", damage_text(findings.damage))
    console.print()
    prefix = common_prefix([layer.name for layer in findings.layers])
    table = new_table("layer alone")
    for title_ in ("N:M", "weights", "pruned", "int8", "both"):
        table.add_column(title_, justify="right", no_wrap=True)
    for layer in findings.layers:
        cells = (layer.pattern or "-", percent(layer.weights), *harm_cells(layer.damage))
        table.add_row(shorten(layer.name, prefix), *cells)
    table.add_section()
    table.add_row("sum of the layers", "", "", *harm_cells(findings.summed))
    table.add_row("all layers together", "", "", *harm_cells(findings.together))
    console.print(table)
    if prefix:
        console.print(f"~ is {prefix}")
    console.print()
    print_paragraph(console, "treated", treated_text(findings.sparse, findings.int8))
    if findings.choice is not None:
        print_choice(console, findings.choice)
    console.print()
    for note in findings.notes:
        print_paragraph(console, "note", note)


def print_choice(console: Console, choice: Choice) -> None:
    """What to leave dense and float, and the sections of the recipe that say so."""
    predicted, measured = show_damage(choice.predicted), show_damage(choice.measured)
    left = f"{len(choice.dense)} layers left dense, {len(choice.float_layers)} float"
    damage = f"damage {measured} measured, {predicted} by the sum"
    print_paragraph(console, "budget", f"{choice.budget:g}: {left}; {damage}")
    print_paragraph(console, "kept", treated_text(choice.sparse, choice.int8))
    for stage, section in choice.recipe.items():
        console.print(f"# stages.{stage}" + ("" if section else ": no layer is left for it, take the stage out"))
        if section:
            console.print(section, soft_wrap=True)


def treated_text(sparse: Shares, int8: Shares) -> str:
    """Which shares are sparse and int8."""
    weights = f"{percent(sparse.weights)} sparse, {percent(int8.weights)} int8"
    work = f"{percent(sparse.multiply_adds)} sparse, {percent(int8.multiply_adds)} int8"
    return f"of the weights {weights}; of the multiply-adds {work}"


def damage_text(damage: str) -> str:
    """What the figures of an analysis are."""
    if damage != "output loss":
        return f"{damage} of the plain model minus that of the treated one"
    return "output loss between treated and plain model: KL, squared difference or 1 - cosine, as the task has it"


def harm_cells(harm: Harm) -> tuple[str, str, str]:
    """Damage of the three treatments."""
    return show_damage(harm.pruned), show_damage(harm.int8), show_damage(harm.both)


def show_damage(value: float | None) -> str:
    """Three digits; ``-`` where there is no such treatment."""
    return "-" if value is None else f"{value:.3g}"


def percent(share: float) -> str:
    """A share as ``12.3 %``."""
    return f"{100 * share:.1f} %"
