"""The rows of `sqat inspect`, each figure against one computed from the weights by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from sqat.checkpoint.manifest import LayerRecord, Manifest, SiteRecord
from sqat.checkpoint.store import Checkpoint, save_checkpoint
from sqat.data.tokens import TextProcessor
from sqat.errors import SqatError
from sqat.evaluation.inspection import inspect_checkpoint
from sqat.lint.layer_row import LayerRow
from sqat.models.loading import serialize_model
from sqat.sparsity.masks import apply_mask, nm_mask
from sqat.sparsity.pattern import parse_pattern
from tests.errors import raises_code

LINEARS = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
FIRST = "bert.encoder.layer.0.attention.self.query"


def inspected(checkpoint: Checkpoint, folder: Path) -> dict[str, LayerRow]:
    save_checkpoint(checkpoint, folder / "c")
    rows = inspect_checkpoint(folder / "c")
    assert len({row.name for row in rows}) == len(rows)
    return {row.name: row for row in rows}


def test_a_row_per_linear_in_the_models_order(make_checkpoint: Callable[..., Checkpoint], tmp_path: Path) -> None:
    rows = inspected(make_checkpoint("bert"), tmp_path)
    blocks = [f"bert.encoder.layer.{i}.{name}" for i in (0, 1) for name in LINEARS]
    assert list(rows) == [*blocks, "bert.pooler.dense", "classifier"]


def test_layer_ten_comes_after_layer_two(
    make_model: Callable[..., PreTrainedModel], tokenizer: Any, tmp_path: Path
) -> None:
    files, weights = serialize_model(make_model("bert", num_hidden_layers=11), TextProcessor(tokenizer))
    manifest = Manifest(stage="t", type="train", fingerprint="k", base_model="b", seed=0)
    names = list(inspected(Checkpoint(manifest, files, weights), tmp_path))
    assert [int(name.split(".")[3]) for name in names if "output.dense" in name] == [i for i in range(11) for _ in "ab"]


def test_every_family_lists_its_linears_and_nothing_else(
    family: str, make_checkpoint: Callable[..., Checkpoint], make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    linears = [name for name, m in make_model(family).named_modules() if isinstance(m, torch.nn.Linear)]
    assert list(inspected(make_checkpoint(family), tmp_path)) == linears


def test_a_row_holds_the_measured_values(make_checkpoint: Callable[..., Checkpoint], tmp_path: Path) -> None:
    checkpoint = make_checkpoint("bert")
    rows = inspected(checkpoint, tmp_path)
    quantized = [name for name, record in checkpoint.manifest.layers.items() if record.quantized]
    assert len(quantized) == 11
    for name in quantized:
        row, weight = rows[name], checkpoint.weights[f"{name}.weight"].numpy().astype(np.float64)
        scale = np.abs(weight).max(1) / 127
        error = weight - np.rint(weight / scale[:, None]) * scale[:, None]
        assert row.shape == weight.shape
        assert row.pattern == "2:4"
        assert row.zeros == 0.5
        assert row.weight_scale == pytest.approx((scale.min(), scale.max()))
        assert row.sqnr_db == pytest.approx(10 * math.log10((weight**2).sum() / (error**2).sum()), abs=1e-3)
        assert 30 < row.sqnr_db < 60
        assert row.input_amax == float(checkpoint.amax[f"{name}:input"])
        assert row.saturated == 0.25
        assert row.reason == ""


def test_what_is_skipped_says_why(make_checkpoint: Callable[..., Checkpoint], tmp_path: Path) -> None:
    rows = inspected(make_checkpoint("bert"), tmp_path)
    first = rows[FIRST]
    assert (first.pattern, first.reason) == ("2:4", "float: excluded")
    assert (first.weight_scale, first.input_amax, first.sqnr_db, first.saturated) == (None, None, None, None)
    outside = "outside the encoder blocks (rule B8)"
    for name, shape in (("bert.pooler.dense", (32, 32)), ("classifier", (2, 32))):
        assert rows[name] == LayerRow(
            name, shape, "dense", 0.0, None, None, None, None, f"dense: {outside}; float: {outside}"
        )


def test_a_dense_checkpoint_says_that_no_stage_pruned_it(
    make_model: Callable[..., PreTrainedModel], tokenizer: Any, tmp_path: Path
) -> None:
    files, weights = serialize_model(make_model("bert"), TextProcessor(tokenizer))
    manifest = Manifest(stage="t", type="train", fingerprint="k", base_model="b", seed=0)
    row = inspected(Checkpoint(manifest, files, weights), tmp_path)[FIRST]
    assert row == LayerRow(FIRST, (32, 32), "dense", 0.0, None, None, None, None, "dense: no prune stage yet")


@pytest.mark.parametrize(
    ("pattern", "claimed", "found"),
    [
        ("2:4", "2:4", "2:4"),
        ("1:4", "1:4", "1:4"),
        ("1:4", "2:4", "1:4"),
        ("4:8", "4:8", "4:8"),
        ("1:8", "1:8", "1:8"),
        ("3:8", "3:8", "3:8"),
        ("8:16", "8:16", "8:16"),
        ("3:4", "", "dense"),
        ("2:4", "", "2:4"),
    ],
)
def test_the_pattern_is_the_weights_own(
    pattern: str,
    claimed: str,
    found: str,
    make_model: Callable[..., PreTrainedModel],
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    files, weights = serialize_model(make_model("bert"), TextProcessor(tokenizer))
    mask = nm_mask(weights[f"{FIRST}.weight"].abs(), parse_pattern(pattern))
    weights[f"{FIRST}.weight"] = apply_mask(weights[f"{FIRST}.weight"], mask)
    layers = {FIRST: LayerRecord(pattern=claimed)}
    manifest = Manifest(stage="p", type="prune", fingerprint="k", base_model="b", seed=0, layers=layers)
    row = inspected(Checkpoint(manifest, files, weights, {FIRST: mask}), tmp_path)[FIRST]
    assert row.pattern == found
    assert row.zeros == 1 - int(pattern.split(":")[0]) / int(pattern.split(":")[1])


def test_a_pruned_row_has_a_scale(make_model: Callable[..., PreTrainedModel], tokenizer: Any, tmp_path: Path) -> None:
    files, weights = serialize_model(make_model("bert"), TextProcessor(tokenizer))
    weights[f"{FIRST}.weight"][3] = 0.0
    layers = {FIRST: LayerRecord(quantized=True)}
    sites = {f"{FIRST}:input": SiteRecord(shared_with="shared", saturated=0.0, method="mse")}
    manifest = Manifest(
        stage="c", type="calibrate", fingerprint="k", base_model="b", seed=0, layers=layers, sites=sites
    )
    checkpoint = Checkpoint(manifest, files, weights, {}, {"shared": torch.tensor(3.5)})
    row = inspected(checkpoint, tmp_path)[FIRST]
    assert row.weight_scale is not None
    assert row.weight_scale[0] == pytest.approx(2.0**-40 / 127, rel=1e-6, abs=0)
    assert row.zeros == 1 / 32
    assert (row.input_amax, row.method) == (3.5, "mse")


def test_an_export_is_not_a_model(tmp_path: Path) -> None:
    manifest = Manifest(stage="e", type="export", fingerprint="k", base_model="b", seed=0)
    files = {"model.int8.onnx": b"", "model.fp32.onnx": b"", "a.json": b""}
    save_checkpoint(Checkpoint(manifest, files), tmp_path / "e")
    with pytest.raises(SqatError, match=r"model\.fp32\.onnx, model\.int8\.onnx$") as error:
        inspect_checkpoint(tmp_path / "e")
    assert error.value.code == "not-a-checkpoint"


def test_a_checkpoint_that_cannot_be_built(make_checkpoint: Callable[..., Checkpoint], tmp_path: Path) -> None:
    checkpoint = make_checkpoint("bert")
    checkpoint.files["config.json"] = b"{}"
    save_checkpoint(checkpoint, tmp_path / "c")
    with pytest.raises(SqatError, match="the checkpoint's model cannot be built"):
        inspect_checkpoint(tmp_path / "c")


def test_weights_that_the_config_does_not_describe_are_told(make_checkpoint: Any, tmp_path: Path) -> None:
    made = make_checkpoint()
    name = next(iter(made.manifest.layers))
    weights = {key: value for key, value in made.weights.items() if key != f"{name}.weight"}
    bare = replace(made, weights=weights, masks={}, amax={},
                   manifest=made.manifest.model_copy(update={"layers": {}, "sites": {}}))  # fmt: skip
    save_checkpoint(bare, tmp_path / "01-x")
    with raises_code("damaged-checkpoint", "stage x"):
        inspect_checkpoint(tmp_path / "01-x")
