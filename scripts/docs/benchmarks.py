"""Write recipes/BENCHMARKS.md and the tables of the README from the JSON files in recipes/.

python -m scripts.docs.benchmarks
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scripts.benchmarks import runtime
from scripts.benchmarks.beside_modelopt import rows as modelopt_rows
from scripts.benchmarks.beside_modelopt import table as modelopt
from scripts.benchmarks.training_rows import Report, read_report
from scripts.benchmarks.training_rows import table as training_table
from scripts.docs.blocks import replace_block, table
from scripts.results.applications import DENSE, display_of, title
from scripts.results.page import show_figure
from scripts.results.schema import Application, ResultsFile, read
from scripts.results.spread import mean_and_spread, values_of
from scripts.results.verdicts import judged_row, verdicts

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
BENCHMARKS, RESULTS = "[BENCHMARKS](recipes/BENCHMARKS.md)", "[RESULTS](recipes/RESULTS.md)"
PAGE, README = RECIPES / "BENCHMARKS.md", ROOT / "README.md"
INTRODUCTION = """# Benchmarks

Written by `python -m scripts.docs.benchmarks` from [runtime.json](runtime.json),
[runtime-vnni.json](runtime-vnni.json), [training.json](training.json),
[modelopt.json](modelopt.json), [fuzz.json](fuzz.json) and [measurements.json](measurements.json)."""
RUNTIME = """## Latency on a CPU

