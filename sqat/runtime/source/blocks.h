// Running a product over the rows and tiles of a task; shared by Linear and Attention.
#pragma once

#include "engine.h"
#include "scratch.h"

namespace sqat {

// part(first, count) for `rows` split as evenly as parts of at most `most` allow.
template <typename Part>
void split_evenly(size_t rows, size_t most, const Part& part) {
  size_t parts = (rows + most - 1) / most;
  for (size_t i = 0, first = 0; i < parts; ++i) {
    size_t count = rows / parts + (i < rows % parts ? 1 : 0);
    part(first, count);
    first += count;
  }
}

// Prepared rows times tiles [first, end): then(tile, tiles, products) for one or more tiles at a time, with products
// int32 [count, tiles * 16]. Each tile is unpacked once for all rows, and what follows a product has all rows at once
// too.
template <typename Then>
void multiply_tiles(const Gemm& gemm, const Weights& weights, const int32_t* offsets, const uint8_t* rows, size_t count,
                    size_t first, size_t end, const Then& then) {
  static thread_local Scratch panels, results;
  const size_t row_stride = weights.padded * gemm.row_bytes;
  uint8_t* panel = gemm.panel_bytes ? panels.take<uint8_t>(weights.padded * gemm.panel_bytes) : nullptr;
  auto* products = results.take<int32_t>(count * gemm.max_tiles * kTile);
  for (size_t tile = first; tile < end; tile += gemm.max_tiles) {
    const size_t tiles = end - tile < gemm.max_tiles ? end - tile : gemm.max_tiles;
    const Weights here = weights.from(tile);
    const int32_t* start = offsets ? offsets + tile * kTile : nullptr;
    if (panel) gemm.prepare_panel(here, panel);
    split_evenly(count, gemm.max_rows, [&](size_t row, size_t some) {
      gemm.multiply(rows + row * row_stride, row_stride, some, here, panel, tiles, start,
                    products + row * tiles * kTile, tiles * kTile);
    });
    then(tile, tiles, products);
  }
}

}  // namespace sqat
