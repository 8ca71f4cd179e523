"""scripts/benchmarks/load: every answer is compared, and a wrong one is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts.benchmarks import load as serve_load
from tests.runtime.nodes import needs_library
from tests.scripts.test_runtime_bench import embed_file

pytestmark = needs_library


def test_a_short_load(tmp_path: Path) -> None:
    file, report = embed_file(tmp_path / "model.onnx", tokens=32), tmp_path / "report.json"
    assert serve_load.main([str(file), "--minutes", "0.02", "--clients", "3", "--json", str(report)]) == 0
    found: dict[str, Any] = json.loads(report.read_text())
    assert found["calls"] > 3
    assert found["differed"] == found["failed"] == 0
    assert 0 < found["memory_early"] <= found["memory_most"]
    assert 0 < found["median_ms"] <= found["p95_ms"]


def test_an_answer_that_differs_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = embed_file(tmp_path / "model.onnx")
    sound = serve_load.requests_of(file)
    wrong = [serve_load.Request(each.feeds, np.nextafter(each.answer, np.float32(9))) for each in sound[:2]]
    monkeypatch.setattr(serve_load, "requests_of", lambda path: [*sound, *wrong])
    assert serve_load.main([str(file), "--minutes", "0.02", "--clients", "2"]) == 1


def test_a_request_that_fails_is_counted_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, report = embed_file(tmp_path / "model.onnx"), tmp_path / "report.json"
    sound = serve_load.requests_of(file)
    monkeypatch.setattr(serve_load, "requests_of", lambda path: [*sound[:2], serve_load.Request({}, sound[0].answer)])
    assert serve_load.main([str(file), "--minutes", "0.02", "--clients", "2", "--json", str(report)]) == 1
    found: dict[str, Any] = json.loads(report.read_text())
    assert found["failed"] > 2
    assert found["calls"] > 2
    assert found["differed"] == 0
    assert "input_ids" in found["failure"]


def test_a_file_that_is_no_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("no model")
    assert serve_load.main([str(tmp_path / "text")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
