"""Layers that run several times in one forward pass: quantized each time, with one scale for all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import transformers

import sqat
from sqat.runtime.sessions import optimized_graph
from tests.onnx_graphs import count_operators
from tests.tiny import BASE, build_model, random_batch

ROUNDING = 1e-6


def share(model: Any) -> Any:
    """One block under three names."""
    layers = model.bert.encoder.layer
    layers[2] = layers[1] = layers[0]
    return model


def share_parts(model: Any) -> Any:
    """Two blocks with one attention output, and one feed-forward part."""
    first, second = model.bert.encoder.layer
    second.attention.output, second.intermediate = first.attention.output, first.intermediate
    second.output = first.output
    return model


def albert_groups() -> Any:
    torch.manual_seed(0)
    more = {"embedding_size": 16, "num_hidden_layers": 4, "num_hidden_groups": 2, "inner_group_num": 1}
    return transformers.AlbertForSequenceClassification(transformers.AlbertConfig(**{**BASE, **more})).eval()


# model, number of its linears that are quantized, and how often these run
CASES: dict[str, tuple[Callable[[], Any], int, int]] = {
    "albert": (lambda: build_model("albert"), 6, 12),
    "albert of two groups": (albert_groups, 12, 24),
    "one block": (lambda: share(build_model(num_hidden_layers=3)), 6, 18),
    "one part": (lambda: share_parts(build_model()), 9, 12),
    # The exporter folds transposes of small weights only.
    "weights of usual size": (lambda: build_model("albert", hidden_size=96, intermediate_size=96), 6, 12),
}
TRIED = [("albert", "tensorrt-full"), ("albert of two groups", "linear"), ("one block", "tensorrt"),
         ("one part", "tensorrt"), ("weights of usual size", "linear")]  # fmt: skip


@pytest.mark.parametrize(("case", "placement"), TRIED)
def test_every_run_is_quantized(case: str, placement: Any, tmp_path: Path) -> None:
    build, layers, runs = CASES[case]
    model, batch, path = build(), random_batch(), tmp_path / "model.onnx"
    masks = sqat.prune(model)
    scales = sqat.calibrate(model, [batch, random_batch(2)], lambda histogram: 0.8 * histogram.max_abs, placement)
    assert sqat.export_onnx(model, path, batch, masks, scales) < ROUNDING
    assert len(scales.layers) == len(masks.kept) == layers
    nodes = onnx.load(path).graph.node
    dequantized = {node.output[0] for node in nodes if node.op_type == "DequantizeLinear"}
    products = [node for node in nodes if node.op_type == "MatMul" and set(node.input) <= dequantized]
    attention = 0 if placement == "linear" else 2 * runs // 6
    assert len(products) == runs + attention


@pytest.mark.parametrize(("shared", "placement"), [(True, "linear"), (False, "tensorrt")])
def test_positions_of_deberta_are_quantized_as_tokens_are(shared: bool, placement: Any, tmp_path: Path) -> None:
    """The projections of the positions' table, of a size that the exporter does not fold, are computed once."""
    model, batch = build_model("deberta-v2", hidden_size=96, num_hidden_layers=1, share_att_key=shared), random_batch()
    masks, scales = sqat.prune(model), sqat.calibrate(model, [batch], placement=placement)
    path = tmp_path / "model.onnx"
    assert sqat.export_onnx(model, path, batch, masks, scales) < 10 * ROUNDING
    assert sum("attention.self" in name for name in scales.layers) == (3 if shared else 5)
    counts = count_operators(optimized_graph(path))
    assert counts["MatMulIntegerToFloat"] + counts["QLinearMatMul"] == 6


def test_one_scale_covers_what_all_runs_see() -> None:
    model, batch, seen = build_model("albert", num_hidden_layers=3), random_batch(), list[float]()
    scales = sqat.calibrate(model, [batch], lambda histogram: histogram.max_abs)
    name = "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn"
    real = batch["attention_mask"].bool()
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0][real].abs().max().item()))
    model(**batch)
    assert len(seen) == 3
    assert len(set(seen)) == 3
    assert float(scales.amax[scales.shared_with[f"{name}:input"]]) == max(seen)
