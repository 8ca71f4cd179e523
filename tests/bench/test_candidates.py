"""What is measured: names, backends, inputs, and one line for whatever cannot be measured."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sqat.bench import candidates
from sqat.bench.candidates import Candidate, find_candidates, open_all, read_artifact, read_artifacts
from sqat.bench.inputs import Input, Limits, default_tokens, draw_inputs, inputs_of_config, limits_of
from sqat.bench.measure import Grid, all_inputs, all_sizes
from sqat.bench.parity import compare, is_classifier
from sqat.checkpoint.store import Checkpoint, save_checkpoint
from sqat.errors import ErrorCode
from tests.errors import raises_code

from .graphs import VOCABULARY, write_classifier, write_pictures


@pytest.mark.parametrize(("paths", "names"), [
    (["a/model.int8.onnx"], ["int8"]),
    (["a/model.int8.onnx", "a/model.fp32.onnx"], ["int8", "fp32"]),
    (["03-dense/model.int8.onnx", "07-sparse/model.int8.onnx"], ["03-dense/model.int8", "07-sparse/model.int8"]),
])  # fmt: skip
def test_names_are_short_and_different(paths: list[str], names: list[str], tmp_path: Path) -> None:
    for path in paths:
        write_classifier(tmp_path / path)
    assert [each.label for each in read_artifacts([str(tmp_path / path) for path in paths])] == names


def test_a_name_can_be_given(tmp_path: Path) -> None:
    path = write_classifier(tmp_path / "a=b" / "model.onnx")
    assert [each.label for each in read_artifacts([f"mine={path}", str(path)])] == ["mine", "model"]
    assert read_artifacts([str(path)])[0].path == path, "a path with = in it is a path"
    with raises_code("usage"):
        read_artifacts([f"x={path}", f"x={path}"])


@pytest.mark.parametrize(("name", "code"), [
    ("none.onnx", "missing-file"),
    ("text.txt", "unreadable-file"),
    ("broken.onnx", "unreadable-file"),
])  # fmt: skip
def test_what_is_no_artifact_is_an_error(name: str, code: ErrorCode, tmp_path: Path) -> None:
    for file in ("text.txt", "broken.onnx"):
        (tmp_path / file).write_bytes(b"\xff\xff no model")
    with raises_code(code):
        read_artifact("x", tmp_path / name)


def test_inputs_are_those_of_the_file(tmp_path: Path) -> None:
    texts = read_artifact("x", write_classifier(tmp_path / "t" / "m.onnx"))
    assert texts.inputs == tuple(Input(name, (None, None), "int64") for name in ("input_ids", "attention_mask"))
    pictures = read_artifact("x", write_pictures(tmp_path / "p" / "m.onnx"))
    assert pictures.inputs == (Input("pixel_values", (None, 3, 4, 4), "float32"),)


def test_drawn_inputs_are_valid_and_the_same_for_all() -> None:
    wanted = [Input(name, (None, None), "int64") for name in ("input_ids", "token_type_ids", "attention_mask")]
    wanted.append(Input("pixel_values", (None, 3, 2, 2), "float32"))
    feeds = draw_inputs(wanted, Limits(VOCABULARY), 4, 300)
    assert feeds["input_ids"].shape == (4, 300)
    assert 0 <= feeds["input_ids"].min() < feeds["input_ids"].max() < VOCABULARY
    assert feeds["attention_mask"].all()
    assert not feeds["token_type_ids"].any()
    assert feeds["pixel_values"].shape == (4, 3, 2, 2)
    alone = draw_inputs(wanted[:1], Limits(VOCABULARY), 4, 300)
    np.testing.assert_array_equal(alone["input_ids"], feeds["input_ids"])


def test_a_fixed_batch_is_kept() -> None:
    fixed = [Input("input_ids", (1, None), "int64")]
    assert draw_inputs(fixed, Limits(), 1, 3)["input_ids"].shape == (1, 3)
    with raises_code("usage"):
        draw_inputs(fixed, Limits(), 8, 3)


def test_limits_are_what_every_model_keeps() -> None:
    bert = {"vocab_size": 90, "max_position_embeddings": 64}
    roberta = {"vocab_size": 70, "max_position_embeddings": 66, "model_type": "roberta"}
    assert limits_of([bert]) == Limits(90, 64)
    assert limits_of([bert, roberta]) == Limits(70, 62)
    assert limits_of([{}]) == Limits()
    assert (default_tokens(Limits(9, 40)), default_tokens(Limits()), default_tokens(Limits(9, 512))) == (40, 128, 128)


def test_inputs_of_folders() -> None:
    assert [each.name for each in inputs_of_config({"vocab_size": 9}, "x")] == ["input_ids", "attention_mask"]
    assert inputs_of_config({"image_size": 8, "num_channels": 1}, "x")[0].shape == (None, 1, 8, 8)
    with raises_code("unsupported-model"):
        inputs_of_config({}, "x")


def test_settings_are_the_grid() -> None:
    tokens, pictures = [Input("input_ids", (None, None), "int64")], [Input("pixels", (None, 3), "float32")]
    assert all_sizes(tokens, Limits(9, 99), Grid([1, 8], [16, 32])) == [(1, 16), (1, 32), (8, 16), (8, 32)]
    assert all_sizes(tokens, Limits(9, 20), Grid([2])) == [(2, 20)]
    assert all_sizes(pictures, Limits(), Grid([1, 2])) == [(1, None), (2, None)]
    with raises_code("usage"):
        all_sizes(tokens, Limits(9, 20), Grid([1], [16, 21]))
    with raises_code("usage"):
        all_sizes(pictures, Limits(), Grid([1], [16]))


def test_backends_of_each_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = read_artifact("g", write_classifier(tmp_path / "m.onnx"))
    folder = read_artifact("f", tmp_path)
    monkeypatch.setattr(candidates, "why_unavailable", lambda name: "is not here" if name == "tensorrt" else "")
    found, skipped = find_candidates([graph, folder, graph._replace(label="k", needs_kernels=True)], [])
    assert [each.name for each in found] == ["g@onnxruntime", "g@openvino", "f@torch", "k@sqat"]
    assert skipped == {"g@tensorrt": "is not here"}
    assert [each.name for each in find_candidates([graph, folder], ["torch"])[0]] == ["f@torch"]
    with raises_code("missing-hardware"):
        find_candidates([graph], ["torch"])
    with raises_code("unknown-name"):
        find_candidates([graph], ["ort"])
    with raises_code("missing-hardware"):
        find_candidates([graph], ["tensorrt"])


def test_what_does_not_open_is_skipped_unless_required(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, threads: int, stack: ExitStack) -> Any:
        raise RuntimeError("\n  no such operator\nat line 3")

    graph = read_artifact("g", write_classifier(tmp_path / "m.onnx"))
    found = [Candidate(graph, "onnxruntime"), Candidate(graph, "openvino")]
    monkeypatch.setitem(candidates.OPENERS, "openvino", refuse)
    with ExitStack() as stack:
        runs, failed = open_all(found, [], 1, stack)
        assert (list(runs), failed) == (["g@onnxruntime"], {"g@openvino": "openvino cannot open it: no such operator"})
        for needed in ("openvino", "g@openvino"):
            with raises_code("unreadable-file"):
                open_all(found, [needed], 1, stack)
        monkeypatch.setitem(candidates.OPENERS, "onnxruntime", refuse)
        with raises_code("unreadable-file"):
            open_all(found, [], 1, stack)


def test_missing_kernels_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(candidates.runtime, "LIBRARY", tmp_path / "none.so")
    assert candidates.runtime.install_hint() in candidates.why_unavailable("sqat")


def test_a_folder_takes_the_inputs_of_a_file_beside_it(
    tmp_path: Path, make_checkpoint: Callable[..., Checkpoint]
) -> None:
    save_checkpoint(make_checkpoint(), tmp_path / "c")
    found, _ = find_candidates(read_artifacts([str(tmp_path / "c")]), [])
    assert {each.name for each in all_inputs([each.artifact for each in found])[0]} == {"input_ids", "attention_mask"}
    graph = Candidate(read_artifact("g", write_pictures(tmp_path / "p" / "m.onnx")), "onnxruntime")
    assert [each.name for each in all_inputs([each.artifact for each in (*found, graph)])[0]] == ["pixel_values"]


def test_parity() -> None:
    one = np.array([[1.0, 2.0], [4.0, 3.0]], np.float32)
    same = compare(one, one, True)
    assert (same.largest, same.scale, same.rows, same.differing) == (0.0, 4.0, 2, 0)
    other = compare(one, one[:, ::-1], True)
    assert (other.largest, other.differing) == (1.0, 2)
    assert compare(one, one + 1, False).differing is None
    assert compare(one[:, :1], one[:, :1], True).differing is None, "one score is no choice"
    assert compare(one, one * np.nan, True).largest == np.inf
    assert compare(one, one[:1], True).problem == "output [1, 2] against [2, 2]"


@pytest.mark.parametrize(("config", "decides"), [
    ({"architectures": ["BertForSequenceClassification"]}, True),
    ({"architectures": ["BertForSequenceClassification"], "problem_type": "regression"}, False),
    ({"architectures": ["BertModel"]}, False),
    ({}, False),
])  # fmt: skip
def test_classifiers_have_decisions(config: dict[str, Any], decides: bool) -> None:
    assert is_classifier(config) is decides


def test_ctrl_c_after_openvino_was_dropped_elsewhere(tmp_path: Path) -> None:
    """Its plugin's memory for signals, freed by another thread's garbage collection, would end the process."""
    pytest.importorskip("openvino")
    path = write_classifier(tmp_path / "m.onnx")
    code = f"""
import gc, signal, threading
from contextlib import ExitStack
from pathlib import Path
import numpy as np
from sqat.bench.candidates import open_openvino
ones = np.ones((1, 8), np.int64)
kept = [open_openvino(Path({str(path)!r}), 1, ExitStack())]
kept[0]({{"input_ids": ones, "attention_mask": ones}})
thread = threading.Thread(target=lambda: (kept.clear(), gc.collect()))
thread.start()
thread.join()
signal.signal(signal.SIGINT, lambda *_: print("handled"))
signal.raise_signal(signal.SIGINT)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
