"""Tables fit 80 columns and say all; JSON is JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sqat.cli import printing
from sqat.cli.tables import layers as layer_tables
from sqat.cli.tables import layout
from sqat.cli.tables import results as result_tables
from sqat.lint.layer_row import LayerRow
from sqat.pipeline.bootstrap import Difference
from sqat.pipeline.plan import PlannedStage
from sqat.pipeline.results import ResultRow, Results

LONG = "a-stage-with-a-very-long-name-indeed"


def results(metrics: dict[str, float], folder: str) -> Results:
    labels = ["dense fp32", "dense int8 (PTQ)", "sparse fp32", "sparse int8 (Sparse-QAT)"]
    rows = [ResultRow(label, "x", metrics, 24_868_376, Path(folder) / label.replace(" ", "-")) for label in labels]
    return Results(rows, "test", "3f4a" * 16, Path("runs/relevance"))


def output_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    lines = capsys.readouterr().out.splitlines()
    assert not any("\x1b" in line for line in lines)
    return lines


def test_a_narrow_table_holds_the_paths(capsys: pytest.CaptureFixture[str]) -> None:
    result_tables.print_results(results({"accuracy": 0.9}, "runs"))
    lines = output_of(capsys)
    assert max(len(line) for line in lines) <= 80
    assert lines[0].split() == ["accuracy", "MB", "path"]
    assert lines[2].split() == ["dense", "fp32", "0.9000", "24.9", "runs/dense-fp32"]


def test_paths_go_below_a_wide_table(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"ndcg@10": 0.7841, "pnr": 4.514, "mrr": 0.771, "accuracy": 0.91}
    result_tables.print_results(results(metrics, "/" + "folder/" * 12))
    lines = output_of(capsys)
    assert lines[0].split() == ["ndcg@10", "pnr", "mrr", "accuracy", "MB"]
    assert lines[5].split() == ["sparse", "int8", "(Sparse-QAT)", "0.7841", "4.514", "0.7710", "0.9100", "24.9"]
    assert max(len(line) for line in lines[:6]) <= 80
    assert lines[7] == "dense fp32: /" + "folder/" * 12 + "dense-fp32", "a path is never broken"


def test_differences_stay_in_a_narrow_table(capsys: pytest.CaptureFixture[str]) -> None:
    table = results({"ndcg@10": 0.7, "pnr": 4.5, "mrr": 0.7, "accuracy": 0.9, "auc": 0.5}, "/" + "folder/" * 12)
    difference = Difference("ndcg@10", "dense fp32", -0.0012, -0.01, 0.0071)
    rows = [table.rows[0], *(replace(row, difference=difference) for row in table.rows[1:])]
    result_tables.print_results(replace(table, rows=rows))
    lines = output_of(capsys)
    assert max(len(line) for line in lines[:6]) <= 80
    assert lines[0].split()[:2] == ["ndcg@10", "pnr"]
    assert lines[2].split()[:3] == ["dense", "fp32", "0.7000"]
    assert "-0.0012 [-0.0100, +0.0071]" in lines[3]
    assert any("ndcg@10 minus that of dense fp32" in line for line in lines)
    unknown = replace(difference, low=float("nan"), high=float("nan"))
    assert result_tables.format_difference(unknown) == "-0.0012", "a split of one row has no interval"
    result_tables.print_results(replace(table, rows=rows), as_json=True)
    found = json.loads(capsys.readouterr().out)["rows"]
    assert [row["difference"] for row in found] == [None, *[vars(difference)] * 3]


def test_counts_have_no_decimals_and_an_empty_table_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    result_tables.print_results(results({"accuracy": 1.0, "pnr": float("inf"), "queries": 237.0}, "runs"))
    assert output_of(capsys)[2].split()[:5] == ["dense", "fp32", "1.0000", "inf", "237"]
    result_tables.print_results(Results([], "test", "3f4a" * 16, Path("runs/relevance")))
    assert output_of(capsys) == ["no results yet in runs/relevance"]


def test_metrics_that_do_not_fit_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {f"metric_number_{number}": 0.5 for number in range(8)}
    result_tables.print_results(results(metrics, "runs"))
    lines = output_of(capsys)
    assert max(len(line) for line in lines[:6]) <= 80
    shown = [name for name in lines[0].split() if name in metrics]
    hidden = " ".join(lines).partition("--json also shows: ")[2].partition(" test split")[0]
    assert shown + [name.strip() for name in hidden.split(",")] == list(metrics)
    assert shown


def test_the_plan_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    plan = [
        PlannedStage(9, LONG, "prune", LONG[::-1], "3f4a" * 4, Path("x"), False, 123_400, 3_840_000, 8000.0),
        PlannedStage(10, "qat", "qat", LONG, "3f4a" * 4, Path("x"), True, 99_999, 999_999, 12.0),
        PlannedStage(11, "export", "export", "qat", "3f4a" * 4, Path("x"), False, None, 128, None),
    ]
    result_tables.print_plan(plan)
    lines = output_of(capsys)
    assert max(len(line) for line in lines) <= 80
    assert lines[2].split()[-6:] == ["3f4a3f4", "123k", "3.84M", "2h13m", "will", "run"]
    assert lines[-1] == "2 of 3 stages will run, time 2h13m, and 1 of unknown time"
    result_tables.print_plan(plan[1:2])
    assert output_of(capsys)[-1] == "nothing to do: every stage is unchanged"


def layers() -> list[LayerRow]:
    parts = [
        ("attention.self.query", (384, 384)),
        ("attention.output.dense", (384, 384)),
        ("output.dense", (384, 1536)),
    ]
    found = [
        LayerRow(f"bert.encoder.layer.{n}.{name}", shape, "2:4", 0.5, (0.00123, 0.0098), 3.4567, 38.23, 0.00012, "")
        for n in (0, 11)
        for name, shape in parts
    ]
    left = "outside the encoder (B8)"
    found.append(LayerRow("bert.pooler.dense", (384, 384), "dense", 0.001, None, None, None, None, left))
    return [*found, LayerRow("classifier", (1, 384), "dense", 0.0, None, None, None, 0.0, left)]


def test_layers_fit_80_columns_with_their_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    layer_tables.print_layers(layers(), Path("x"))
    lines = output_of(capsys)
    assert max(len(line) for line in lines) <= 80
    assert lines[0].split() == ["layer", "shape", "N:M", "zero%", "scale", "amax", "SQNR", "sat.%"]
    names = [line.split()[0] for line in lines[2:10]]
    assert names[:3] == ["~0.attention.output.dense", "~0.attention.self.query", "~0.output.dense"]
    assert names[3:6] == [name.replace("0", "11") for name in names[:3]]
    assert lines[3].split() == ["~0.attention.self.query", "384x384", "2:4", "50.0", "1.2-9.8", "3.46", "38.2", "0.01"]
    assert "a: skipped: outside the encoder (B8) (2 of 8 layers)" in lines
    assert lines[9].split()[:4] == ["classifier", "1x384", "dense", "a"]
    assert "~ is bert.encoder.layer." in lines


def test_a_method_has_a_column_where_calibration_had_a_choice(capsys: pytest.CaptureFixture[str]) -> None:
    rows = layers()
    layer_tables.print_layers([replace(rows[0], method="percentile 99.999"), *rows[1:]], Path("x"))
    header, *lines = output_of(capsys)
    assert [line for line in lines if "percentile 99.999" in line]
    assert max(map(len, [header, *lines])) <= 100
    layer_tables.print_layers(rows, Path("x"))
    assert "amax by" not in "".join(output_of(capsys))


def test_layers_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    layer_tables.print_layers(layers(), Path("x"), as_json=True)
    value = json.loads("\n".join(output_of(capsys)))
    assert value["layers"][1] == {
        "name": "bert.encoder.layer.0.attention.self.query",
        "shape": [384, 384],
        "pattern": "2:4",
        "zeros": 0.5,
        "weight_scale": [0.00123, 0.0098],
        "input_amax": 3.4567,
        "sqnr_db": 38.23,
        "saturated": 0.00012,
        "reason": "",
    }


def test_json_holds_infinities_as_strings(capsys: pytest.CaptureFixture[str]) -> None:
    printing.print_json({"a": float("inf"), "b": [-float("inf"), float("nan")], "c": (1, None, "é")})
    text = capsys.readouterr().out
    value = json.loads(text, parse_constant=lambda name: pytest.fail(f"bare {name}"))
    assert value == {"a": "Infinity", "b": ["-Infinity", "NaN"], "c": [1, None, "é"]}
    assert float(value["a"]) == float("inf")


def test_counts_and_shares_fit_their_columns() -> None:
    assert [layout.format_count(count) for count in (None, 0, 99_999, 123_400, 999_999, 3_840_000)] == [
        "-", "0", "99,999", "123k", "1M", "3.84M",
    ]  # fmt: skip
    assert [layer_tables.format_saturation(share) for share in (0, 1e-6, 0.00012, 0.5, 1)] == [
        "0",
        "<0.01",
        "0.01",
        "50.00",
        "100.00",
    ]
