"""Write the quickstart's table and picture from its run: recipes/measurements.json and recipes/quickstart.svg.

scripts/quickstart && python -m scripts.docs.quickstart --minutes 7.5 && python -m scripts.docs.benchmarks
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib

from scripts.docs.concepts import FOLDER, GOES, INK, STAYS, TEACHES, new_figure
from sqat.bench.report import Report
from sqat.bench.results import BENCH_FILE
from sqat.hardware.machine import describe_processor

RECIPES = FOLDER.parent
INT8 = "dense int8 (PTQ)"
ENGINES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "sqat": "sqat.runtime"}
HEAD = ["", "NDCG@10", "difference to dense fp32 (95 %)", "ms a batch", "engine", "speed-up over dense int8", "MB"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True, help="of the whole run, after installation")
    minutes = parser.parse_args().minutes
    command = [sys.executable, "-m", "sqat", "run", str(RECIPES / "quickstart.yaml"), "--json", "--quiet"]
    results = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    report = Report.model_validate_json((Path(results["directory"]) / BENCH_FILE).read_bytes())
    page = RECIPES / "measurements.json"
    measurements = json.loads(page.read_text(encoding="utf-8"))
    measurements["quickstart"] = entry(results["rows"], report, minutes)
    page.write_text(json.dumps(measurements, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    draw(results["rows"], report, RECIPES / "quickstart.svg")


def entry(rows: list[dict[str, Any]], report: Report, minutes: float) -> dict[str, Any]:
    """Return the measurement: its table and what it was measured on."""
    reference = next(row["latency"]["ms"] for row in rows if row["label"] == INT8)
    (setting,) = report.settings
    processor = describe_processor()
    vnni = " with AVX512-VNNI" if "avx512_vnni" in processor.features else ""
    machine = f"{processor.cores} cores of an {report.cpu}{vnni}"
    note = (
        f"Seed 0, 600 test queries of 9 passages, {minutes:g} minutes after installation on {machine}. "
        f"A batch has the first {setting.batch} passages of the test, {setting.sequence} tokens each, on one core. "
        "The corpus follows the installed versions; the run prints its digest."
    )
    return {"title": "Quickstart", "command": "scripts/quickstart", "note": note, "head": HEAD,
            "rows": [cells(row, reference) for row in rows]}  # fmt: skip


def cells(row: dict[str, Any], reference: float) -> list[str]:
    """Return the cells of one result; ``reference`` is the milliseconds of dense int8."""
    difference, latency = row["difference"], row["latency"]
    interval = (
        ""
        if difference is None
        else f"{difference['value']:+.4f} [{difference['low']:+.4f}, {difference['high']:+.4f}]"
    )
    return [
        row["label"],
        f"{row['metrics']['ndcg@10']:.4f}",
        interval,
        f"{latency['ms']:.1f}",
        ENGINES[latency["engine"]],
        f"{reference / latency['ms']:.2f}",
        f"{row['size_bytes'] / 1e6:.1f}",
    ]


def draw(rows: list[dict[str, Any]], report: Report, path: Path) -> None:
    """Draw quality over latency, a dot a result; the bar is the interval of its difference to the first one."""
    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "sqat", "font.size": 9, "text.color": INK, "axes.labelcolor": INK}
    figure = new_figure(6, 2.6)
    panel = figure.subplots()
    first = rows[0]["metrics"]["ndcg@10"]
    panel.axhline(first, color=GOES, zorder=0)
    for row in rows:
        ms, quality = row["latency"]["ms"], row["metrics"]["ndcg@10"]
        colour = STAYS if "sparse" in row["label"] else TEACHES
        if (difference := row["difference"]) is not None:
            panel.plot([ms, ms], [first + difference["low"], first + difference["high"]], color=colour, linewidth=1)
        panel.plot(ms, quality, "o", color=colour)
        panel.annotate(row["label"], (ms, quality), xytext=(6, -12), textcoords="offset points")
    panel.set_xlim(0, 1.35 * max(row["latency"]["ms"] for row in rows))
    (setting,) = report.settings
    panel.set_xlabel(f"milliseconds a batch of {setting.batch} passages, one core of {report.cpu}")
    panel.set_ylabel("NDCG@10")
    panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
