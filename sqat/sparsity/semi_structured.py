"""2:4 weights as sparse tensor cores read them: the kept values and, for each, its place in its group of four.

Why our own: torch packs for CUTLASS in a private module whose function never refuses a weight that is not 2:4
(it drops values), and cuSPARSELt packs on a GPU only. This packs anywhere, bit for bit as torch's function does
(rule C23), and refuses what it would lose. What torch's CUTLASS operators take is `SemiStructured` in the order
``cutlass``; what cuSPARSELt needs is the dense weight, which `unpack` gives back and torch compresses on the GPU.

A weight [N,K] (output channels, inputs) becomes
    values    [N,K/2] of its type: two of each aligned group of four along K, in order of place
    metadata  int32 [N,K/32] beside int8 values, int16 [N,K/16] beside float16 and bfloat16: four bits a group, the
              lower place in the low two bits, the first group in the lowest bits of a word
A group with fewer than two non-zeros keeps zeros too, at the places `PLACES` gives. The order ``rows`` has word j of
row i at [i,j]; ``cutlass`` has the words where CUTLASS expects them (its ColumnMajorInterleaved<2> after its
reordering), which needs 16 rows at a time (32 beside 16-bit values) and an even number of words a row.

Left out: float32 (1:2), float8, and the packing of a weight and its transpose at once, which training needs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

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
        kind = METADATA.get(self.values.dtype)
        if kind is None or self.values.dim() != 2:
            raise ValueError(f"values must be [N, K/2] of {types()}, got {describe(self.values)}")
        rows, columns = self.shape
        wanted = (rows, columns // per_word(kind))
        if self.metadata.dtype != kind or self.metadata.shape != wanted or columns % per_word(kind):
            raise ValueError(
                f"values {describe(self.values)} need metadata {kind} {list(wanted)}, got {describe(self.metadata)}"
            )
        if self.order == "cutlass":
            check_blocks(self.metadata)

    @property
    def shape(self) -> tuple[int, int]:
        """Size of the weight (N, K)."""
        return self.values.shape[0], 2 * self.values.shape[1]

    @property
    def bytes(self) -> int:
        """Bytes of values and metadata."""
        return self.values.nbytes + self.metadata.nbytes

    def ordered(self, order: Order) -> SemiStructured:
        """The same weight with its metadata in another order."""
        if order == self.order:
            return self
        moved = to_cutlass(self.metadata) if order == "cutlass" else from_cutlass(self.metadata)
        return replace(self, metadata=moved, order=order)


def pack(weight: Tensor, order: Order = "rows") -> SemiStructured:
    """Pack a 2:4 weight.

    Args:
        weight: [N,K], int8, float16 or bfloat16, at most two non-zeros in each aligned group of four along K.

    Raises:
        ValueError: another type or shape, or a group with more non-zeros: how many, and where the first is.
    """
    kind = METADATA.get(weight.dtype)
    if kind is None or weight.dim() != 2:
        raise ValueError(f"a weight must be [N, K] of {types()}, got {describe(weight)}")
    rows, columns = weight.shape
    if columns % per_word(kind):
        raise ValueError(f"{columns} inputs of {describe(weight)} are not a multiple of {per_word(kind)}")
    groups = weight.reshape(rows, columns // 4, 4)
    kept = (groups != 0).to(torch.uint8)
    patterns = kept[..., 0] | kept[..., 1] << 1 | kept[..., 2] << 2 | kept[..., 3] << 3
    places = torch.tensor(PLACES, dtype=torch.uint8, device=weight.device)[patterns.long()]
    check_places(places, "hold more than 2 non-zeros")
    indices = torch.stack((places & 3, places >> 2), dim=-1).long()
    values = groups.gather(-1, indices).reshape(rows, columns // 2)
    words = (places[:, 0::2] | places[:, 1::2] << 4).contiguous().view(kind)
    return SemiStructured(values, words).ordered(order)


def unpack(packed: SemiStructured) -> Tensor:
    """Undo `pack`: the dense weight [N,K], on the device of its parts.

    Raises:
        ValueError: a word that no packing writes (its two places do not rise).
    """
    rows, columns = packed.shape
    words = packed.ordered("rows").metadata.contiguous().view(torch.uint8)
    places = torch.stack((words & 15, words >> 4), dim=-1).view(rows, columns // 4)
    low, high = places & 3, places >> 2
    check_places(torch.where(low < high, places, NEITHER), "name two places that do not rise: the metadata is damaged")
    dense = packed.values.new_zeros(rows, columns // 4, 4)
    dense.scatter_(-1, torch.stack((low, high), dim=-1).long(), packed.values.view(rows, columns // 4, 2))
    return dense.view(rows, columns)


def check_places(places: Tensor, complaint: str) -> None:
    """Raise ValueError if a group [N,K/4] is marked as impossible: how many, and where the first is."""
    bad = places == NEITHER
    if bool(bad.any()):
        row, group = (int(index) for index in bad.nonzero()[0])
        raise ValueError(
            f"{int(bad.sum())} of {bad.numel()} groups of four {complaint}; "
            f"the first is row {row}, columns {4 * group} to {4 * group + 3}"
        )


# A word keeps its row's place within a block of 16 (or 32) rows as [a,b], b counting 8. CUTLASS stores such a block
# as [b,a], swaps the lowest bit of a with that of the word's column, and lays pairs of columns one after another.


def to_cutlass(metadata: Tensor) -> Tensor:
    """Words [N,W] in the order CUTLASS reads them; ValueError where N or W does not allow it."""
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
    """How often 16 rows make a block of CUTLASS; ValueError where the words cannot be reordered."""
    blocks = 2 if metadata.dtype == torch.int16 else 1
    rows, words = metadata.shape
    if rows % (16 * blocks) or words % 2:
        raise ValueError(
            f"metadata {describe(metadata)} cannot be ordered for CUTLASS: "
            f"rows must be a multiple of {16 * blocks}, words of 2"
        )
    return blocks


def why_not(backend: str, shape: tuple[int, int], kind: torch.dtype) -> str:
    """Why a backend cannot take a sparse weight of a shape (N, K) and type; empty if it can.

    Args:
        backend: a key of `SMALLEST`.
    """
    smallest = SMALLEST[backend].get(kind)
    if smallest is None:
        return f"{backend} has no sparse {kind}"
    if shape[0] % smallest[0] or shape[1] % smallest[1] or 0 in shape:
        return f"[{shape[0]}, {shape[1]}] is not a multiple of [{smallest[0]}, {smallest[1]}], as {backend} needs"
    return ""


def per_word(metadata: torch.dtype) -> int:
    """Inputs that one word of metadata tells of."""
    return 8 * metadata.itemsize


def types() -> str:
    return ", ".join(str(kind).removeprefix("torch.") for kind in METADATA)


def describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


METADATA = {torch.int8: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}

# Places (low | high << 2) by which of four are non-zero (bit i: place i), as torch's function chooses them.
NEITHER = 255
PLACES = (14, 8, 9, 4, 14, 8, 9, NEITHER, 14, 12, 13, NEITHER, 14, NEITHER, NEITHER, NEITHER)

# Sparse weights [N,K] must be multiples of these (rule C23).
SMALLEST: dict[str, dict[torch.dtype, tuple[int, int]]] = {
    "cusparselt": {torch.int8: (32, 32), torch.float16: (16, 16), torch.bfloat16: (16, 16)},
    "cutlass": {torch.int8: (16, 128), torch.float16: (32, 64), torch.bfloat16: (32, 64)},
}
