"""The quickstart's table and picture come from the JSON of its run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from scripts.docs import quickstart  # noqa: E402
from sqat.bench.intervals import Interval  # noqa: E402
from sqat.bench.report import Report, Setting, Timing  # noqa: E402


def row(label: str, ndcg: float, ms: float, low: float | None = None) -> dict[str, Any]:
    difference = None if low is None else {"value": ndcg - 0.7, "low": low, "high": 0.01}
    return {
        "label": label,
        "metrics": {"ndcg@10": ndcg},
        "difference": difference,
        "latency": {"ms": ms, "engine": "sqat"},
        "size_bytes": 21_500_000,
    }


ROWS = [row("dense fp32", 0.7, 300), row(quickstart.INT8, 0.71, 120, -0.002), row("sparse int8", 0.69, 60, -0.02)]


@pytest.fixture
def report() -> Report:
    timing = Timing(p50_ms=Interval(median=1, low=1, high=1), p95_ms=1, calls=1, rows_per_second=1, speedup=None,
                    parity=None)  # fmt: skip
    setting = Setting(batch=32, sequence=48, rounds=6, reached=True, rows={"dense": timing})
    return Report(cpu="Some CPU", cores=2, threads=1, load=[], versions={}, baseline="dense", within=0.02, subjects={},
                  left_out={}, settings=[setting])  # fmt: skip


def test_the_table_compares_with_dense_int8(report: Report) -> None:
    entry = quickstart.entry(ROWS, report, 8.0)
    assert entry["rows"][0][2] == ""
    assert entry["rows"][2] == [
        "sparse int8",
        "0.6900",
        "-0.0100 [-0.0200, +0.0100]",
        "60.0",
        "sqat.runtime",
        "2.00",
        "21.5",
    ]
    assert "8 minutes" in entry["note"]
    assert "first 32 passages of the test, 48 tokens" in entry["note"]


def test_the_picture_names_every_result(report: Report, tmp_path: Path) -> None:
    for name in ("one.svg", "two.svg"):
        quickstart.draw(ROWS, report, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    text = (tmp_path / "one.svg").read_text()
    assert all(each["label"] in text for each in ROWS)
