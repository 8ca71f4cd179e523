"""Int8 weights in the order that the kernels of `sqat.runtime` read: tiles of 16 outputs, no copy at load.

Rows and columns are padded to 16 with zeros. N outputs, K inputs, T tiles of 16 outputs, L lanes of a tile, G groups of
8 inputs.

    sparse  values int8 [T, G, 64]: byte 4 l + j is the j-th kept weight of lane l in the group;
            positions uint8 [T, G / 2, 64]: its place (0..7) in the group, the even group's in the low four bits
    dense   values int8 [T, K / 4, 64]: byte 4 l + j is the weight of lane l at input 4 k + j
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

LANES, GROUP, KEPT, QUAD, SIDE = 16, 8, 4, 4, 16
Int8 = NDArray[np.int8]


class Packed(NamedTuple):
    """A packed weight; ``positions`` is None where it is dense."""

    values: Int8
    positions: NDArray[np.uint8] | None


def pack(weight_NK: Int8) -> Packed:  # noqa: N803
    """Pack a weight as sparse if it can be, else as dense."""
    return pack_sparse(weight_NK) if is_sparse(weight_NK) else pack_dense(weight_NK)


def is_sparse(weight_NK: Int8) -> bool:  # noqa: N803
    """Whether at most 4 of each 8 weights along the inputs are not 0."""
    return int((groups(weight_NK) != 0).sum(-1).max(initial=0)) <= KEPT


def pack_sparse(weight_NK: Int8) -> Packed:  # noqa: N803
    """Pack the kept weights and their positions.

    Raises:
        ValueError: a group keeps more than four weights.
    """
    weight_TLGi = groups(weight_NK)  # noqa: N806
    if not is_sparse(weight_NK):
        raise ValueError(f"more than {KEPT} of {GROUP} weights are not 0, which the sparse form does not hold")
    chosen_TLGj = np.sort(np.argsort(weight_TLGi == 0, axis=-1, kind="stable")[..., :KEPT])  # noqa: N806
    places_TGb = by_lane(chosen_TLGj.astype(np.uint8))  # noqa: N806
    values = by_lane(np.take_along_axis(weight_TLGi, chosen_TLGj, axis=-1))
    return Packed(values, places_TGb[:, ::2] | places_TGb[:, 1::2] << 4)


def pack_dense(weight_NK: Int8) -> Packed:  # noqa: N803
    """Pack all weights, four neighbours of a lane together."""
    padded = pad(weight_NK)
    return Packed(by_lane(padded.reshape(-1, LANES, padded.shape[1] // QUAD, QUAD)), None)


def groups(weight_NK: Int8) -> Int8:  # noqa: N803
    """Reshape [N,K], padded, to [T,L,G,8]."""
    padded = pad(weight_NK)
    return padded.reshape(-1, LANES, padded.shape[1] // GROUP, GROUP)


def by_lane(array_TLGj: NDArray[Any]) -> NDArray[Any]:  # noqa: N803
    """Reorder [T,L,G,4] to [T,G,64]."""
    tiles, _, count, _ = array_TLGj.shape
    return np.ascontiguousarray(array_TLGj.transpose(0, 2, 1, 3)).reshape(tiles, count, LANES * QUAD)


def pad(weight_NK: Int8) -> Int8:  # noqa: N803
    """Pad with zeros to whole tiles and pairs of groups."""
    outputs, inputs = weight_NK.shape
    return np.pad(weight_NK, ((0, -outputs % LANES), (0, -inputs % SIDE)))
