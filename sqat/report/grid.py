"""Layers as the grid of a heat map: a row for each block and a column for each part of it.

Encoders have the same parts in every block. Layers of other models (U-Net, RegNet) keep their order, a fixed number
in a row.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from sqat.lint.layer_row import LayerRow

BLOCK = re.compile(r"^(.*?\.\d+)\.(.+)$")
MIN_FILLED, NUM_COLUMNS = 0.7, 12


class Grid(NamedTuple):
    """Rows and columns of layers.

    Attributes:
        cells: None if a block has no such part.
        outside: layers that are in no block.
        regular: whether rows are blocks.
    """

    rows: list[str]
    columns: list[str]
    cells: list[list[LayerRow | None]]
    outside: list[LayerRow]
    regular: bool


def make_grid(layers: Sequence[LayerRow]) -> Grid:
    """Arrange layers by block and part, or in their order if they have no common parts."""
    matches = {layer.name: match for layer in layers if (match := BLOCK.match(layer.name))}
    rows = list(dict.fromkeys(match[1] for match in matches.values()))
    columns = list(dict.fromkeys(match[2] for match in matches.values()))
    if len(rows) < 2 or len(columns) > NUM_COLUMNS or len(matches) < MIN_FILLED * len(rows) * len(columns):
        return ordered_grid(layers)
    by_place = {(match[1], match[2]): layer for layer in layers if (match := matches.get(layer.name))}
    cells = [[by_place.get((row, column)) for column in columns] for row in rows]
    outside = [layer for layer in layers if layer.name not in matches]
    return Grid([row.rpartition(".")[2] for row in rows], short_names(columns), cells, outside, True)


def ordered_grid(layers: Sequence[LayerRow]) -> Grid:
    """Arrange layers in the model's order, `NUM_COLUMNS` in a row."""
    cells: list[list[LayerRow | None]] = []
    for start in range(0, len(layers), NUM_COLUMNS):
        row = layers[start : start + NUM_COLUMNS]
        cells.append([*row, *[None] * (NUM_COLUMNS - len(row))])
    rows = [str(NUM_COLUMNS * number + 1) for number in range(len(cells))]
    return Grid(rows, [""] * NUM_COLUMNS, cells, [], False)


def short_names(names: Sequence[str]) -> list[str]:
    """Shorten names to their last words: two at least, and as many as keep them different."""
    for count in range(2, 1 + max((name.count(".") + 1 for name in names), default=1)):
        short = [".".join(name.split(".")[-count:]) for name in names]
        if len(set(short)) == len(names):
            return short
    return list(names)
