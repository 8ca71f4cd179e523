"""Files of target cpu-sparse: each family against torch's fake-quantized model, by an interpreter and the kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
import transformers

from sqat import runtime
from sqat.checkpoint.store import Checkpoint
from sqat.data.tokens import TextProcessor
from sqat.errors import GateError
from sqat.export.cpu import encoder as cpu_encoder
from sqat.export.cpu.graph import find_node as first_node
from sqat.export.onnx_edit import GraphEditor
from sqat.models.sentence import Pooling, SentenceProcessor, add_pooling_
from sqat.onnx_files.checks import check_file
from sqat.recipe.stages import Layers
from sqat.recipe.targets import KERNEL_FAMILIES
from tests.calibrated_encoders import calibrate
from tests.export.cpu_models import (
    ENGINES,
    Inputs,
    by_kernels,
    by_torch,
    close,
    exported,
    states_by_torch,
    texts,
    with_states,
)
from tests.export.cpu_oracle import unpack
from tests.onnx_graphs import count_operators
from tests.runtime.nodes import needs_library
from tests.tensorrt.encoder import encoder
from tests.tiny import BASE

pytestmark = pytest.mark.pipeline
LENGTHS = (12, 9, 5, 12, 7, 3, 2, 11)
LAYER = ["Linear", "Attention", "Linear", "Linear", "Linear"]
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"num_hidden_layers": 1, "hidden_act": "gelu_new"},
    "distilbert": {"n_layers": 1, "activation": "relu"},
    "electra": {"num_hidden_layers": 1},
}
# what is left dense, and which linears outside the layers are quantized too
DENSE = {"bert": ("layer.1.attention.self.key", "layer.0.output.dense"), "electra": ("embeddings_project",)}
LAYERS = {"roberta": Layers(exclude=("*.out_proj",), include=("*",)), "electra": Layers(include=("*",))}
Making = Callable[[str], "Made"]


class Made(NamedTuple):
    """A checkpoint, the inputs it was calibrated with, and its file."""

    checkpoint: Checkpoint
    inputs: Inputs
    file: Path
    int8_words: Path


@pytest.fixture(scope="module")
def made(make_model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Making:
    """`made(family)`: its calibrated checkpoint and file, once."""
    known: dict[str, Made] = {}

    def make(family: str) -> Made:
        if family not in known:
            inputs = texts(LENGTHS, typed=family == "bert")
            model = make_model(family, **FAMILIES[family])
            checkpoint = calibrate(model, TextProcessor(tokenizer), inputs, "cpu", purpose="quantize",
                                   layers=LAYERS.get(family), dense=DENSE.get(family, ()))  # fmt: skip
            known[family] = Made(
                checkpoint, inputs, *exported(checkpoint, model, inputs, tmp_path_factory.mktemp(family))
            )
        return known[family]

    return make


def nodes(file: Path) -> list[onnx.NodeProto]:
    return list(onnx.load(file).graph.node)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_computes_what_was_trained(family: str, engine: str, made: Making) -> None:
    checkpoint, inputs, file, *_ = made(family)
    wanted = by_torch(checkpoint, inputs)
    (got,) = ENGINES[engine](file, inputs)
    assert close(wanted, got)
    longer = texts((16, 1, 4), typed=family == "bert", seed=7)
    assert close(by_torch(checkpoint, longer), ENGINES[engine](file, longer)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kernels_compute_the_bits_of_the_trained_model(family: str, made: Making) -> None:
    checkpoint, _, file, *_ = made(family)
    for seed, lengths in ((3, LENGTHS), (4, (16,)), (5, (1, 16, 2))):
        inputs = texts(lengths, typed=family == "bert", seed=seed)
        _, states = by_kernels(with_states(file), inputs)
        real = inputs["attention_mask"].bool().numpy()
        assert np.array_equal(states[real], states_by_torch(checkpoint, inputs)[real])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_graph_is_valid_and_holds_the_ops(family: str, made: Making) -> None:
    file = made(family).file
    assert list(check_file(file)) == []
    ours = [node.op_type for node in nodes(file) if node.domain == "sqat"]
    outside = {"roberta": 1, "electra": 2}.get(family, 0)  # head.dense, and ELECTRA's projection of the embeddings
    layers = 2 if family == "bert" else 1
    assert ours.count("Attention") == layers
    masked = [node.op_type for node in nodes(file) if node.domain == "sqat" and node.input[-1] == "attention_mask"]
    assert sorted(masked) == sorted(LAYER * layers), "all but the embeddings and outer linears leave padding out"
    assert sorted(ours) == sorted(["Embed", *LAYER * layers, *["Linear"] * outside])
    assert count_operators(onnx.load(file).graph)["Softmax"] == 0
    initializers = [tensor.name for tensor in onnx.load(file).graph.initializer]
    assert len(initializers) == len(set(initializers))


def test_weights_are_stored_packed_and_dense_ones_dense(made: Making) -> None:
    checkpoint, _, file, *_ = made("bert")
    graph = onnx.load(file).graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    linears = [node for node in graph.node if node.op_type == "Linear"]
    assert sum(not node.input[2] for node in linears) == 2, "an FFN output, and q, k, v with a dense key"
    for node in linears:
        if not node.name.endswith("intermediate/dense/Linear"):
            continue
        layer = node.name.strip("/").removesuffix("/Linear").replace("/", ".")
        weight = checkpoint.weights[f"{layer}.weight"].numpy()
        scale = np.abs(weight).max(1, keepdims=True) / 127
        got = unpack(stored[node.input[1]], stored[node.input[2]], *weight.shape)
        assert np.array_equal(got, np.rint(weight / scale))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_neither_padding_nor_the_other_texts_change_a_bit(family: str, engine: str, made: Making) -> None:
    file = with_states(made(family).file)
    inputs = texts(LENGTHS, typed=family == "bert", seed=3)
    _, together = ENGINES[engine](file, inputs)
    for row, length in enumerate(LENGTHS):
        alone = {name: tensor[row : row + 1, :length] for name, tensor in inputs.items()}
        _, states = ENGINES[engine](file, alone)
        assert np.array_equal(states[0], together[row, :length])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", ["bert", "electra"])
def test_int8_words(family: str, engine: str, made: Making) -> None:
    checkpoint, inputs, file, small = made(family)
    name = f"{family}.embeddings.word_embeddings.weight"
    table = checkpoint.weights[name]
    scale = table.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    rounded = replace(checkpoint, weights={**checkpoint.weights, name: (table / scale).round() * scale})
    wanted = by_torch(rounded, inputs)
    assert close(wanted, ENGINES[engine](small, inputs)[0])
    assert not close(by_torch(checkpoint, inputs), wanted), "rounding the words does something"
    assert count_operators(onnx.load(small).graph)["EmbedInt8"] == 1
    assert small.stat().st_size < file.stat().st_size


@pytest.mark.parametrize("engine", ENGINES)
def test_pooled_embeddings(engine: str, tokenizer: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(**{**BASE, "num_hidden_layers": 1})
    model = add_pooling_(transformers.AutoModel.from_config(config).eval(), Pooling())
    inputs = texts(LENGTHS)
    checkpoint = calibrate(
        model, SentenceProcessor(tokenizer, Pooling(), 32, 16, {}), inputs, "cpu", purpose="quantize"
    )
    file, _ = exported(checkpoint, model, inputs, tmp_path)
    (got,) = ENGINES[engine](file, inputs)
    assert close(by_torch(checkpoint, inputs), got)
    assert np.linalg.norm(got, axis=1) == pytest.approx(1)
    assert not [node for node in nodes(file) if "pooler" in node.name], "nothing reads BERT's own pooler"


def outputs_by_threads(file: Path, inputs: Inputs) -> list[Any]:
    """The outputs of a file for each number of threads; more than the machine's cores may be asked for."""
    sessions = [runtime.session(file, threads=threads) for threads in (1, 2, 3, 4, 8)]
    names = [entry.name for entry in sessions[0].get_inputs()]
    return [session.run(None, {name: inputs[name].numpy() for name in names})[0] for session in sessions]