![speed of each engine; ONNX Runtime's int8 is 1](runtime.svg)

Milliseconds a call: medians, all engines in one process in turn, on an idle AMD EPYC (Zen 3, AVX2, no VNNI; ONNX
Runtime 1.32, OpenVINO 2026.4). Width 384 is all-MiniLM-L6-v2, width 768 has BERT-base's size and random weights; 2:4 in
each linear. `sqat-dense` is the same file with 2:4 weights expanded: the last column is what sparsity gives.
Without VNNI the default int8 kernels of OpenVINO and ONNX Runtime saturate; those of sqat are exact.

```sh
scripts/benchmarks/runtime --float model.fp32.onnx --int8 model.int8.onnx --sparse model.cpu-sparse.onnx --rounds 3 \\
  --seconds 0.2 --json rows.json
scripts/benchmarks/runtime --table recipes/runtime.json --chart recipes/runtime.svg
```
"""
VNNI = """### AVX512-VNNI

The same on an AMD EPYC with AVX512-VNNI, 2 cores, with the files of the quickstart (width 384, 2:4 in each linear;
OpenVINO 2026.4). Inputs are whole rows of tokens: what `sqat.runtime` saves on padding is not in these figures.

```sh
scripts/benchmarks/runtime --float model.fp32.onnx --int8 model.int8.onnx --sparse model.cpu-sparse.onnx --rounds 3 \\
  --seconds 0.2 --json recipes/runtime-vnni.json
```
"""
TRAINING = """## Cost of training

all-MiniLM-L6-v2 as a cross-encoder, 16 texts of 64 tokens in float32, one core of an Intel Xeon. Each candidate has one
turn in each of {rounds} rounds. With one thread, masks, fake quantization and histograms are single passes of
`sqat.runtime.kernels`; with more they are torch's operators, with the same bits.

```sh
scripts/benchmarks/training --json recipes/training.json
scripts/benchmarks/training --table recipes/training.json
```
"""
FUZZ = """## Hostile inputs

Recipes, manifests, data files, run folders, ONNX files, build logs and folders of models, each made by a generator that
knows the format (seed {seed}). Wrong is any of: no answer within 10 seconds of the processor, exit code 1, a traceback,
a raw control character, a file written outside. Seconds of the clock, one process on a shared core of an {cpu}.

```sh
scripts/faults/fuzz --inputs 20000 --json recipes/fuzz.json
```
"""


def main() -> None:
    PAGE.write_text(benchmarks_page(), encoding="utf-8")
    README.write_text(readme_page(README.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE, README, sep="\n")


def benchmarks_page() -> str:
    """Return the whole page."""
    report = read_report(RECIPES / "training.json")
    other = modelopt.render(modelopt_rows.read(RECIPES / "modelopt.json")).replace("\n## ", "\n### ")
    parts = [
        INTRODUCTION,
        RUNTIME,
        runtime.table(runtime.read_rows(RECIPES / "runtime.json")),
        VNNI,
        runtime.table(runtime.read_rows(RECIPES / "runtime-vnni.json")),
        TRAINING.format(rounds=report.rounds),
        training_table(report),
        "#" + other.strip(),
        fuzz_section(json.loads((RECIPES / "fuzz.json").read_text(encoding="utf-8"))),
        *(section(entry) for name, entry in measurements().items() if name != "quickstart"),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def measurements() -> dict[str, dict[str, Any]]:
    """Read the measurements that have no script of their own that writes JSON."""
    found: dict[str, dict[str, Any]] = json.loads((RECIPES / "measurements.json").read_text(encoding="utf-8"))
    return found


def section(entry: dict[str, Any]) -> str:
    """Return one measurement with its command."""
    shown = table(entry["head"], entry["rows"])
    return f"## {entry['title']}\n\n{entry['note']}\n\n```sh\n{entry['command']}\n```\n\n{shown}"


def fuzz_section(report: dict[str, Any]) -> str:
    """Return the outcomes of the hostile inputs."""
    rows = [
        [kind, *(str(counts[name]) for name in ("accepted", "refused", "wrong")), f"{counts['seconds']:.0f}",
         counts["commit"]]
        for kind, counts in report["kinds"].items()
    ]  # fmt: skip
    rows.append(["all", *(str(sum(int(row[column]) for row in rows)) for column in range(1, 5)), ""])
    shown = table(["kind of input", "accepted", "refused in one line", "wrong", "seconds", "commit"], rows)
    wrong = "".join(
        f"\n- Wrong: {each['kind']} {each['number']}, {each['outcome']}"
        f"{'; mended in ' + each['mended'] if 'mended' in each else ''}"
        for each in report["wrong"]
    )
    return f"{FUZZ.format(cpu=report['cpu'], seed=report['seed'])}\n{shown}\n{wrong}"


def readme_page(page: str) -> str:
    """Return the README with today's tables."""
    results = read(ResultsFile, RECIPES / "results.json")
    assert results is not None
    quickstart = measurements()["quickstart"]
    note = quickstart["note"].replace(". ", ".\n")
    page = replace_block(page, "quickstart", f"{table(quickstart['head'], quickstart['rows'])}\n\n{note}\n")
    page = replace_block(page, "claims", claims(results) + "\n")
    return replace_block(page, "results", result_rows(results) + "\n")


def claims(results: ResultsFile) -> str:
    """Return the questions that a user asks first, with what was measured."""
    report = read_report(RECIPES / "training.json")
    outcomes = [each for name, app in results.applications.items() for each in verdicts(display_of(name), app)]
    near = sum("within" in each.outcome for each in outcomes)
    met = sum(each.outcome == "met" for each in outcomes)
    rows = [
        ["faster on AVX512-VNNI?", f"{speed_range('runtime-vnni.json')} times the best of ONNX Runtime, OpenVINO",
         BENCHMARKS],
        ["faster on AVX2?", f"{speed_range('runtime.json')} times the best of ONNX Runtime, OpenVINO", BENCHMARKS],
        ["faster on AMX (Xeon)?", f"{amx_range(results)} times ONNX Runtime, {amx_openvino()} times OpenVINO",
         BENCHMARKS],
        ["as good as dense?", f"{met} of {len(outcomes)} goals met, {near} missed within the spread, "
         f"{len(outcomes) - met - near} missed",
         RESULTS],
        ["better than Model Optimizer?", f"{modelopt_range()} points at equal steps and data", BENCHMARKS],
        ["what does a QAT step cost?", f"{ratio(report, 'QAT step')} a dense step, "
         f"{ratio(report, 'QAT step with MiniLM v2')} with MiniLM", BENCHMARKS],
        ["faster on a GPU?", "not measured: sqat is developed without one", "[Limits](#limits)"],
    ]  # fmt: skip
    return table(["2:4 and int8", "measured", "in"], rows)


def speed_range(name: str) -> str:
    """Return the range of speed-ups of sqat-sparse against the best other engine, of a file of rows."""
    factors = []
    for medians in runtime.medians_of(runtime.read_rows(RECIPES / name)).values():
        others = [time for name, time in medians.items() if not name.startswith("sqat-")]
        factors.append(min(others) / medians["sqat-sparse"])
    return f"{min(factors):.2f} to {max(factors):.2f}"


def amx_range(results: ResultsFile) -> str:
    """Return the range of speed-ups of the sparse files against dense int8, as the results pages measured them."""
    ratios = [
        timing.cpu_against["dense int8"].median
        for application in results.applications.values()
        if application.latency is not None and application.latency.skipping and "Xeon" in application.latency.cpu
        for setting in application.latency.settings
        for label, timing in setting.rows.items()
        if label in application.latency.skipping
    ]
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def amx_openvino() -> str:
    """Return how fast sqat.runtime is where OpenVINO uses AMX; OpenVINO is 1."""
    times = {name: float(time) for name, time in measurements()["amx"]["rows"]}
    return f"{times['OpenVINO int8'] / times['sqat.runtime']:.2f}"


def modelopt_range() -> str:
    """Return the range of mean differences to Model Optimizer's chains, in points."""
    record = modelopt_rows.read(RECIPES / "modelopt.json")
    means = []
    for name, metric in modelopt_rows.METRICS.items():
        ours = modelopt.figures(record, name, modelopt.OURS, metric)
        for chain in modelopt_rows.CHAINS[1:]:
            theirs = modelopt.figures(record, name, chain, metric)
            points = [100 * (ours[seed] - theirs[seed]) for seed in ours.keys() & theirs.keys()]
            means.append(mean_and_spread(points)[0])
    return f"{min(means):+.1f} to {max(means):+.1f}"


def ratio(report: Report, name: str) -> str:
    """Return how many times as long a step takes."""
    return f"{next(row.ratio for row in report.rows if row.name == name):.2f} times"


def result_rows(results: ResultsFile) -> str:
    """Return one row for each application: its first metric, dense and sparse."""
    rows = [result_row(name, application) for name, application in results.applications.items()]
    return table(["recipe", "metric, seeds", "dense fp32", "dense int8 or fp16", "sparse, int8 or fp16"], rows)


def result_row(name: str, application: Application) -> list[str]:
    """Return the cells of one application."""
    display, count = display_of(name), len(application.seeds)
    metric, last = display.metrics[0], judged_row(display, application)
    labels = (DENSE, display.rows[1], last)
    cells = [show_figure(list(values_of(application.seeds, label, metric).values()), metric, count) for label in labels]
    return [f"[{name}](recipes/{name}.yaml)", f"{title(metric)}, {count}", *cells]


if __name__ == "__main__":
    main()
