"""Tiny encoders calibrated with placement `cpu`, their cpu-sparse files, and the three that compute them: torch's
fake-quantized model, the numpy interpreter, the compiled kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from sqat import runtime
from sqat.checkpoint.store import Checkpoint
from sqat.errors import SqatError
from sqat.evaluation.evaluate import served_model
from sqat.export.source import Source
from sqat.export.targets import write_target
from sqat.models.attention import use_eager
from sqat.recipe.stages import ExportConfig
from tests.export.cpu_oracle import interpret

Inputs = dict[str, Tensor]
Array = NDArray[Any]


def texts(lengths: Sequence[int], vocabulary: int = 65, typed: bool = False, seed: int = 1) -> Inputs:
    """Random texts of these lengths, padded on the right to the longest."""
    generator = torch.Generator().manual_seed(seed)
    rows, tokens = len(lengths), max(lengths)
    mask = (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, vocabulary, (rows, tokens), generator=generator) * mask
    types = {"token_type_ids": torch.randint(0, 2, (rows, tokens), generator=generator)} if typed else {}
    return {"input_ids": ids, "attention_mask": mask, **types}


def exported(checkpoint: Checkpoint, model: nn.Module, inputs: Inputs, folder: Path) -> tuple[Path, Path]:
    """The cpu-sparse files of a checkpoint: words in float, words in int8."""
    use_eager(model)
    source = Source(checkpoint, model.eval(), inputs, ExportConfig(), (1, 8, 16))
    graph = source.graph
    files = []
    for form in ("fp32", "int8"):
        other = replace(source, config=ExportConfig(embeddings=form))
        vars(other)["graph"] = graph  # traced once
        (folder / form).mkdir()
        write_target("cpu-sparse", other, folder / form)
        files.append(folder / form / "model.cpu-sparse.onnx")
    return files[0], files[1]


def by_torch(checkpoint: Checkpoint, inputs: Inputs) -> Array:
    """Logits of the fake-quantized model."""
    with served_model(checkpoint) as (model, _), torch.no_grad():
        logits: Array = model.eval()(**inputs).logits.numpy()
    return logits


def states_by_torch(checkpoint: Checkpoint, inputs: Inputs) -> Array:
    """What the last layer of the fake-quantized model puts out."""
    with served_model(checkpoint) as (model, _), torch.no_grad():
        assert isinstance(model, PreTrainedModel)
        states: Array = model.eval().base_model(**inputs).last_hidden_state.numpy()
    return states


def by_oracle(file: Path, inputs: Inputs) -> list[Array]:
    """Outputs of a file by the numpy interpreter."""
    return interpret(onnx.load(file), arrays(inputs))


def by_kernels(file: Path, inputs: Inputs) -> list[Array]:
    """Outputs of a file by the compiled kernels, where there are any."""
    try:
        runtime.library()
    except SqatError as error:
        pytest.skip(str(error))
    session = runtime.session(file, threads=1)
    names = [entry.name for entry in session.get_inputs()]
    outputs: list[Array] = session.run(None, {name: arrays(inputs)[name] for name in names})
    return outputs


def arrays(inputs: Inputs) -> Mapping[str, Array]:
    return {name: tensor.numpy() for name, tensor in inputs.items()}


def with_states(file: Path) -> Path:
    """A copy of a file with one more output: the states that the last layer puts out."""
    model = onnx.load(file)
    last = [node for node in model.graph.node if node.op_type == "Linear" and node.input[6]][-1]  # behind a norm
    model.graph.output.append(onnx.helper.make_tensor_value_info(last.output[0], onnx.TensorProto.FLOAT, None))
    copy = file.with_name("states.onnx")
    onnx.save(model, copy)
    return copy


ENGINES = {"oracle": by_oracle, "kernels": by_kernels}


def close(wanted: Array, got: Array) -> bool:
    """Whether logits agree but for rounding: a value on a tie moves by one step in one text or another, not in most."""
    differences = np.abs(wanted - got).max(-1)
    return bool(np.median(differences) < 1e-6 and differences.max() < 0.05 * wanted.std())
