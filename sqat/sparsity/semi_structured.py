"""2:4 weights as sparse tensor cores read them: the kept values and, for each, its place in its group of four.

Unlike torch's packing for CUTLASS, which drops values of a weight that is not 2:4, this refuses them; the bits are the
same (rule C23).

Shapes: a weight [N,K] becomes values [N,K/2] and metadata, int32 [N,K/32] or int16 [N,K/16].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

# Metadata has four bits a group: the lower place in the low two bits, the first group in the lowest bits of a word.
# "rows" has word j of row i at [i,j]. "cutlass" has the words in CUTLASS's ColumnMajorInterleaved<2> after its
# reordering, which needs 16 rows at a time (32 beside 16-bit values) and an even number of words a row.
Order = Literal["rows", "cutlass"]


@dataclass(frozen=True, eq=False)
class SemiStructured:
    """A packed weight [N,K]; ValueError where the two tensors cannot belong together.

    Attributes:
        values: [N,K/2], int8, float16 or bfloat16.
        metadata: int32 [N,K/32] or int16 [N,K/16].
        order: of the metadata's words.
    """

    values: Tensor
    metadata: Tensor
    order: Order = "rows"

    def __post_init__(self) -> None:
        dtype = METADATA.get(self.values.dtype)
        if dtype is None or self.values.dim() != 2:
            raise ValueError(f"values must be [N, K/2] of {TYPES}, got {describe(self.values)}")
        rows, columns = self.shape
        expected = (rows, columns // inputs_per_word(dtype))
        if self.metadata.dtype != dtype or self.metadata.shape != expected or columns % inputs_per_word(dtype):
            raise ValueError(
                f"values {describe(self.values)} need metadata {dtype} {list(expected)}, got {describe(self.metadata)}"
            )
        if self.order == "cutlass":
            check_blocks(self.metadata)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight (N, K)."""
        return self.values.shape[0], 2 * self.values.shape[1]

    @property
    def bytes(self) -> int:
        """Bytes of values and metadata."""
        return self.values.nbytes + self.metadata.nbytes

    def to_order(self, order: Order) -> SemiStructured:
        """Return the same weight with its metadata in another order."""
        if order == self.order:
            return self
        words = to_cutlass(self.metadata) if order == "cutlass" else from_cutlass(self.metadata)
        return replace(self, metadata=words, order=order)


