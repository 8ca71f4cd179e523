"""Embedding tables in fewer bits: half a step of error at most, smaller files, and lookups that stay lookups."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import ModelProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from sqat.errors import SqatError
from sqat.export.embeddings import TableForm, Widen, quantize_rows, store_embeddings, stored_tables
from sqat.export.float16 import to_float16
from sqat.export.qdq import insert_qdq
from sqat.lint.apply_rules import list_findings
from sqat.runtime.sessions import parity, run_batches, session
from tests.onnx_graphs import count_operators
from tests.onnx_models import ATTENTION, Family, ImageFamily, build_family, rtx_weight_bytes

TENSORRT = ("output", *ATTENTION, "add")
BATCHES = [(1, 2, "right"), (3, 9, "right"), (4, 8, "left"), (2, 33, "right"), (8, 7, "left")]
FORMS: list[tuple[TableForm, Widen]] = [("fp16", "rows"), ("int8", "rows"), ("int8", "table")]
WORDS = "bert.embeddings.word_embeddings.weight"


def constants(model: ModelProto) -> dict[str, np.ndarray]:
    return {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}


def logits(family: Family, model: ModelProto) -> list[np.ndarray]:
    runtime = session(model.SerializeToString(), threads=1)
    batches = [family.inputs(b, s, side, seed=8) for b, s, side in BATCHES]
    return [run_batches(runtime, [{k: v.numpy() for k, v in batch.items()}]) for batch in batches]


def check(model: ModelProto) -> None:
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


def with_tables(model: ModelProto, tables: dict[str, np.ndarray]) -> ModelProto:
    """The same graph with other values in its tables."""
    changed = ModelProto()
    changed.CopyFrom(model)
    for entry in changed.graph.initializer:
        if entry.name in tables:
            entry.CopyFrom(numpy_helper.from_array(tables[entry.name], entry.name))
    return changed


@pytest.mark.parametrize(("form", "widen"), FORMS)
def test_logits_are_those_of_the_rounded_tables(family: Family, form: TableForm, widen: Widen) -> None:
    model = store_embeddings(family.graph, form, widen)
    check(model)
    rounded = {name: table.numpy() for name, table in stored_tables(family.graph, form).items()}
    assert rounded
    expected = with_tables(family.graph, rounded)
    for left, right in zip(logits(family, expected), logits(family, model), strict=True):
        assert parity(left, right) < 1e-5
    assert max(parity(*pair) for pair in zip(logits(family, family.graph), logits(family, model), strict=True)) > 1e-5


@pytest.mark.parametrize(("form", "widen"), FORMS)
def test_with_pairs_before_or_after_and_with_float16(bert: Family, form: TableForm, widen: Widen) -> None:
    quantization = bert.quantization(*TENSORRT)
    before = insert_qdq(store_embeddings(bert.graph, form, widen), quantization)
    after = store_embeddings(insert_qdq(bert.graph, quantization), form, widen)
    for left, right in zip(logits(bert, before), logits(bert, after), strict=True):
        assert parity(left, right) == 0
    for model in (to_float16(after), store_embeddings(to_float16(insert_qdq(bert.graph, quantization)), form, widen)):
        check(model)
        assert max(parity(*pair) for pair in zip(logits(bert, after), logits(bert, model), strict=True)) < 0.3
        target = "tensorrt" if widen == "table" else "onnx-int8"
        assert [
            str(finding) for finding in list_findings(model, target=target) if finding.rule in ("B2", "B3", "B4", "B10")
        ] == []


@pytest.mark.parametrize(("form", "share"), [("fp16", 0.5), ("int8", 0.25 + 4 / 4 / 32)])
def test_the_file_shrinks_by_what_the_tables_do(bert: Family, form: TableForm, share: float) -> None:
    before = bert.graph
    bytes_before = {name: array.nbytes for name, array in constants(before).items()}
    tables = sum(bytes_before[name] for name in stored_tables(before, form))
    model = store_embeddings(before, form)
    saved = sum(bytes_before.values()) - sum(array.nbytes for array in constants(model).values())
    assert saved == pytest.approx((1 - share) * tables, rel=0.01)
    assert len(before.SerializeToString()) - len(model.SerializeToString()) > 0.8 * saved


def test_lookups_stay_lookups(bert: Family) -> None:
    """What is widened in the ``rows`` form is what was looked up, never a table."""
    model = store_embeddings(bert.graph, "int8")
    tables = {name for name, array in constants(model).items() if array.ndim == 2 and "embeddings" in name}
    readers = {node.op_type for node in model.graph.node if tables & set(node.input)}
    assert readers == {"Gather"} | ({"Slice"} if "bert.embeddings.position_ids" in tables else set())
    counts = count_operators(model.graph)
    assert counts["DequantizeLinear"] == 0
    assert counts["Gather"] - count_operators(bert.graph.graph)["Gather"] == 3


FLOATS = st.floats(-100, 100, width=32, allow_subnormal=False)


@given(arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 9)), elements=FLOATS))
def test_each_value_is_within_half_a_step_of_its_row(table: np.ndarray) -> None:
    rows, scales = quantize_rows(table)
    assert (rows.dtype, scales.dtype, scales.shape) == (np.int8, np.float32, (len(table), 1))
    assert rows.min(initial=0) >= -127
    error = np.abs(rows * scales.astype(np.float64) - table)
    step = np.maximum(np.abs(table).max(1, keepdims=True) / 127, 2.0**-40)
    assert (error <= step / 2 * (1 + 1e-5)).all()


def test_a_row_of_zeros_stays_one(bert: Family) -> None:
    rows, scales = quantize_rows(np.zeros((2, 4), np.float32))
    assert not rows.any()
    assert (scales > 0).all()


GRAPH = """<ir_version: 9, opset_import: ["" : 20]>
agraph (int64[N] ids) => (float[N, M] logits) { BODY }"""


def graph(body: str, width: int = 16) -> ModelProto:
    model = onnx.parser.parse_model(GRAPH.replace("BODY", body))
    table = np.random.default_rng(0).normal(size=(40, width)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(table, "table"))
    return onnx.shape_inference.infer_shapes(model)


@pytest.mark.parametrize(("form", "widen"), FORMS)
def test_two_lookups_share_what_is_stored_and_may_be_outputs(form: TableForm, widen: Widen) -> None:
    before = graph("a = Gather(table, ids) b = Gather(table, ids) logits = Add(a, b)")
    model = store_embeddings(before, form, widen)
    check(model)
    stored = constants(model)
    assert sum(array.size >= 640 for array in stored.values()) == 1
    lone = store_embeddings(graph("logits = Gather(table, ids)"), form, widen)
    check(lone)
    ids = np.array([3, 0, 39])
    (double,), (single,) = (ReferenceEvaluator(m).run(None, {"ids": ids}) for m in (model, lone))
    np.testing.assert_allclose(double, 2 * single, rtol=1e-6)
    np.testing.assert_allclose(single, constants(before)["table"][ids], atol=0.02)


@pytest.mark.parametrize("model", [
    graph("a = Gather(table, ids) b = Transpose(table) logits = MatMul(a, b)"),
    graph("a = Gather<axis = 1>(table, ids) logits = Transpose(a)"),
    graph("logits = Gather(table, ids)", width=12),
], ids=["read by something else", "columns", "narrow"])  # fmt: skip
def test_what_is_no_table_stays_and_is_an_error(model: ModelProto) -> None:
    with pytest.raises(SqatError) as error:
        store_embeddings(model, "int8")
    assert error.value.code == "unsupported-model"
    assert stored_tables(model, "int8") == {}


def test_images_have_no_table(vit: ImageFamily) -> None:
    with pytest.raises(SqatError) as error:
        store_embeddings(vit.graph, "fp16")
    assert error.value.code == "unsupported-model"


def test_what_is_stored_already_is_not_stored_again(bert: Family) -> None:
    model = store_embeddings(bert.graph, "int8")
    with pytest.raises(SqatError) as error:
        store_embeddings(model, "int8")
    assert error.value.code == "unsupported-model"


def test_stored_tables_are_the_parameters(bert: Family) -> None:
    assert stored_tables(bert.graph, "fp32") == {}
    exact = bert.model.get_parameter(WORDS).detach()
    tables = stored_tables(bert.graph, "fp16")
    assert set(tables) == {f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")}
    assert (tables[WORDS] == exact.half().float()).all()
    assert (stored_tables(bert.graph, "int8")[WORDS] - exact).abs().max() <= exact.abs().max() / 253


@pytest.mark.parametrize(("form", "widen"), [("fp16", "rows"), ("int8", "table")])
def test_tensorrt_keeps_the_tables_small(form: TableForm, widen: Widen) -> None:
    bert = build_family("bert")
    model = insert_qdq(bert.graph, bert.quantization(*TENSORRT))
    saved = rtx_weight_bytes(model) - rtx_weight_bytes(store_embeddings(model, form, widen))
    bytes_before = {name: array.nbytes for name, array in constants(bert.graph).items()}
    tables = sum(bytes_before[name] for name in stored_tables(bert.graph, form))
    assert saved > (0.45 if form == "fp16" else 0.68) * tables
