"""The float graph: every linear is found by its module name, and the file computes what the model computes."""

from __future__ import annotations

import logging
import sys
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import NodeProto, numpy_helper
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from scripts.families import registry
from scripts.families.source import build_family
from sqat.errors import SqatError, StoppedError
from sqat.export.graph import export_float, quiet
from sqat.export.names import WEIGHTED, module_of, node_name
from sqat.runtime.sessions import run_batches, session
from tests.errors import raises_code
from tests.onnx_models import FAMILIES, Family, ImageFamily
from tests.tiny import MakeModel

NAMES = st.lists(st.from_regex(r"[A-Za-z_][A-Za-z_0-9]{0,5}|[0-9]{1,2}", fullmatch=True), max_size=6)


@given(NAMES)
def test_a_node_name_gives_the_module_back(parts: list[str]) -> None:
    module = ".".join(parts)
    node = NodeProto(name=node_name(module, "MatMul"))
    assert node.name.startswith("/")
    assert module_of(node) == module


def test_foreign_names_hold_no_module() -> None:
    assert module_of(NodeProto(name="node_MatMul_86")) == ""
    assert module_of(NodeProto(name="/MatMul_3")) == ""


def test_every_linear_is_named_after_its_module(family: Family) -> None:
    linears = {name: m for name, m in family.model.named_modules() if isinstance(m, nn.Linear)}
    tensors = {tensor.name: tensor for tensor in family.graph.graph.initializer}
    products = {module_of(n): n for n in family.graph.graph.node if n.op_type in WEIGHTED and n.input[1] in tensors}
    assert set(products) == set(linears)
    for name, linear in linears.items():
        assert products[name].input[1] == f"{name}.weight"
        stored = torch.from_numpy(numpy_helper.to_array(tensors[f"{name}.weight"]).copy())
        stored = stored if products[name].op_type == "Gemm" else stored.t()
        assert torch.equal(stored, linear.weight)


def test_the_file_is_clean(family: Family) -> None:
    graph = family.graph.graph
    assert [(entry.domain, entry.version) for entry in family.graph.opset_import] == [("", 20)]
    holders = [family.graph, graph, *graph.node, *graph.value_info, *graph.initializer]
    assert not any(holder.metadata_props or holder.doc_string for holder in holders)
    assert len({node.name for node in graph.node}) == len(graph.node)
    for value in graph.input:
        assert [size.dim_param for size in value.type.tensor_type.shape.dim] == ["batch", "sequence"]
    assert [value.name for value in graph.input] == list(family.inputs(1, 2))
    assert [value.name for value in graph.output] == ["logits"]


@pytest.mark.parametrize(("batch", "sequence", "side"), [(1, 2, "right"), (3, 9, "left"), (2, 40, "right")])
def test_float_logits_are_the_models(family: Family, batch: int, sequence: int, side: str) -> None:
    inputs = family.inputs(batch, sequence, side, seed=5)
    with torch.no_grad():
        expected = family.model(**inputs).logits
    got = run_batches(session(family.graph.SerializeToString(), threads=1), [{k: v.numpy() for k, v in inputs.items()}])
    torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-5, atol=2e-6)


def test_images_are_exported_with_the_batch_alone_free(vit: ImageFamily) -> None:
    (value,) = vit.graph.graph.input
    assert [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim] == ["batch", 3, 32, 32]
    linears = {name for name, module in vit.model.named_modules() if isinstance(module, nn.Linear)}
    tensors = {tensor.name for tensor in vit.graph.graph.initializer}
    products = {
        module_of(n): n.op_type for n in vit.graph.graph.node if n.op_type in WEIGHTED and n.input[1] in tensors
    }
    assert products.pop("vit.embeddings.patch_embeddings.projection") == "Conv"
    assert set(products) == linears
    runtime = session(vit.graph.SerializeToString(), threads=1)
    for batch in (1, 2, 3, 5, 8):
        inputs = vit.inputs(batch, seed=5)
        with torch.no_grad():
            expected = vit.model(**inputs).logits
        got = run_batches(runtime, [{"pixel_values": inputs["pixel_values"].numpy()}])
        torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-5, atol=2e-6)


