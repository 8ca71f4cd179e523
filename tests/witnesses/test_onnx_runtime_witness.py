"""ONNX's own checker, and ONNX Runtime: every quantized product an int8 operator, the numbers those of torch."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from sqat.runtime.sessions import find_float_products, optimized_graph, run_batches, session
from tests.onnx_graphs import count_operators
from tests.witnesses.flavours import (
    FAMILIES,
    FLAVOURS,
    HALF,
    build,
    check_numbers,
    exported,
    products_of,
    quantization_of,
)

INT8 = ("MatMulIntegerToFloat", "QLinearMatMul", "QLinearConv", "QGemm")
MAIN = ("folded", "linear", "onnx-fp16")  # of every family; the other flavours of one
CASES = [(flavour, name) for flavour in FLAVOURS for name in FAMILIES if flavour in MAIN or name == "electra"]
IN_INT8 = [
    (flavour, name)
    for flavour, name in CASES
    if FLAVOURS[flavour].sites != "none" and FLAVOURS[flavour].rounding != HALF
]


@pytest.mark.parametrize(("flavour", "name"), CASES)
def test_the_checker_and_strict_inference_accept_it(flavour: str, name: str) -> None:
    model = exported(flavour, name)
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


@pytest.mark.parametrize(("flavour", "name"), IN_INT8)
def test_every_quantized_product_is_an_int8_operator(flavour: str, name: str) -> None:
    graph = optimized_graph(exported(flavour, name).SerializeToString())
    counts = count_operators(graph)
    wanted = products_of(quantization_of(build(name), FLAVOURS[flavour].sites))
    if name == "mpnet" and flavour != "linear":  # q and k are int8 as outputs of their linears; it uses that
        wanted += 1
    assert sum(counts[operator] for operator in INT8) == wanted
    assert find_float_products(graph) == []


@pytest.mark.parametrize(("flavour", "name"), [case for case in CASES if FLAVOURS[case[0]].same])
def test_the_numbers_are_those_of_torch_at_every_size(flavour: str, name: str) -> None:
    family, form = build(name), FLAVOURS[flavour]
    runtime = session(exported(flavour, name).SerializeToString(), threads=1)

    def run(inputs: dict[str, np.ndarray]) -> np.ndarray:
        return run_batches(runtime, [inputs])

    check_numbers(family, quantization_of(family, form.sites), run, form.rounding)