def pack(weight: Tensor, order: Order = "rows") -> SemiStructured:
    """Pack a 2:4 weight.

    Args:
        weight: [N,K], int8, float16 or bfloat16, at most two non-zeros in each aligned group of four along K. A group
            with fewer keeps zeros too.

    Raises:
        ValueError: the type or shape cannot be packed, or a group has more non-zeros.
    """
    dtype = METADATA.get(weight.dtype)
    if dtype is None or weight.dim() != 2:
        raise ValueError(f"a weight must be [N, K] of {TYPES}, got {describe(weight)}")
    rows, columns = weight.shape
    if columns % inputs_per_word(dtype):
        raise ValueError(f"{columns} inputs of {describe(weight)} are not a multiple of {inputs_per_word(dtype)}")
    groups = weight.reshape(rows, columns // 4, 4)
    kept = (groups != 0).to(torch.uint8)
    patterns = kept[..., 0] | kept[..., 1] << 1 | kept[..., 2] << 2 | kept[..., 3] << 3
    places = torch.tensor(PLACES, dtype=torch.uint8, device=weight.device)[patterns.long()]
    check_places(places, "hold more than 2 non-zeros")
    indices = torch.stack((places & 3, places >> 2), dim=-1).long()
    values = groups.gather(-1, indices).reshape(rows, columns // 2)
    words = (places[:, 0::2] | places[:, 1::2] << 4).contiguous().view(dtype)
    return SemiStructured(values, words).to_order(order)


def unpack(packed: SemiStructured) -> Tensor:
    """Return the dense weight [N,K], on the device of its parts.

    Raises:
        ValueError: a word holds two places that do not increase, which `pack` never writes.
    """
    rows, columns = packed.shape
    words = packed.to_order("rows").metadata.contiguous().view(torch.uint8)
    places = torch.stack((words & 15, words >> 4), dim=-1).view(rows, columns // 4)
    low, high = places & 3, places >> 2
    check_places(
        torch.where(low < high, places, INVALID), "name two places that do not increase: the metadata is damaged"
    )
    dense = packed.values.new_zeros(rows, columns // 4, 4)
    dense.scatter_(-1, torch.stack((low, high), dim=-1).long(), packed.values.view(rows, columns // 4, 2))
    return dense.view(rows, columns)


def check_places(places: Tensor, complaint: str) -> None:
    """Raise ValueError, with the number of them and the place of the first, where groups [N,K/4] are invalid."""
    bad = places == INVALID
    if bool(bad.any()):
        row, group = (int(index) for index in bad.nonzero()[0])
        raise ValueError(
            f"{int(bad.sum())} of {bad.numel()} groups of four {complaint}; "
            f"the first is row {row}, columns {4 * group} to {4 * group + 3}"
        )


# A word keeps its row's place within a block of 16 (or 32) rows as [a,b], b counting 8. CUTLASS stores such a block
# as [b,a], swaps the lowest bit of a with that of the word's column, and lays pairs of columns one after another.


def to_cutlass(metadata: Tensor) -> Tensor:
    """Return words [N,W] in the order in which CUTLASS reads them; ValueError where N or W does not allow it."""
    blocks = check_blocks(metadata)
    rows, words = metadata.shape
    split = metadata.reshape(rows // (16 * blocks), blocks, 2, 8, words // 2, 2)
    return split.permute(4, 0, 3, 1, 5, 2).reshape(rows, words)


def from_cutlass(metadata: Tensor) -> Tensor:
    """Undo `to_cutlass`."""
    blocks = check_blocks(metadata)
    rows, words = metadata.shape
    split = metadata.reshape(words // 2, rows // (16 * blocks), 8, blocks, 2, 2)
    return split.permute(1, 3, 5, 2, 0, 4).reshape(rows, words)


def check_blocks(metadata: Tensor) -> int:
    """Return how many times 16 rows a block of CUTLASS has; ValueError where the words cannot be reordered."""
    blocks = 2 if metadata.dtype == torch.int16 else 1
    rows, words = metadata.shape
    if rows % (16 * blocks) or words % 2:
        raise ValueError(
            f"metadata {describe(metadata)} cannot be ordered for CUTLASS: "
            f"rows must be a multiple of {16 * blocks}, words of 2"
        )
    return blocks


def unsupported_reason(backend: str, shape: tuple[int, int], dtype: torch.dtype) -> str:
    """Say why a backend of `SHAPE_MULTIPLES` cannot take a sparse weight of a shape (N, K); empty where it can."""
    multiples = SHAPE_MULTIPLES[backend].get(dtype)
    if multiples is None:
        return f"{backend} has no sparse {dtype}"
    if shape[0] % multiples[0] or shape[1] % multiples[1] or 0 in shape:
        return f"[{shape[0]}, {shape[1]}] is not a multiple of [{multiples[0]}, {multiples[1]}], as {backend} needs"
    return ""


def inputs_per_word(metadata: torch.dtype) -> int:
    """Return how many inputs one word of metadata describes."""
    return 8 * metadata.itemsize


def describe(tensor: Tensor) -> str:
    """Return type and shape."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


# Type of the values -> type of the metadata.
METADATA = {torch.int8: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}

TYPES = ", ".join(str(dtype).removeprefix("torch.") for dtype in METADATA)

# Places (low | high << 2) by which of four are non-zero (bit i: place i), as torch's function chooses them.
INVALID = 255
PLACES = (14, 8, 9, 4, 14, 8, 9, INVALID, 14, 12, 13, INVALID, 14, INVALID, INVALID, INVALID)

# Sparse weights [N,K] must be multiples of these (rule C23).
SHAPE_MULTIPLES: dict[str, dict[torch.dtype, tuple[int, int]]] = {
    "cusparselt": {torch.int8: (32, 32), torch.float16: (16, 16), torch.bfloat16: (16, 16)},
    "cutlass": {torch.int8: (16, 128), torch.float16: (32, 64), torch.bfloat16: (32, 64)},
}
