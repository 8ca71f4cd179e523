"""Layers as a grid that a heat map can show: a row for each block and a column for each part of it.

Encoders have the same parts in every block. A model that has not (a U-Net, a RegNet) is laid out in its own order
instead, a fixed number in a row; the table below the map has the names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from sqat.lint.layer_row import LayerRow

BLOCK = re.compile(r"^(.*?\.\d+)\.(.+)$")
FILLED, WIDE = 0.7, 12


class Grid(NamedTuple):
    """Rows and columns of layers; None where a block has no such part. ``outside``: layers that are in no block."""

    rows: list[str]
    columns: list[str]
    cells: list[list[LayerRow | None]]
    outside: list[LayerRow]
    regular: bool


def make_grid(layers: Sequence[LayerRow]) -> Grid:
    """Lay layers out."""
    placed = {layer.name: match for layer in layers if (match := BLOCK.match(layer.name))}
    rows = list(dict.fromkeys(match[1] for match in placed.values()))
    columns = list(dict.fromkeys(match[2] for match in placed.values()))
    if len(rows) < 2 or len(columns) > WIDE or len(placed) < FILLED * len(rows) * len(columns):
        return in_order(layers)
    known = {(match[1], match[2]): layer for layer in layers if (match := placed.get(layer.name))}
    cells = [[known.get((row, column)) for column in columns] for row in rows]
    outside = [layer for layer in layers if layer.name not in placed]
    return Grid([short_block(row) for row in rows], short_parts(columns), cells, outside, True)


def in_order(layers: Sequence[LayerRow]) -> Grid:
    """Layers in the model's order, `WIDE` in a row."""
    cells: list[list[LayerRow | None]] = []
    for start in range(0, len(layers), WIDE):
        some = layers[start : start + WIDE]
        cells.append([*some, *[None] * (WIDE - len(some))])
    rows = [str(WIDE * number + 1) for number in range(len(cells))]
    return Grid(rows, ["" for _ in range(WIDE)], cells, [], False)


def short_block(name: str) -> str:
    """``0`` of ``encoder.layer.0``."""
    return name.rpartition(".")[2]


def short_parts(names: Sequence[str]) -> list[str]:
    """As few last words of each name as tell all of them apart, two at least."""
    for count in range(2, 1 + max((name.count(".") + 1 for name in names), default=1)):
        short = [".".join(name.split(".")[-count:]) for name in names]
        if len(set(short)) == len(names):
            return short
    return list(names)