@needs_library
@pytest.mark.parametrize("family", FAMILIES)
def test_any_number_of_threads_gives_the_same_bits(family: str, made: Making) -> None:
    for lengths in (LENGTHS, (16,), (16, 3), (1, 2, 16)):
        first, *others = outputs_by_threads(made(family).file, texts(lengths, typed=family == "bert"))
        assert all(np.array_equal(first, other) for other in others)


@needs_library
@pytest.mark.parametrize("mode", ["mean", "cls"])
def test_neither_threads_nor_padding_change_a_bit_of_an_embedding(mode: str, tokenizer: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    wide = {"hidden_size": 256, "num_hidden_layers": 1, "max_position_embeddings": 130}
    pooling = Pooling(mode)
    model = add_pooling_(
        transformers.AutoModel.from_config(transformers.BertConfig(**{**BASE, **wide})).eval(), pooling
    )
    processor = SentenceProcessor(tokenizer, pooling, 256, 128, {})
    checkpoint = calibrate(model, processor, texts(LENGTHS), "cpu", purpose="quantize")
    file, _ = exported(checkpoint, model, texts(LENGTHS), tmp_path)
    assert close(by_torch(checkpoint, texts(LENGTHS)), by_kernels(file, texts(LENGTHS))[0])
    assert any(node.op_type == "MeanPool" for node in nodes(file)) == (mode == "mean")
    for lengths in ((128,), (64, 31), (7, 100, 2), LENGTHS):
        inputs = texts(lengths)
        first, *others = outputs_by_threads(file, inputs)
        assert all(np.array_equal(first, other) for other in others)
        padded = {name: torch.nn.functional.pad(tensor, (0, 2)) for name, tensor in inputs.items()}
        assert np.array_equal(by_kernels(file, padded)[0], first)


def test_a_module_that_was_not_traced_is_one_line_of_error() -> None:
    with pytest.raises(GateError, match=r"has no MatMul of encoder\.gone, .*; .* please report it with the recipe"):
        first_node(GraphEditor(encoder()), "encoder.gone", "MatMul")


def test_init_knows_the_families_of_the_kernels() -> None:
    assert set(KERNEL_FAMILIES) == set(cpu_encoder.FAMILIES)
