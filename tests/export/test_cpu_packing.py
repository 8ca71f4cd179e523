"""Packed weights against an unpacker that reads them byte by byte, as their description says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqat.export.cpu.packing import is_sparse, pack, pack_dense, pack_sparse
from tests.export.cpu_oracle import unpack

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 50))


def weight(shape: tuple[int, int], kept: int, seed: int) -> np.ndarray:
    """Random int8 weights, ``kept`` of each 8 inputs not forced to 0."""
    draw = np.random.default_rng(seed)
    full = draw.integers(-127, 128, shape, dtype=np.int8)
    groups = -(-shape[1] // 8)
    order = draw.permuted(np.tile(np.arange(8), (shape[0], groups, 1)), axis=-1)
    return np.where((order < kept).reshape(shape[0], -1)[:, : shape[1]], full, 0).astype(np.int8)


@given(SIZES, st.integers(0, 4), st.integers(0, 99))
def test_sparse_weights_come_back(shape: tuple[int, int], kept: int, seed: int) -> None:
    made = weight(shape, kept, seed)
    values, positions = pack_sparse(made)
    tiles, inputs = -(-shape[0] // 16), 16 * -(-shape[1] // 16)
    assert positions is not None
    assert values.dtype == np.int8
    assert positions.dtype == np.uint8
    assert values.shape == (tiles, inputs // 8, 64)
    assert positions.shape == (tiles, inputs // 16, 64)
    assert np.array_equal(unpack(values, positions, *shape), made)
    assert not (positions & 0x88).any()


@given(SIZES, st.integers(0, 8), st.integers(0, 99))
def test_dense_weights_come_back(shape: tuple[int, int], kept: int, seed: int) -> None:
    made = weight(shape, kept, seed)
    values, positions = pack_dense(made)
    assert positions is None
    assert values.shape == (-(-shape[0] // 16), 4 * -(-shape[1] // 16), 64)
    assert np.array_equal(unpack(values, positions, *shape), made)


@given(SIZES, st.integers(0, 8), st.integers(0, 99))
def test_the_smaller_form_that_holds_a_weight_is_chosen(shape: tuple[int, int], kept: int, seed: int) -> None:
    made = weight(shape, kept, seed)
    fits = all(np.count_nonzero(row[at : at + 8]) <= 4 for row in made for at in range(0, shape[1], 8))
    assert is_sparse(made) == fits
    packed = pack(made)
    assert (packed.positions is not None) == fits
    assert np.array_equal(unpack(*packed, *shape), made)


def test_a_group_of_five_is_refused() -> None:
    made = np.zeros((3, 16), np.int8)
    made[2, 8:13] = 1
    with pytest.raises(ValueError, match="more than 4 of 8 weights are not 0"):
        pack_sparse(made)


def test_two_in_four_is_sparse_and_positions_ascend() -> None:
    made = np.tile(np.array([0, 5, 0, -6, 7, 0, 0, 8], np.int8), (16, 2))
    values, positions = pack_sparse(made)
    assert positions is not None
    assert values[0, 0, :4].tolist() == [5, -6, 7, 8]
    assert (positions[0, 0, :4] & 15).tolist() == [1, 3, 4, 7]
    assert (positions[0, 0, :4] >> 4).tolist() == [1, 3, 4, 7]
