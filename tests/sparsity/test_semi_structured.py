"""Packing against torch's own CUTLASS conversion, bit for bit, and against bits read one by one."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from sqat.sparsity.semi_structured import (
    SHAPE_MULTIPLES,
    SemiStructured,
    from_cutlass,
    pack,
    to_cutlass,
    unpack,
    unsupported_reason,
)

TYPES = (torch.int8, torch.float16, torch.bfloat16)
ALLOWED = [kept for count in range(3) for kept in combinations(range(4), count)]  # the 11 ways to keep at most two
WORD = {torch.int8: 32, torch.float16: 16, torch.bfloat16: 16}
LARGEST = {torch.int8: 127, torch.float16: 60000, torch.bfloat16: 60000}


def sparse_weight(rows: int, columns: int, kind: torch.dtype, seed: int) -> Tensor:
    """Every group keeps one of the 11 patterns, some rows keep nothing; kept values are never zero."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(len(ALLOWED), 4, dtype=torch.bool)
    for number, kept in enumerate(ALLOWED):
        masks[number, list(kept)] = True
    mask = masks[torch.randint(len(ALLOWED), (rows, columns // 4), generator=generator)].view(rows, columns)
    mask[torch.rand(rows, generator=generator) < 0.1] = False
    sizes = torch.randint(1, LARGEST[kind] + 1, (rows, columns), generator=generator)
    signs = torch.randint(2, (rows, columns), generator=generator) * 2 - 1
    return (sizes * signs * mask).to(kind) + 0


weights = st.builds(
    lambda blocks, words, kind, seed: sparse_weight(32 * blocks, 2 * words * WORD[kind], kind, seed),
    st.integers(1, 4),
    st.integers(1, 5),
    st.sampled_from(TYPES),
    st.integers(0, 2**32),
)


@given(weights)
@settings(max_examples=60, deadline=None)
def test_packing_equals_torchs_bit_for_bit(weight: Tensor) -> None:
    values, metadata = sparse_semi_structured_from_dense_cutlass(weight)
    packed = pack(weight, "cutlass")
    assert packed.metadata.dtype == metadata.dtype
    assert torch.equal(packed.metadata, metadata)
    assert torch.equal(packed.values, values)
    assert packed.shape == tuple(weight.shape)
    assert packed.bytes == values.nbytes + metadata.nbytes


@given(weights)
@settings(max_examples=60, deadline=None)
def test_unpacking_inverts_packing_by_us_and_by_torch(weight: Tensor) -> None:
    for order in ("rows", "cutlass"):
        packed = pack(weight, order)
        dense = unpack(packed)
        assert torch.equal(dense, weight)
        assert dense.dtype == weight.dtype
    assert torch.equal(unpack(SemiStructured(*sparse_semi_structured_from_dense_cutlass(weight), "cutlass")), weight)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(packed.values, packed.metadata), weight)


@given(weights)
@settings(max_examples=20, deadline=None)
def test_metadata_read_bit_by_bit_names_the_places(weight: Tensor) -> None:
    packed = pack(weight)
    rows, columns = weight.shape
    bits = WORD[weight.dtype]
    words = [[int(word) % 2**bits for word in row] for row in packed.metadata]
    for row in range(0, rows, 7):
        for group in range(columns // 4):
            four = words[row][4 * group // bits] >> (4 * group % bits) & 0b1111
            low, high = four & 0b11, four >> 2
            kept = weight[row, 4 * group : 4 * group + 4].tolist()
            stored = packed.values[row, 2 * group : 2 * group + 2].tolist()
            assert low < high
            assert stored == [kept[low], kept[high]]
            assert not any(value for place, value in enumerate(kept) if place not in (low, high))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("pair", list(combinations(range(4), 2)))
def test_two_non_zeros_have_their_own_places(kind: torch.dtype, pair: tuple[int, int]) -> None:
    weight = torch.zeros(1, WORD[kind], dtype=kind)
    weight[0, 4 + pair[0]], weight[0, 4 + pair[1]] = 3, -5
    packed = pack(weight)
    assert int(packed.metadata[0, 0]) >> 4 & 15 == pair[0] + 4 * pair[1]
    assert packed.values[0, 2:4].tolist() == [3, -5]


@given(
    st.integers(1, 5), st.integers(1, 6), st.sampled_from([torch.int16, torch.int32]), st.integers(0, 2**32)
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_reordering_words_has_an_inverse(blocks: int, pairs: int, kind: torch.dtype, seed: int) -> None:
    limits = torch.iinfo(kind)
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(limits.min, limits.max, (32 * blocks, 2 * pairs), generator=generator).to(kind)
    assert torch.equal(from_cutlass(to_cutlass(words)), words)
    assert torch.equal(to_cutlass(words).flatten().sort().values, words.flatten().sort().values)
    stored = pack(sparse_weight(32, 64, torch.int8, seed), "cutlass")
    assert torch.equal(stored.to_order("rows").to_order("cutlass").metadata, stored.metadata)


def test_a_weight_that_is_not_2_4_is_refused_where_torch_drops_values() -> None:
    weight = sparse_weight(32, 64, torch.int8, 0)
    weight[5, 8:12] = torch.tensor([1, 2, 3, 0])
    weight[7, 60:64] = 1
    values, metadata = sparse_semi_structured_from_dense_cutlass(weight)
    assert not torch.equal(sparse_semi_structured_to_dense_cutlass(values, metadata), weight)
    with pytest.raises(ValueError, match=r"2 of 512 groups of four hold more than 2 .* row 5, columns 8 to 11"):
        pack(weight)


def test_negative_zeros_are_zeros_and_a_packed_zero_weight_is_exact() -> None:
    weight = torch.full((32, 32), -0.0, dtype=torch.float16)
    weight[:, ::4] = 2.0
    assert torch.equal(unpack(pack(weight, "cutlass")), weight)
    nothing = pack(torch.zeros(32, 32, dtype=torch.float16))
    assert not nothing.values.view(torch.int16).any(), "zeros are +0.0"
    assert not unpack(nothing).any()


def test_damaged_metadata_is_refused() -> None:
    packed = pack(sparse_weight(32, 64, torch.int8, 1))
    words = packed.metadata.clone()
    words[3, 1] = 0  # both places 0, in eight groups
    with pytest.raises(
        ValueError, match=r"8 of 512 groups of four name two places that do not increase.*row 3, columns 32"
    ):
        unpack(replace(packed, metadata=words))


@pytest.mark.parametrize(
    ("weight", "problem"),
    [
        (torch.zeros(32, 64), "float32"),
        (torch.zeros(64, dtype=torch.int8), r"\[N, K\]"),
        (torch.zeros(16, 48, dtype=torch.int8), "48 inputs .* multiple of 32"),
        (torch.zeros(16, 24, dtype=torch.float16), "24 inputs .* multiple of 16"),
    ],
)
def test_weights_that_cannot_be_packed_are_refused(weight: Tensor, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        pack(weight)


@pytest.mark.parametrize(
    ("shape", "kind", "problem"),
    [
        ((24, 64), torch.int8, "multiple of 16, words of 2"),
        ((16, 32), torch.int8, "multiple of 16, words of 2"),
        ((48, 64), torch.float16, "multiple of 32, words of 2"),
    ],
)
def test_shapes_that_cutlass_cannot_order_are_refused(shape: tuple[int, int], kind: torch.dtype, problem: str) -> None:
    assert unpack(pack(torch.zeros(shape, dtype=kind))).shape == shape
    with pytest.raises(ValueError, match=problem):
        pack(torch.zeros(shape, dtype=kind), "cutlass")


def test_values_and_metadata_must_belong_together() -> None:
    packed = pack(torch.zeros(32, 64, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"need metadata torch.int32 \[32, 2\]"):
        SemiStructured(packed.values, packed.metadata[:16])
    with pytest.raises(ValueError, match="need metadata"):
        SemiStructured(packed.values, packed.metadata.to(torch.int16))
    with pytest.raises(ValueError, match="values must be"):
        SemiStructured(packed.values.float(), packed.metadata)


def test_shape_multiples_are_torchs() -> None:
    peers = {"cutlass": SparseSemiStructuredTensorCUTLASS, "cusparselt": SparseSemiStructuredTensorCUSPARSELT}
    for backend, peer in peers.items():
        for kind in TYPES:
            known = peer._DTYPE_SHAPE_CONSTRAINTS[kind]
            rows, columns = SHAPE_MULTIPLES[backend][kind]
            assert (rows, columns) == (known.sparse_min_rows, known.sparse_min_cols)
            assert unsupported_reason(backend, (3 * rows, 5 * columns), kind) == ""
            for bad in ((rows // 2, columns), (rows, columns // 2), (rows, columns + 8), (0, columns)):
                assert f"[{bad[0]}, {bad[1]}] is not a multiple of [{rows}, {columns}]" in unsupported_reason(
                    backend, bad, kind
                )
        assert "float32" in unsupported_reason(backend, (64, 128), torch.float32)