def test_export_says_nothing_and_leaves_logging_alone(capfd: pytest.CaptureFixture[str]) -> None:
    before = logging.root.manager.disable
    with quiet():
        logging.getLogger("torch.onnx").warning("chatter")
        warnings.warn("chatter", stacklevel=1)
    assert logging.root.manager.disable == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("shape", [(8,), (2, 1), (0, 8), (2, 8, 3)])
def test_inputs_that_cannot_stand_for_a_batch(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"input input_ids has shape .*, needs \[batch >= 1, sequence >= 2\]"):
        export_float(nn.Identity(), {"input_ids": torch.zeros(shape, dtype=torch.long)})


@pytest.mark.parametrize("shape", [(8,), (0, 3, 8, 8)])
def test_images_that_cannot_stand_for_a_batch(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"input pixel_values has shape .*, needs \[batch >= 1, \.\.\.\]"):
        export_float(nn.Identity(), {"pixel_values": torch.zeros(shape)})


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="eval mode"):
        export_float(FAMILIES["bert"]().train(), {"input_ids": torch.ones(2, 4, dtype=torch.long)})


def raise_chain(error: Exception) -> None:
    """Raise an error as the exporter does: from its cause, with pages of advice."""
    raise RuntimeError("Failed to export the model.\nNext steps:\n- Modify the model code\n" * 50) from error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("\n\n  a guard fails on u1 < 8  \nmore\nand more"), "a guard fails on u1 < 8"),
        (KeyError("aten::made_up"), "aten::made_up"),
        (AssertionError(), "AssertionError"),
        (TypeError("x" * 5000), "..."),
    ],
)
def test_what_the_exporter_raises_and_prints_becomes_one_line(
    error: Exception,
    told: str,
    make_model: MakeModel,
    batch: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def export(*_: object, **__: object) -> None:
        print("a graph of 364 lines")
        print("and another", file=sys.stderr)
        warnings.warn("a warning", stacklevel=1)
        logging.getLogger("torch").error("an error")
        raise_chain(error)

    monkeypatch.setattr(torch.onnx, "export", export)
    with pytest.raises(SqatError, match=r"^torch cannot export BertForSequenceClassification as ONNX: ") as refusal:
        export_float(make_model("bert"), batch)
    assert refusal.value.code == "unsupported-model"
    assert told in refusal.value.problem
    assert len(str(refusal.value)) < 400
    assert "\n" not in str(refusal.value)
    assert capfd.readouterr() == ("", "")
    assert not logging.root.manager.disable


def test_a_refusal_of_our_own_passes_the_exporter(
    make_model: MakeModel, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(*_: object, **__: object) -> None:
        raise StoppedError("stopped", code="stopped")

    monkeypatch.setattr(torch.onnx, "export", export)
    with raises_code("stopped"):
        export_float(make_model("bert"), batch)


def test_longformer_is_refused_by_name(capfd: pytest.CaptureFixture[str]) -> None:
    """Its windows depend on the number of tokens in a way that torch cannot trace."""
    model, ids = build_family(registry.FAMILIES["longformer"]), torch.full((2, 12), 7)
    with raises_code("unsupported-model", match="torch cannot export LongformerForSequenceClassification as ONNX: "):
        export_float(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert "def forward" not in "".join(capfd.readouterr())


class OnlyTen(nn.Module):
    """A model that torch exports with texts of one length alone."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        read = (input_ids * attention_mask).float() * torch.ones(10)
        return SequenceClassifierOutput(logits=read.sum(1, keepdim=True))


def test_a_graph_of_one_size_is_an_error() -> None:
    batch = {"input_ids": torch.ones(3, 10, dtype=torch.int64), "attention_mask": torch.ones(3, 10, dtype=torch.int64)}
    with raises_code("unsupported-model"):
        export_float(OnlyTen().eval(), batch)
