"""torch's own CUTLASS packing on the int8 weights as they stand in the exported file: nothing is lost (rule C23)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import ModelProto, TensorProto, numpy_helper
from torch import Tensor
from torch.sparse import _semi_structured_conversions as conversions

from sqat.sparsity.semi_structured import pack
from tests.witnesses.flavours import FAMILIES, MINILM, build, exported

CASES = [("dq", name) for name in FAMILIES] + [("conv1x1-dq", "electra"), ("folded", "electra")]
COLUMNS = 64  # an even number of metadata words a row


def stored_weights(model: ModelProto) -> dict[str, Tensor]:
    """Int8 weights [N,K] in a file, by layer; MatMul stores [K,N], Conv [N,K,1,1]."""
    readers = {node.input[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    products = {name: node for node in model.graph.node for name in node.input}
    found = {}
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.INT8 and len(tensor.dims) > 1:
            product = products[readers[tensor.name].output[0]]
            values = torch.from_numpy(np.array(numpy_helper.to_array(tensor))).squeeze()
            found[tensor.name.partition(".weight")[0]] = values if product.op_type == "Conv" else values.t()
    return found


def widened(weight: Tensor) -> Tensor:
    """Zeros added to the right up to what CUTLASS takes; only the tiny families need it."""
    return torch.nn.functional.pad(weight, (0, -weight.shape[1] % COLUMNS)).contiguous()


@pytest.mark.parametrize(("flavour", "name"), [*CASES, pytest.param("dq", "minilm", marks=MINILM.marks)])
def test_every_stored_weight_survives_the_round_trip(flavour: str, name: str) -> None:
    weights = stored_weights(exported(flavour, name))
    assert set(weights) == set(build(name).weights)
    for layer, weight in weights.items():
        assert torch.equal(weight, build(name).weights[layer][0])
        dense = widened(weight)
        values, metadata = conversions.sparse_semi_structured_from_dense_cutlass(dense)
        assert values.shape == (dense.shape[0], dense.shape[1] // 2)
        assert (metadata.dtype, metadata.shape) == (torch.int32, (dense.shape[0], dense.shape[1] // 32))
        assert torch.equal(conversions.sparse_semi_structured_to_dense_cutlass(values, metadata), dense)
        ours = pack(dense, "cutlass")
        assert torch.equal(ours.values, values)
        assert torch.equal(ours.metadata, metadata)


def test_a_weight_that_is_not_2_of_4_does_not_survive() -> None:
    weight = widened(next(iter(stored_weights(exported("dq", "electra")).values())))
    weight[0, :4] = 1
    values, metadata = conversions.sparse_semi_structured_from_dense_cutlass(weight)
    assert not torch.equal(conversions.sparse_semi_structured_to_dense_cutlass(values, metadata), weight)
