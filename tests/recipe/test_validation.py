"""Wrong keys, types and values: each is an error at its line that names the value or the nearest key."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from tests.recipe.valid_recipe import GOOD, break_once, error_of

# what is replaced, by what, the line of the error, and what its message must hold
CASES = [
    ("learning_rate: 1e-5", "gates: {f1: {}}", 8, "stages.train.gates.f1"),
    ("learning_rate: 1e-5", "gates: {f1: {min: 0.1, against: qat}}", 8, "stages.train.gates.f1"),
    ("learning_rate: 1e-5", "retry: {times: 2}", 8, "stages.train"),
    ("learning_rate: 1e-5", "retry: {steps_multiplier: 1}", 8, "got 1"),
    ("    method: percentile", "    gates: {f1: {max_drop: -1}}", 13, "got -1"),
    ("    method: percentile", "    retry: {}", 13, "'retry'"),
    ("learning_rate: 1e-5", "learning_rat: 1e-5", 8, "'learning_rate'"),
    ("learning_rate: 1e-5", "parent: x", 8, "'parent'"),
    ("1e-5", "yes", 8, "got 'yes'"),
    ("1e-5", "'3'", 8, "got '3'"),
    ("1e-5", "0", 8, "got 0"),
    ("1e-5", "true", 8, "got true"),
    ("1e-5", "", 8, "got nothing"),
    ("1e-5", ".inf", 8, "got .inf, which is not a finite number"),
    ("1e-5", "1e999", 8, "got 1e999, which is not a finite number"),
    ("learning_rate: 1e-5", "batch_size: 2.5", 8, "got 2.5"),
    ("learning_rate: 1e-5", "warmup: 1", 8, "got 1"),
    ("learning_rate: 1e-5", "optimizer: adam", 8, "'adamw'"),
    ("learning_rate: 1e-5", "steps: 3, epochs: 1", 8, "stages.train"),
    ("learning_rate: 1e-5", "early_stopping: 3", 8, "stages.train"),
    ("2:4", "4:2", 10, "stages.prune.pattern"),
    ("2:4", "[2, 4]", 10, "got a list"),
    ("group-fraction", "group-fractions", 11, "'group-fraction'"),
    ("name: group-fraction, ", "", 11, "'name'"),
    ("[0.2, 0.5]", "[0.2, x]", 11, "got 'x'"),
    ("[0.2, 0.5]", "many", 11, "got 'many'"),
    ("[0.2, 0.5]", "[0.5, 0.2]", 11, "got [0.5, 0.2]"),
    ("[0.2, 0.5]}", "3, regrow: yes}", 11, "got 'yes'"),
    ("method: percentile", "method: percentil", 13, "'percentile'"),
    ("method: percentile", "method: {name: percentile, percent: 99}", 13, "'percentile'"),
    ("method: percentile", "method:\n      name: percentile\n      percentile: 101", 15, "got 101.0"),
    ("method: percentile", "method: {name: percentile, percentile: 99, percent: 9}", 13, "'percentile'"),
    ("learning_rate: 1e-5", "keep: best", 8, "'keep_checkpoint'"),
    ("method: percentile", "method: [percentile]", 13, "got a list"),
    ("  prune:\n", "  prunee:\n", 9, "'prune'"),
    ("  prune:\n", "  second:\n    type: prun\n", 10, "'prune'"),
    ("  prune:\n", "  Pruned_1:\n    type: prune\n", 9, "'Pruned_1'"),
    ("task: classification", "task: clasification", 2, "'classification'"),
    ("task: classification", "task: {name: classification, metric: f2}", 2, "'f1'"),
    ("task: classification\n", "", 1, "'task'"),
    ("  dev: dev.jsonl\n", "", 3, "'dev'"),
    ("dev: dev.jsonl", "dev: {path: a, hub: b}", 5, "data.dev"),
    ("dev: dev.jsonl", "dev: {path: a, split: b}", 5, "data.dev"),
    ("dev: dev.jsonl", "dev: 3", 5, "got 3"),
    ("model: {source: tiny}", "model: '3'", 1, "got '3'"),
    ("model: {source: tiny}", "model: tiny", 1, "got 'tiny'"),
    ("{source: tiny}", "{source: tiny, max_length: 9000}", 1, "got 9000"),
    ("{source: tiny}", "{source: tiny, sha256: abc}", 1, "got 'abc'"),
    ("model:", "name: ../up\nmodel:", 1, "got '../up'"),
    ("model:", "seed: -1\nmodel:", 1, "got -1"),
    ("targets: [onnx-int8, onnx-fp32]", "targets: [onnx-int8]\n    batch_range: [4, 2, 8]", 17, "got 4, 2, 8"),
    ("[onnx-int8, onnx-fp32]", "[onnx]", 16, "'onnx-int8'"),
    ("[onnx-int8, onnx-fp32]", "[]", 16, "got an empty list"),
    ("targets: [onnx-int8, onnx-fp32]", "batch_range: 8", 16, "got 8"),
    ("targets: [onnx-int8, onnx-fp32]", "sequence_range: [8, 64]", 16, "got a list"),
    ("targets: [onnx-int8, onnx-fp32]", "sequence_range: [8, 64, long]", 16, "got 'long'"),
    ("ours: export/onnx-int8", "ours: 3", 18, "got 3"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "line", "part"), CASES)
def test_a_wrong_key_type_or_value_is_refused_at_its_line(
    tmp_path: Path, old: str, new: str, line: int, part: str
) -> None:
    error = error_of(tmp_path, break_once(old, new))
    assert (error.place, error.code) == (f"r.yaml:{line}", "invalid-recipe")
    assert part in str(error)
    assert not re.search(
        r"input should|pydantic|validation|https?:|literal|union|\btag\b|dict\b|tuple", str(error).lower()
    )


def test_key_messages_in_full(tmp_path: Path) -> None:
    messages = {
        break_once("dev: dev.jsonl", "dev: {pth: dev.jsonl}"): (
            "r.yaml:5: unknown key 'pth' in data.dev; did you mean 'path'? "
            "allowed: path, hub, config, split, revision, limit, streaming, buffer"
        ),
        break_once("1e-5", "'3'"): (
            "r.yaml:8: stages.train.learning_rate needs a number above 0, got '3'; remove the quotation marks"
        ),
        break_once("task: classification\n", ""): (
            "r.yaml:1: a recipe needs the key 'task'; task: what the model learns; a bare text is its name"
        ),
        break_once("method: percentile", "method: percentil"): (
            "r.yaml:13: stages.calibrate.method: unknown name 'percentil'; did you mean 'percentile'? "
            "allowed: auto, entropy, max, mse, percentile"
        ),
    }
    assert [str(error_of(tmp_path, text)) for text in messages] == [*messages.values()]


def test_the_first_of_several_errors_by_line_is_raised(tmp_path: Path) -> None:
    text = GOOD.replace("source: tiny", "source: 3").replace("1e-5", "-1").replace("percentile", "mean")
    assert str(error_of(tmp_path, text)) == (
        "r.yaml:1: model.source needs a text or null, got 3 (and 2 more); quote it if it is a text"
    )


@pytest.mark.parametrize(("old", "new", "problem"), [
    ("targets: [onnx-int8, onnx-fp32]", f"targets: [{'x, ' * 9000}]", "and 8999 more"),
    ("  qat:\n", "".join(f"  s{number}: {{type: qat}}\n" for number in range(3000)), "stages has 3004 entries"),
])  # fmt: skip
def test_thousands_of_mistakes_take_no_longer(tmp_path: Path, old: str, new: str, problem: str) -> None:
    start = time.process_time()
    assert problem in str(error_of(tmp_path, GOOD.replace(old, new)))
    assert time.process_time() - start < 5
