"""Bit packing against numpy's packbits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sqat.sparsity.packing import pack_bits, unpack_bits


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=40))
def test_bits_are_numpy_little_endian_and_come_back(bits):
    mask = torch.tensor(bits, dtype=torch.bool)
    packed = pack_bits(mask)
    assert packed.tolist() == np.packbits(np.array(bits, dtype=bool), bitorder="little").tolist()
    assert torch.equal(unpack_bits(packed, mask.shape), mask)


def test_any_shape_and_stride_comes_back():
    mask = (torch.rand(5, 3, 7, generator=torch.Generator().manual_seed(0)) > 0.5).transpose(0, 2)
    assert torch.equal(unpack_bits(pack_bits(mask), mask.shape), mask)


@pytest.mark.parametrize(
    ("packed", "shape"),
    [
        (torch.zeros(2, dtype=torch.uint8), (2, 4)),
        (torch.zeros(0, dtype=torch.uint8), (1,)),
        (torch.zeros(1, dtype=torch.int8), (8,)),
        (torch.zeros(1, 1, dtype=torch.uint8), (8,)),
        (torch.tensor([0b10000], dtype=torch.uint8), (4,)),
    ],
)
def test_bytes_that_cannot_be_the_packing_are_refused(packed, shape):
    with pytest.raises(ValueError, match="mask of"):
        unpack_bits(packed, shape)


def test_only_masks_are_packed():
    with pytest.raises(ValueError, match=r"torch\.float32"):
        pack_bits(torch.ones(8))
