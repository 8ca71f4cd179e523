"""`latency` in a recipe: the closing table says how fast each result is, on rows of the test split."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sqat.bench.report import Report
from sqat.cli.exit_codes import main
from tests.tiny import Project, write_project

OVERRIDES = (
    "latency={batch_size: 3, max_seconds: 0.2}",
    "results={dense: train, int8: export}",
)


def run(project: Project, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    settings = [part for override in (*OVERRIDES, *more) for part in ("--set", override)]
    assert main(["run", str(project.recipe), "--quiet", *settings]) == 0
    return capsys.readouterr().out


def test_results_are_timed_on_rows_of_the_test_split(copy: Project, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(copy, capsys)
    place = copy.folder / "runs" / "tiny" / "bench.json"
    report = Report.model_validate_json(place.read_bytes())
    (setting,) = report.settings
    assert setting.batch == 3
    assert setting.sequence is not None
    assert {name.partition("@")[0] for name in setting.rows} == {"dense", "int8"}
    assert " ms " in text.splitlines()[0]
    assert "1.00x" in text
    before = place.stat().st_mtime_ns
    assert main(["run", str(copy.recipe), "--quiet", "--json", "--set", OVERRIDES[0], "--set", OVERRIDES[1]]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert place.stat().st_mtime_ns == before, "nothing has changed: nothing is timed again"
    assert rows[0]["latency"]["engine"] == "torch"
    fastest = min(timing.p50_ms.median for name, timing in setting.rows.items() if name.startswith("int8@"))
    assert rows[1]["latency"]["ms"] == fastest
    run(copy, capsys, "latency.batch_size=2")
    assert Report.model_validate_json(place.read_bytes()).settings[0].batch == 2
    assert "1.00x" in run(copy, capsys, "latency.batch_size=2", "results={float: train, int8: export}")
    report = Report.model_validate_json(place.read_bytes())
    assert "float@torch" in report.subjects, "the label of a row is another one"
    place.write_text(report.model_copy(update={"threads": 2}).model_dump_json())
    run(copy, capsys, "latency.batch_size=2", "results={float: train, int8: export}")
    assert Report.model_validate_json(place.read_bytes()).threads == 1


def test_more_threads_than_cores_are_refused_before_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project = write_project(tmp_path)
    assert main(["run", str(project.recipe), "--set", "latency={threads: 10000}"]) == 2
    assert "latency.threads: 10000 threads on " in capsys.readouterr().err
    assert not (tmp_path / "runs" / "tiny" / "01-train").exists()


def test_results_are_shown_where_they_cannot_be_timed(
    copy: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sqat.bench.candidates.why_unavailable", lambda backend: "it is not installed")
    settings = [part for override in OVERRIDES for part in ("--set", override)]
    assert main(["run", str(copy.recipe), "--quiet", *settings]) == 2
    told = capsys.readouterr()
    assert "dense" in told.out
    assert "nothing to measure" in told.err


def test_a_result_without_an_engine_is_not_timed_again_and_again(
    copy: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    run(copy, capsys)
    place = copy.folder / "runs" / "tiny" / "bench.json"
    report = Report.model_validate_json(place.read_bytes())
    gone = {name: subject for name, subject in report.subjects.items() if not name.startswith("int8@")}
    left_out = {"int8@sqat": "this installation of sqat has no compiled runtime"}
    place.write_text(report.model_copy(update={"subjects": gone, "left_out": left_out}).model_dump_json())
    before = place.read_bytes()
    assert " - " in next(line for line in run(copy, capsys).splitlines() if line.startswith("int8"))
    assert place.read_bytes() == before


def test_a_file_of_the_user_is_not_replaced(copy: Project, capsys: pytest.CaptureFixture[str]) -> None:
    place = copy.folder / "runs" / "tiny" / "bench.json"
    place.write_text("{}")
    settings = [part for override in OVERRIDES for part in ("--set", override)]
    assert main(["run", str(copy.recipe), "--quiet", *settings]) == 2
    assert place.read_text() == "{}"
