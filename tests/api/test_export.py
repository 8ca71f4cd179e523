"""`sqat.export_onnx`: the file is the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx import numpy_helper
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import sqat
from sqat.errors import ErrorCode
from sqat.modules.outputs import tensor_outputs
from sqat.quantization.fake_quant import quantize_weight
from sqat.runtime.sessions import session
from tests.api.conftest import Batches, copy_state, train
from tests.errors import raises_code
from tests.tiny import VOCABULARY, MakeModel


def integers_of(path: Path) -> list[Any]:
    graph = onnx.load(path).graph
    return [numpy_helper.to_array(t) for t in graph.initializer if t.name.endswith("weight_int8")]


@pytest.mark.parametrize("placement", ["linear", "tensorrt", "cpu"])
def test_an_exported_file_is_the_quantized_model(
    make_model: MakeModel, batches: Batches, tmp_path: Path, placement: Any
) -> None:
    model = make_model(num_hidden_layers=1)
    masks = sqat.prune(model)
    scales = sqat.calibrate(model, batches, placement=placement)
    with sqat.quantized(model, masks, scales):
        train(model, batches)
    before = copy_state(model)
    path = tmp_path / "model.onnx"
    difference = sqat.export_onnx(model, path, batches[0], masks, scales)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    integers = integers_of(path)
    assert len(integers) == 6
    expected, _ = quantize_weight(model.bert.encoder.layer[0].attention.self.query.weight.detach())
    assert any(np.array_equal(found, expected.numpy().T) for found in integers)
    assert all((found.T.reshape(-1, 4) != 0).sum(1).max() <= 2 for found in integers)
    inputs = {key: value.numpy() for key, value in batches[0].items() if key != "labels"}
    logits = session(path).run(None, inputs)[0]
    if placement != "cpu":  # whose bytes of the softmax only sqat.runtime has
        with torch.no_grad(), sqat.quantized(model, masks, scales):
            found = np.abs(logits - model(**batches[0]).logits.numpy()).max()
        assert difference == pytest.approx(found, abs=1e-2)
    assert difference < 0.05


SIZES = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 1}


class OwnHead(nn.Module):
    """A model of a user's own: an encoder of transformers inside, and any kind of output."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.encoder = BertModel(BertConfig(vocab_size=len(VOCABULARY), **SIZES))
        self.head, self.wrap = nn.Linear(32, 3), wrap

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> object:
        hidden = self.encoder(input_ids, attention_mask).last_hidden_state
        return self.wrap(hidden, self.head(hidden[:, 0]))


def head(name: str, **settings: Any) -> nn.Module:
    made: nn.Module = getattr(transformers, name)(BertConfig(vocab_size=len(VOCABULARY), **SIZES, **settings))
    return made


HEADS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "questions": (lambda: head("BertForQuestionAnswering"), ["start_logits", "end_logits"]),
    "no head, tuples": (lambda: head("BertModel", return_dict=False), ["last_hidden_state", "pooler_output"]),
    "all layers": (lambda: head("BertModel", output_hidden_states=True), ["last_hidden_state", "pooler_output"]),
    "own, tensor": (lambda: OwnHead(lambda hidden, scores: scores), ["output"]),
    "own, dict": (lambda: OwnHead(lambda hidden, scores: {"loss": hidden.sum(), "b": hidden, "a": scores}), ["b", "a"]),
    "own, tuple": (lambda: OwnHead(lambda hidden, scores: (scores, None, hidden)), ["output_0", "output_2"]),
}


@pytest.mark.parametrize(("make", "names"), HEADS.values(), ids=HEADS)
def test_any_head_is_exported_under_the_names_of_its_outputs(
    make: Callable[[], nn.Module], names: list[str], batches: Batches, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, path = make().eval(), tmp_path / "model.onnx"
    batch = {name: value for name, value in batches[0].items() if name != "labels"}
    labels = {"start_positions": torch.zeros(4).long(), "next_sentence_label": torch.zeros(4).long()}
    masks, scales = sqat.prune(model), sqat.calibrate(model, [{**batch, **labels}])
    difference = sqat.export_onnx(model, path, {**batch, **labels}, masks, scales)
    runtime = session(path)
    assert [output.name for output in runtime.get_outputs()] == names
    with torch.no_grad(), sqat.quantized(model, masks, scales):
        expected = tensor_outputs(model(**batch)).values()
    actual = runtime.run(None, {name: value.numpy() for name, value in batch.items()})
    differences = [float(np.abs(x.numpy() - y).max()) for x, y in zip(expected, actual, strict=True)]
    assert difference == pytest.approx(max(differences), abs=1e-2)
    assert difference < 0.05


def test_a_model_without_a_tensor_is_refused(batches: Batches, tmp_path: Path) -> None:
    model = OwnHead(lambda hidden, scores: {"loss": scores.sum(), "all": [hidden]}).eval()
    with raises_code("unsupported-model"):
        sqat.export_onnx(model, tmp_path / "model.onnx", {k: v for k, v in batches[0].items() if k != "labels"})
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_is_exported_in_float32(
    make_model: MakeModel, batches: Batches, tmp_path: Path, dtype: torch.dtype
) -> None:
    """The file is that of the same weights in float32; the model keeps its own type."""
    model, path, wide = make_model(num_hidden_layers=1).to(dtype), tmp_path / "half.onnx", tmp_path / "float.onnx"
    masks, scales = sqat.prune(model), sqat.calibrate(model, batches)
    assert sqat.export_onnx(model, path, batches[0], masks, scales) < 1e-4
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    sqat.export_onnx(model.float(), wide, batches[0], masks, scales)
    assert path.read_bytes() == wide.read_bytes()


def test_a_float_file_and_wrong_arguments_of_export(make_model: MakeModel, batches: Batches, tmp_path: Path) -> None:
    model = make_model(num_hidden_layers=1)
    assert sqat.export_onnx(model, tmp_path / "float.onnx", batches[0]) < 1e-4
    assert (tmp_path / "float.onnx").exists()
    refused = tmp_path / "refused.onnx"
    query = "bert.encoder.layer.0.attention.self.query"
    claimed = sqat.Masks({query: torch.ones(32, 32, dtype=torch.bool)}, {query: "2:4"}, {})
    with pytest.raises(sqat.GateError, match="breaks rule"):
        sqat.export_onnx(model, refused, batches[0], claimed)
    masks, scales = sqat.prune(model), sqat.calibrate(model, batches)
    wrong: list[tuple[ErrorCode, dict[str, Any]]] = [
        ("usage", {"scales": scales, "target": "onnx-fp32"}),
        ("usage", {"target": "onnx-int8"}),
        ("usage", {"scales": scales, "target": "tensorrt"}),
        ("unknown-name", {"scales": scales, "target": "onnx-int4"}),
    ]
    for code, more in wrong:
        with raises_code(code):
            sqat.export_onnx(model, refused, batches[0], masks, **more)
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "model.onnx"):
        with raises_code("unwritable-file"):
            sqat.export_onnx(model, path, batches[0], masks, scales)
    assert sqat.export_onnx(model, tmp_path / "new" / "folder" / "model.onnx", batches[0]) < 1e-4
    train(model, batches)  # without the masks
    with raises_code("model-mismatch"):
        sqat.export_onnx(model, refused, batches[0], masks, scales)
    assert not refused.exists()
