"""Render `recipes/RESULTS.md` from `schema.ResultsFile` and the log of tries.

A row or metric that no run has is a dash and a line under "Missing".
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from scripts.results.applications import APPLICATIONS, DENSE, RATIOS, Display, display_of, title
from scripts.results.schema import Application, Latency, Pictures, ResultsFile, Setting, Timing, Try
from scripts.results.spread import mean_and_spread, outside_spread, values_of
from scripts.results.verdicts import Verdict, gains, show_difference, verdicts

DASH = "-"


def render(results: ResultsFile, tries: Sequence[Try]) -> str:
    """The whole page."""
    names = [*APPLICATIONS, *(name for name in results.applications if name not in APPLICATIONS)]
    parts = [INTRODUCTION]
    parts += summary(results.applications)
    for name in names:
        if name in results.applications:
            parts += section(display_of(name), results.applications[name])
    parts += list_missing([name for name in APPLICATIONS if name not in results.applications])
    parts += log_of(tries, names)
    return "\n\n".join(parts) + "\n"


def summary(applications: Mapping[str, Application]) -> list[str]:
    """Every goal in one table."""
    rows = []
    for name, application in applications.items():
        display = display_of(name)
        rows += [[display.title, each.goal, show(each), each.outcome] for each in verdicts(display, application)]
    return [table(["application", "goal", "difference over seeds", "outcome"], rows)] if rows else []


def show(verdict: Verdict) -> str:
    """The difference of a verdict, or a dash."""
    return show_difference(verdict) if verdict.values else DASH


def section(display: Display, application: Application) -> list[str]:
    """One application."""
    parts = [f"## {display.title}", application.about] if application.about else [f"## {display.title}"]
    parts += verdict_lines(display, application)
    parts.append(result_table(display, application))
    if application.latency is not None:
        parts.append(latency_note(application.latency))
    if application.pictures is not None:
        parts += show_pictures(application.pictures)
    parts += ["```sh\n" + "\n".join(application.commands) + "\n```", provenance(application)]
    if application.missing:
        parts.append("Missing:\n\n" + bullets(application.missing))
    return parts


def verdict_lines(display: Display, application: Application) -> list[str]:
    """What the table says about the goals, in words."""
    lines = [f"{each.row}, {each.goal}: {show(each)}, **{each.outcome}**" for each in verdicts(display, application)]
    lines += [
        f"{each.row} against {each.against}, {title(each.metric)}: {show(each)}" for each in gains(display, application)
    ]
    return [bullets(lines)] if lines else []


def result_table(display: Display, application: Application) -> str:
    """Rows by metrics, size and latency; the best of a metric is bold where it is outside the spread."""
    labels, metrics = choose_columns(display, application)
    count = len(application.seeds)
    head = [f"{count} seed{'s' if count != 1 else ''}, {application.split}", *map(title, metrics)]
    columns = [quality(application, labels, metric) for metric in metrics]
    columns.append([size(application, label, packed=False) for label in labels])
    columns.append([size(application, label, packed=True) for label in labels])
    head += ["MB", "MB, 2:4 packed"]
    for setting in application.latency.settings if application.latency else ():
        titles, cells = latency_columns(setting, labels)
        head += titles
        columns += cells
    return table(head, [[label, *cells] for label, *cells in zip(labels, *columns, strict=True)])


def choose_columns(display: Display, application: Application) -> tuple[list[str], list[str]]:
    """Rows and metrics to show: those of the application; rows that it does not know come last."""
    rows = [(label, row) for seed in application.seeds.values() for label, row in seed.rows.items()]
    labels = dict.fromkeys([*display.rows, *application.labels, *(label for label, _ in rows)])
    every = dict.fromkeys(metric for _, row in rows for metric in row.metrics)
    return list(labels), list(display.metrics or every)


def quality(application: Application, labels: Sequence[str], metric: str) -> list[str]:
    """One metric of all rows."""
    rows = [list(values_of(application.seeds, label, metric).values()) for label in labels]
    best = outside_spread(rows)
    cells = [show_figure(values, metric, len(application.seeds)) for values in rows]
    return [f"**{cell}**" if index == best else cell for index, cell in enumerate(cells)]


def show_figure(values: Sequence[float], metric: str, seeds: int) -> str:
    """``0.779 ± 0.004``, with the number of seeds where a row has not all of them."""
    if not values:
        return DASH
    mean, spread = mean_and_spread(values)
    digits = 2 if metric in RATIOS else 3
    text = "∞" if math.isinf(mean) else f"{mean:.{digits}f}"
    text += "" if spread is None else f" ± {spread:.{digits}f}"
    return text if len(values) == seeds else f"{text} ({len(values)} of {seeds})"


def size(application: Application, label: str, *, packed: bool) -> str:
    """Megabytes of a row's file, mean over the seeds."""
    rows = [seed.rows[label] for seed in application.seeds.values() if label in seed.rows]
    sizes = [found for row in rows if (found := row.packed_bytes if packed else row.size_bytes) is not None]
    megabytes = sum(sizes) / len(sizes) / 1e6 if sizes else 0.0
    return f"{megabytes:.1f}" if megabytes >= 1 else f"{megabytes:.3f}" if sizes else DASH


