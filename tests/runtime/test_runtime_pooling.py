"""sqat.MeanPool against sums in the order of the tokens, for any number of threads, padding and instruction set."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto

from tests.runtime.nodes import Node, available, needs_library

pytestmark = needs_library


def node(states: NDArray[np.float32], mask: NDArray[np.int64]) -> Node:
    return Node("MeanPool", {"states": states, "mask": mask}, {}, ("states", "mask"), {"Y": TensorProto.FLOAT})


def in_order(states: NDArray[np.float32], mask: NDArray[np.int64]) -> NDArray[np.float32]:
    """Sums of real tokens, one after the other, in float32."""
    out = np.zeros((len(states), states.shape[2]), np.float32)
    for row, (tokens, kept) in enumerate(zip(states, mask, strict=True)):
        for token in tokens[kept != 0]:
            out[row] += token
        out[row] /= np.float32(max(kept.sum(), 1e-9))
    return out


@pytest.mark.parametrize("width", [7, 128, 384, 500])
@pytest.mark.parametrize(("texts", "tokens"), [(1, 1), (1, 512), (2, 64), (3, 17), (32, 40)])
def test_a_mean_is_that_of_sums_in_order(texts: int, tokens: int, width: int) -> None:
    rng = np.random.default_rng(width + tokens)
    states = rng.normal(size=(texts, tokens, width)).astype(np.float32)
    mask = (np.arange(tokens) < rng.integers(1, tokens + 1, (texts, 1))).astype(np.int64)
    wanted = in_order(states, mask)
    np.testing.assert_allclose(wanted, np.average(states, 1, np.broadcast_to(mask[..., None], states.shape)), atol=1e-5)
    for threads in (1, 2, 3, 4, 8):
        assert np.array_equal(node(states, mask).run(threads=threads)[0], wanted)


@pytest.mark.parametrize("isa", available())
def test_padding_on_either_side_and_an_empty_text(isa: str) -> None:
    states = np.random.default_rng(0).normal(size=(2, 9, 33)).astype(np.float32)
    mask = np.array([[1] * 9, [0] * 9])
    (alone,) = node(states, mask).run(isa)
    assert not alone[1].any()
    for before, after in ((0, 7), (7, 0), (3, 40)):
        padded = np.pad(states, ((0, 0), (before, after), (0, 0)), constant_values=3.0)
        (got,) = node(padded, np.pad(mask, ((0, 0), (before, after)))).run(isa)
        assert np.array_equal(got, alone)


@pytest.mark.parametrize(
    ("states", "mask"), [((2, 9), (2, 9)), ((2, 9, 3), (2, 8)), ((2, 9, 3), (1, 9)), ((2, 9, 3), (2, 9, 1))]
)
def test_shapes_that_do_not_fit_are_refused(states: tuple[int, ...], mask: tuple[int, ...]) -> None:
    with pytest.raises(Exception, match=r"sqat\.MeanPool"):
        node(np.zeros(states, np.float32), np.zeros(mask, np.int64)).run()
