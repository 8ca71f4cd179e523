"""A factor on an operand of an attention product moves behind the product: same numbers, and rule B12 holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from onnx import parser
from onnx.reference import ReferenceEvaluator

import sqat
from sqat.export.folding import move_factors
from tests.tiny import build_model, random_batch

GRAPH = """<ir_version: 9, opset_import: ["" : 20]>
agraph (float[2, 4, 8] a, float[2, 4, 8] b) => (float[2, 4, 4] logits)
<float s = {0.1}, int8 z = {0}, float half = {0.5}, float four = {4.0}, float minus = {-2.0}> {
    aq = QuantizeLinear(a, s, z)
    ad = DequantizeLinear(aq, s, z)
    bq = QuantizeLinear(b, s, z)
    bd = DequantizeLinear(bq, s, z)
    left = LEFT
    scaled = RIGHT
    turned = Transpose<perm = [0, 2, 1]>(scaled)
    scores = MatMul(left, turned)
    logits = Identity(scores)
}"""
OPERANDS = {  # operators on the left and the right operand, and whether a factor moves
    "divided": ("Identity(ad)", "Div(bd, four)", True),
    "both": ("Mul(half, ad)", "Div(bd, four)", True),
    "of a float": ("Identity(ad)", "Mul(b, half)", False),
    "negative": ("Identity(ad)", "Mul(bd, minus)", False),
    "reciprocal": ("Identity(ad)", "Div(half, bd)", False),
    "not scaled": ("Identity(ad)", "Identity(bd)", False),
}


@pytest.mark.parametrize("case", OPERANDS)
def test_only_positive_factors_behind_a_dequantizer_move(case: str) -> None:
    left, right, moves = OPERANDS[case]
    model = parser.parse_model(GRAPH.replace("LEFT", left).replace("RIGHT", right))
    moved = move_factors(model)
    assert (moved is not model) == moves
    draw = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(2, 4, 8, generator=draw).numpy() + 2 for name in "ab"}
    expected, got = (ReferenceEvaluator(graph).run(None, inputs)[0] for graph in (model, moved))
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected))


@pytest.mark.parametrize(("family", "target"), [("deberta", "tensorrt"), ("deberta", "onnx-int8")])
def test_deberta_keeps_the_rules_of_int8_products(family: str, target: Any, tmp_path: Path) -> None:
    model, batch = build_model(family, num_hidden_layers=1), random_batch()
    scales = sqat.calibrate(model, [batch], lambda histogram: 0.8 * histogram.max_abs, "tensorrt")
    assert sqat.export_onnx(model, tmp_path / "model.onnx", batch, scales=scales, target=target) < 1e-6