def latency_columns(setting: Setting, labels: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Time of a call and the two ratios, for one size of input."""
    shape = f"{setting.batch}" if setting.sequence is None else f"{setting.batch} x {setting.sequence}"
    baselines = list(dict.fromkeys(name for timing in setting.rows.values() for name in timing.cpu_against))
    timings = [setting.rows.get(label) for label in labels]
    cells = [[DASH if timing is None else f"{timing.cpu_ms:.1f}" for timing in timings]]
    cells += [[show_ratio(timing, baseline) for timing in timings] for baseline in baselines]
    return [f"ms, {shape}", *(f"speed, {baseline} = 1" for baseline in baselines)], cells


def show_ratio(timing: Timing | None, baseline: str) -> str:
    """``1.83 (1.80 to 1.87)``."""
    ratio = None if timing is None else timing.cpu_against.get(baseline)
    if ratio is None:
        return DASH
    return f"{ratio.median:.2f}" + ("" if ratio.low == ratio.high else f" ({ratio.low:.2f} to {ratio.high:.2f})")


def latency_note(latency: Latency) -> str:
    """How the latency of a table was measured, and what no CPU shows."""
    rounds = " and ".join(str(setting.rounds) for setting in latency.settings)
    left = "".join(f" Not timed: {label} ({reason})." for label, reason in latency.left_out.items())
    note = NO_SPARSE_KERNEL if any(DENSE in setting.rows for setting in latency.settings) else ""
    note = SPARSE_KERNELS.format(rows=", ".join(latency.skipping)) if latency.skipping else note
    return (
        f"Time of one call, seed {latency.seed}: {rounds} rounds over all files in turn, {latency.threads} thread, "
        f"ONNX Runtime {latency.versions.get('onnxruntime', '')}, {latency.cpu}, load {latency.load:.1f}. {note}{left}"
    )


def show_pictures(pictures: Pictures) -> list[str]:
    """The grid, and its figures by the part of the data (``part: name``) they are of."""
    split = [(part, name, value) for key, value in pictures.figures.items() for part, _, name in [key.rpartition(": ")]]
    parts, names = list(dict.fromkeys(part for part, _, _ in split)), dict.fromkeys(name for _, name, _ in split)
    formatted = {(part, name): f"{value:.3g}" for part, name, value in split}
    rows = [[name, *(formatted.get((part, name), DASH) for part in parts)] for name in names]
    grid = f"![the same captions and noise, the first row of the table above, the last below]({pictures.file})"
    return [grid, table(["pictures", *parts], rows)]


def provenance(application: Application) -> str:
    """Wall time, data, versions and commits, one line each."""
    seeds = application.seeds
    lines = [f"Start: `{application.model}`."]
    if seeds:
        totals = [sum(stage.seconds for stage in seed.stages.values()) for seed in seeds.values()]
        stages = dict.fromkeys(name for seed in seeds.values() for name in seed.stages)
        times = {name: [seed.stages[name].seconds for seed in seeds.values() if name in seed.stages] for name in stages}
        parts = ", ".join(f"{name} {minutes(seconds)}" for name, seconds in times.items())
        threads = ", ".join(str(count) for count in dict.fromkeys(seed.threads for seed in seeds.values()) if count)
        some = "".join(f", {cpu}" for cpu in dict.fromkeys(seed.cpu for seed in seeds.values()) if cpu)
        some += f", threads: {threads}" if threads else ""
        lines.append(f"Wall time of a seed{some}: {minutes(totals)} min ({parts}).")
    for name, file in application.data.items():
        some = f", first {file.limit}" if file.limit is not None else ""
        lines.append(f"Data, {name}: `{file.file}`, sha256 `{file.sha256[:12]}`{some}.")
    lines += [f"Versions: {text}." for text in versions_of(seed.versions for seed in seeds.values())]
    commits = dict.fromkeys(seed.commit for seed in seeds.values() if seed.commit)
    if commits:
        lines.append(f"Commit: {', '.join(commits)}{' (+: with changes)' if any('+' in c for c in commits) else ''}.")
    return bullets(lines)


def minutes(seconds: Sequence[float]) -> str:
    """Mean of some times in minutes."""
    return f"{sum(seconds) / len(seconds) / 60:.1f}"


def versions_of(versions: Iterator[dict[str, str]] | Sequence[dict[str, str]]) -> list[str]:
    """One text for each set of versions, with how many seeds had it where there are several."""
    counts = Counter(", ".join(f"{name} {version}" for name, version in sorted(each.items())) for each in versions)
    return [text if len(counts) == 1 else f"{text} ({count} seeds)" for text, count in counts.items() if text]


def list_missing(names: Sequence[str]) -> list[str]:
    """Applications that no run is there of."""
    lines = [f"{APPLICATIONS[name].title} (`recipes/{name}.yaml`): no run yet" for name in names]
    return ["## Missing", bullets(lines)] if lines else []


def log_of(tries: Sequence[Try], names: Sequence[str]) -> list[str]:
    """What was tried, by recipe in the order of the page, each in the order of the log."""
    if not tries:
        return ["## What was tried", "Nothing is logged yet."]
    parts = ["## What was tried", LOG]
    for name in dict.fromkeys([*names, *(each.recipe for each in tries)]):
        entries = [each for each in tries if each.recipe == name]
        if entries:
            head = ["changed", "stage", "seed", *(metrics := tried_metrics(name, entries)), "min", "verdict"]
            rows = [tried_row(each, metrics) for each in entries]
            parts += [f"### {display_of(name).title}", table([title(cell) for cell in head], rows)]
    return parts


def tried_metrics(name: str, entries: Sequence[Try]) -> list[str]:
    """Columns of a log's figures."""
    return list(dict.fromkeys([metric for metric in display_of(name).metrics
                               if any(metric in each.figures for each in entries)]
                              + [metric for each in entries for metric in each.figures]))  # fmt: skip


def tried_row(entry: Try, metrics: Sequence[str]) -> list[str]:
    """One try as a row."""
    changed = ", ".join(f"`{key}: {json.dumps(value)}`" for key, value in entry.changed.items()) or "nothing"
    figures = [show_figure([entry.figures[m]], m, 1) if m in entry.figures else DASH for m in metrics]
    return [changed, entry.stage, str(entry.seed), *figures, minutes([entry.seconds]), entry.verdict]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; what would break it is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


def bullets(lines: Sequence[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {line}" for line in lines)


INTRODUCTION = """# Results

Written by `scripts/results/make page` from [results.json](results.json), which it fills from the runs' own JSON; no
number here is typed.

Quality is mean ± sample standard deviation over seeds. The best of a column is bold only where its mean is above every
other's by more than both spreads. Differences are taken seed by seed; a point is 0.01. *MB, 2:4 packed* is what the
file would be with its 2:4 weights in the form that sparse tensor cores read, by that form's rule. Latency is the median
CPU time of a call on one thread, since other load on the machine makes wall time longer (results.json has both); speed
is the ratio of two such times in one round: median and 95 % bootstrap interval."""
NO_SPARSE_KERNEL = (
    "ONNX Runtime has no sparse kernel for CPUs: a sparse file takes as long as the dense one of its precision, so "
    "these columns show what int8 (or fp16, which a CPU computes in fp32) does here, not what 2:4 does on sparse "
    "tensor cores."
)
SPARSE_KERNELS = (
    "{rows}: by the custom operators of `sqat.runtime`, which skip the zeros and keep attention in int8; all else by "
    "ONNX Runtime's own."
)
LOG = "Figures on dev, from `tried.jsonl`; what did not help is here as well."
