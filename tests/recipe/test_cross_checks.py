"""Parts of a recipe that do not fit each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipe.valid_recipe import GOOD, break_once, error_of, load

# what is replaced, by what, the line of the error, and what its message must hold
CASES = [
    ("learning_rate: 1e-5", "gates: {acuracy: {min: 0.5}}", 8, "'accuracy'"),
    ("learning_rate: 1e-5", "gates: {f1: {max_drop: 0.1}}", 8, "'train'"),
    ("learning_rate: 1e-5", "gates: {f1: {max_drop: 0.1, against: qat}}", 8, "'qat'"),
    ("[0.2, 0.5]", "[0.2, 0.7]", 11, "got 0.7"),
    ("columns: {text: body}", "columns: {query: q}", 6, "'query'"),
    ("task: classification", "task: relevance", 6, "'text'"),
    ("  calibrate:\n    method: percentile\n", "", 12, "'qat'"),
    ("  train: {learning_rate: 1e-5}\n", "", 13, "'qat'"),
    ("  calibrate:\n    method: percentile\n  qat:\n", "", 13, "'export'"),
    ("[onnx-int8, onnx-fp32]", "[tensorrt, onnx-int8]", 16, "'export'"),
    (GOOD[GOOD.index("  prune:") : GOOD.index("results:")], "  export: {targets: [torch-semi-structured]}\n",
     9, "'export'"),
    ("  qat:\n", "  again: {type: train}\n  qat:\n", 14, "'calibrate'"),
    ("  qat:\n", "  qat:\n    from: export\n", 15, "'export'"),
    ("  qat:\n", "  qat:\n    from: calibrat\n", 15, "'calibrate'"),
    ("results:", "  again:\n    type: train\n    from: export\nresults:", 19, "'export'"),
    ("  qat:\n", "  qat: {distill: {teacher: prune}}\n", 14, "'qat'"),
    ("  train: {learning_rate: 1e-5}\n  prune:\n", "  prune:\n    distill: {}\n", 9, "'prune'"),
    ("export/onnx-int8", "export/onnx-int4", 18, "'onnx-int8'"),
    ("export/onnx-int8", "export", 18, "'export'"),
    ("export/onnx-int8", "qat/x", 18, "'x'"),
    ("export/onnx-int8", "exprt", 18, "'export'"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "line", "part"), CASES)
def test_parts_that_do_not_fit_are_refused_at_their_line(
    tmp_path: Path, old: str, new: str, line: int, part: str
) -> None:
    error = error_of(tmp_path, break_once(old, new))
    assert (error.place, error.code) == (f"r.yaml:{line}", "recipe-conflict")
    assert part in str(error)


def test_the_default_parent_skips_exports(tmp_path: Path) -> None:
    text = GOOD.replace("  prune:\n", "  early:\n    type: export\n    targets: [onnx-fp32]\n  prune:\n")
    recipe = load(tmp_path, text).recipe
    assert recipe.parent_of("early") == recipe.parent_of("prune") == "train"
    assert recipe.ancestors_of("export") == ["qat", "calibrate", "prune", "train"]
    assert [recipe.teacher_of(name) for name in recipe.stages] == [None, None, None, None, "train", None]
