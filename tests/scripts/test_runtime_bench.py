"""scripts/benchmarks/runtime: its table and chart, and a wrong file or size is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, save

from scripts.benchmarks.runtime import COLOURS, Row, draw_chart, main, milliseconds, table, turns
from tests.runtime.nodes import needs_library


def embed_file(path: Path, vocabulary: int = 30, tokens: int = 8, width: int = 16) -> Path:
    """The smallest file of target cpu-sparse: embeddings alone."""
    tables = {"word": (vocabulary, width), "position": (tokens, width), "gamma": (width,), "beta": (width,)}
    graph = helper.make_graph(
        [
            helper.make_node(
                "Embed", ["input_ids", "", "", "word", "position", "", "gamma", "beta"], ["Y"], domain="sqat"
            )
        ],
        "embeddings",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in tables.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("sqat", 1)]
    save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def test_the_factors_of_a_table() -> None:
    times = {"a": 30.0, "b": 20.0, "sqat-dense": 8.0, "sqat-sparse": 5.0}
    rows = [Row(1, 2, 16, 384, engine, median, median) for engine, median in times.items()]
    assert table(rows).splitlines()[-1] == "| 384 | 1 | 2 x 16 | 30.0 | 20.0 | 8.00 | 5.00 | 4.00x | 1.60x |"
    assert [milliseconds(value) for value in (0.125, 9.5, 31.25, 758.4)] == ["0.12", "9.50", "31.2", "758"]


def test_the_chart_has_a_bar_for_every_engine_and_point(tmp_path: Path) -> None:
    rows = [
        Row(threads, 2, sequence, width, engine, 40.0 / (number + 1), 50.0)
        for width in (384, 768)
        for threads in (1, 2)
        for sequence in (16, 128)
        for number, engine in enumerate(COLOURS)
    ]
    draw_chart(rows, tmp_path / "chart.svg")
    drawn = (tmp_path / "chart.svg").read_text()
    assert all(drawn.count(f"fill: {colour}") >= 8 for colour in COLOURS.values())
    assert drawn.count("<!-- 1.5 -->") == 8, "six times as fast as the first, the base four times"
    draw_chart(rows, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == drawn


def test_every_engine_comes_first_in_its_turn() -> None:
    names = ["a", "b", "c"]
    assert [turns(names, number)[0] for number in range(4)] == ["a", "b", "c", "a"]
    assert all(sorted(turns(names, number)) == names for number in range(4))


@needs_library
def test_rows_of_a_model_with_few_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, rows = embed_file(tmp_path / "model.onnx"), tmp_path / "rows.json"
    words = ["--sparse", str(file), "--shapes", "1x4,2x8", "--threads", "1", "--rounds", "2", "--seconds", "0"]
    assert main([*words, "--json", str(rows)]) == 0
    found: list[dict[str, Any]] = json.loads(rows.read_text())
    assert [(row["batch"], row["sequence"], row["width"], row["engine"]) for row in found] == [
        (batch, sequence, 16, engine)
        for batch, sequence in ((1, 4), (2, 8))
        for engine in ("sqat-dense", "sqat-sparse")
    ]
    assert all(0 < row["median_ms"] <= row["p95_ms"] for row in found)


@needs_library
def test_what_cannot_be_measured_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, text = str(embed_file(tmp_path / "model.onnx")), str(tmp_path / "text")
    Path(text).write_text("no model")
    cases = {
        ("--sparse", file, "--shapes", "1x9"): "--shapes asks for 9 tokens, and the model has positions for 8",
        ("--sparse", file, "--int8", "nowhere.onnx"): "nowhere.onnx: there is no such file",
        ("--sparse", text): "cannot be read as ONNX; name a file of target cpu-sparse",
        ("--table", text): "holds no rows of this benchmark; name what --json wrote",
    }
    for words, problem in cases.items():
        assert main([*words]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        assert problem in lines[0]
