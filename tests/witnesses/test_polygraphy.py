"""Polygraphy's ``inspect sparsity``, the tool TensorRT users check 2:4 with: it finds every pruned layer sparse.

It reads float weights only (rule B4: an int8 initializer is passed over), so the flavours are those that have them.
Where the tool's own pruner can be asked it is, since it is what the command runs and a process costs a second.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper

from tests.witnesses.flavours import FAMILIES, build, exported

pytest.importorskip("polygraphy")
from polygraphy.logger import G_LOGGER
from polygraphy.tools.sparse import SparsityPruner

CASES = [("qdq", name) for name in FAMILIES]
CASES += [(flavour, "electra") for flavour in ("float", "onnx-fp16", "conv1x1", "fp16-qdq", "conv1x1-fp16")]
ENDINGS = (".weight_float", ".weight")


def found_sparse(model: ModelProto) -> set[str]:
    """Layers whose weight the tool calls sparse."""
    pruner = SparsityPruner(model)
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        pruner.check()
    return {name.removesuffix(ending) for name in pruner.sparse_tensors for ending in ENDINGS if name.endswith(ending)}


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize(("flavour", "name"), CASES)
def test_every_pruned_layer_is_found_sparse(flavour: str, name: str) -> None:
    assert found_sparse(exported(flavour, name)) >= set(build(name).weights)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_a_layer_that_is_not_sparse_is_not() -> None:
    model = ModelProto()
    model.CopyFrom(exported("qdq", "electra"))
    layer = "electra.encoder.layer.0.output.dense"
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == f"{layer}.weight_float")
    values = np.array(numpy_helper.to_array(tensor))
    values[:4, 5] = 1.0
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    assert set(build("electra").weights) - found_sparse(model) == {layer}


def test_the_command_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(exported("qdq", "electra"), path)
    command = [sys.executable, "-c", "from polygraphy.tools import main; main()", "inspect", "sparsity", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "Found sparse tensor: " in line]
    names = {line.rpartition(" ")[2].removesuffix(".weight_float") for line in lines}
    assert names == set(build("electra").weights)
