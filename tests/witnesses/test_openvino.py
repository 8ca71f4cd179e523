"""OpenVINO: the graph it executes multiplies every quantized layer in int8, and its numbers are torch's.

On an x86 CPU without VNNI its int8 kernels add two products in 16 bits and saturate, and no option of it prevents
that: the logits of a 2:4 model are then off by tenths. So the numbers are compared on models that cannot saturate
(`without_saturation`), which shows on every CPU that the graph is understood; where VNNI is, on the plain ones too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest

from sqat.bench.candidates import openvino_core
from sqat.export.names import node_name
from sqat.export.qdq import insert_qdq
from sqat.runtime.sessions import int8_saturates
from tests.witnesses.flavours import (
    FAMILIES,
    FLAVOURS,
    MINILM,
    SINGLE,
    SIZES,
    build,
    check_numbers,
    exported,
    quantization_of,
    with_wide_bounds,
    without_saturation,
)

pytest.importorskip("openvino")

# It multiplies scales into each other before it rounds, so it is off by a few more last bits than torch.
ROUNDING = 4 * SINGLE
INT8 = {"i8", "u8"}
PRODUCTS = ("FullyConnected", "MatMul", "Convolution")
CASES = [("folded", name) for name in FAMILIES]
CASES += [(flavour, "electra") for flavour in ("linear", "dq", "qdq", "conv1x1", "embeddings-int8")]

Run = Callable[[dict[str, np.ndarray]], np.ndarray]


class Kernel(NamedTuple):
    """One node of the executed graph: what it is, what it computes in, the nodes of the file it stands for."""

    kind: str
    precision: str
    names: str


def compile_model(model: onnx.ModelProto) -> Any:
    """Compile for the CPU in float32 where it is not int8 (bfloat16 is its default where the CPU has it)."""
    core = openvino_core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    return core.compile_model(core.read_model(model.SerializeToString()), "CPU", settings)


def executed(compiled: Any) -> list[Kernel]:
    """Products in the graph as it is executed."""
    keys = ("layerType", "runtimePrecision", "originalLayersNames")
    infos = [operation.get_rt_info() for operation in compiled.get_runtime_model().get_ops()]
    kernels = [Kernel(*(info[key].astype(str) for key in keys)) for info in infos]
    return [kernel for kernel in kernels if kernel.kind in PRODUCTS]


def runner(compiled: Any) -> Run:
    """Logits of a batch."""
    names = [entry.get_any_name() for entry in compiled.inputs]
    return lambda inputs: np.asarray(compiled({name: inputs[name] for name in names})[0])


@pytest.mark.parametrize(("flavour", "name"), [*CASES, pytest.param("folded", "minilm", marks=pytest.mark.slow)])
def test_every_quantized_layer_runs_an_int8_kernel(flavour: str, name: str) -> None:
    quantization = quantization_of(build(name), FLAVOURS[flavour].sites)
    kernels = executed(compile_model(exported(flavour, name)))
    linears = [kernel for kernel in kernels if kernel.kind in ("FullyConnected", "Convolution")]
    in_float = [kernel.names for kernel in linears if kernel.precision not in INT8]
    for layer in quantization.weights:
        names = [node_name(layer, operator) for operator in ("MatMul", "Gemm", "Conv")]
        assert not [kernel for kernel in in_float if any(name in kernel for name in names)], f"{layer} runs in float"
    # Counted too, since it gives some products a name of its own.
    assert len(linears) - len(in_float) == len(quantization.weights)
    attention = any(site.endswith(":softmax") for site in quantization.amax)
    products = [kernel for kernel in kernels if kernel.kind == "MatMul" and kernel.precision not in INT8]
    assert not (attention and products)


@pytest.mark.parametrize("name", [*FAMILIES, MINILM])
@pytest.mark.parametrize("sites", ["inputs", "all"])
def test_the_numbers_are_those_of_torch_at_every_size(sites: str, name: str) -> None:
    family = without_saturation(build(name))
    quantization = with_wide_bounds(quantization_of(family, sites))
    compiled = compile_model(insert_qdq(family.graph, quantization))
    check_numbers(family, quantization, runner(compiled), ROUNDING, SIZES if name != "minilm" else ((2, 24),))


@pytest.mark.skipif(int8_saturates(), reason="this CPU multiplies uint8 by int8 with saturation")
@pytest.mark.parametrize("name", FAMILIES)
def test_the_numbers_of_dense_pairs_are_exact_with_vnni(name: str) -> None:
    family = build(name)
    check_numbers(family, quantization_of(family, "all"), runner(compile_model(exported("folded", name))), ROUNDING)


@pytest.mark.skipif(not int8_saturates(), reason="this CPU multiplies uint8 by int8 without saturation")
def test_without_vnni_dense_pairs_saturate() -> None:
    """Why the models above are special: remove them once this fails."""
    family = build("bert")
    inputs = family.inputs(8, 40)
    expected = family.reference(quantization_of(family, "inputs"), inputs).numpy()
    found = runner(compile_model(exported("linear", "bert")))({name: x.numpy() for name, x in inputs.items()})
    assert np.abs(found - expected).max() > 0.05
