// Multiplying with AVX512-VNNI: activations stay u8, weights are used in place, and every channel starts from
// -128 * (sum of its weights). 2:4: broadcast 8 activations to every quadword, pick 4 for each channel with vpshufb
// (which ignores bits 4-6 of a position, and for which bit 3 picks the same byte again), multiply and add with
// vpdpbusd. Up to 12 rows by 32 channels: 24 of 32 registers hold sums.
#if defined(__x86_64__)
#include "engine.h"
#include "vnni.h"

namespace sqat {
namespace {

constexpr int kRows = 12;
constexpr int kTiles = 2;

void prepare_rows(const uint8_t* x, size_t stride, size_t count, size_t inputs, size_t padded, int zero,
                  uint8_t* rows) {
  const Bytes lowest = repeat_byte(zero != 0 ? 1 : 0);
  const size_t whole = inputs / kTileBytes * kTileBytes;
  for (size_t row = 0; row < count; ++row, x += stride, rows += padded) {
    for (size_t k = 0; k < whole; k += kTileBytes) store(rows + k, higher(load(x + k), lowest));
    if (whole == padded) continue;
    const Bytes last = load_first(inputs - whole, x + whole, repeat_byte(static_cast<uint8_t>(zero)));
    store_first(padded - whole, rows + whole, higher(last, lowest));
  }
}

void set_offsets(const Weights& weights, size_t tiles, int32_t* offsets) {
  const Bytes zero = repeat_byte(0), ones = repeat_byte(1);
  const size_t stride = weights.value_stride();
  for (size_t tile = 0; tile < tiles; ++tile, offsets += kTile) {
    Bytes sums = zero;
    for (size_t at = 0; at < stride; at += kTileBytes) sums = dot(sums, ones, load(weights.values + tile * stride + at));
    store(offsets, times_minus_128(sums));
  }
}

template <int kCount, int kWide>
struct Sums {
  Bytes at[kCount][kWide];

  inline __attribute__((always_inline)) void start(const int32_t* offsets) {
#pragma GCC unroll 16
    for (int row = 0; row < kCount; ++row) {
#pragma GCC unroll 2
      for (int tile = 0; tile < kWide; ++tile) at[row][tile] = load(offsets + tile * kTile);
    }
  }

  inline __attribute__((always_inline)) void finish(int32_t* out, size_t out_stride) const {
#pragma GCC unroll 16
    for (int row = 0; row < kCount; ++row) {
#pragma GCC unroll 2
      for (int tile = 0; tile < kWide; ++tile) store(out + row * out_stride + tile * kTile, at[row][tile]);
    }
  }
};

template <int kCount, int kWide>
__attribute__((noinline)) void sparse_tile(const uint8_t* __restrict rows, size_t row_stride, const Weights& weights,
                                           const int32_t* __restrict offsets, int32_t* __restrict out,
                                           size_t out_stride) {
  Sums<kCount, kWide> sums;
  sums.start(offsets);
  const size_t value_stride = weights.value_stride(), position_stride = weights.position_stride();
  const int8_t* __restrict values = weights.values;
  const uint8_t* __restrict positions = weights.positions;
  for (size_t k = 0; k < weights.padded; k += 16, rows += 16, values += 128, positions += 64) {
    Bytes at[kWide], weight[kWide];
#pragma GCC unroll 2
    for (int tile = 0; tile < kWide; ++tile) at[tile] = load(positions + tile * position_stride);
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
#pragma GCC unroll 2
      for (int tile = 0; tile < kWide; ++tile) {
        weight[tile] = load(values + tile * value_stride + odd * kTileBytes);
        if (odd) at[tile] = high_nibbles(at[tile]);
      }
#pragma GCC unroll 16
      for (int row = 0; row < kCount; ++row) {
        Bytes x = broadcast8(rows + row * row_stride + odd * 8);
#pragma GCC unroll 2
        for (int tile = 0; tile < kWide; ++tile) {
          sums.at[row][tile] = dot(sums.at[row][tile], select(x, at[tile]), weight[tile]);
        }
      }
    }
  }
  sums.finish(out, out_stride);
}

template <int kCount, int kWide>
__attribute__((noinline)) void dense_tile(const uint8_t* __restrict rows, size_t row_stride, const Weights& weights,
                                          const int32_t* __restrict offsets, int32_t* __restrict out,
                                          size_t out_stride) {
  Sums<kCount, kWide> sums;
  sums.start(offsets);
  const size_t value_stride = weights.value_stride();
  const int8_t* __restrict values = weights.values;
  for (size_t k = 0; k < weights.padded; k += 4, rows += 4, values += kTileBytes) {
    Bytes weight[kWide];
#pragma GCC unroll 2
    for (int tile = 0; tile < kWide; ++tile) weight[tile] = load(values + tile * value_stride);
#pragma GCC unroll 16
    for (int row = 0; row < kCount; ++row) {
      Bytes x = broadcast4(rows + row * row_stride);
#pragma GCC unroll 2
      for (int tile = 0; tile < kWide; ++tile) sums.at[row][tile] = dot(sums.at[row][tile], x, weight[tile]);
    }
  }
  sums.finish(out, out_stride);
}

using Tile = void (*)(const uint8_t*, size_t, const Weights&, const int32_t*, int32_t*, size_t);

constexpr Tile kSparse[kTiles][kRows] = {
    {sparse_tile<1, 1>, sparse_tile<2, 1>, sparse_tile<3, 1>, sparse_tile<4, 1>, sparse_tile<5, 1>, sparse_tile<6, 1>,
     sparse_tile<7, 1>, sparse_tile<8, 1>, sparse_tile<9, 1>, sparse_tile<10, 1>, sparse_tile<11, 1>,
     sparse_tile<12, 1>},
    {sparse_tile<1, 2>, sparse_tile<2, 2>, sparse_tile<3, 2>, sparse_tile<4, 2>, sparse_tile<5, 2>, sparse_tile<6, 2>,
     sparse_tile<7, 2>, sparse_tile<8, 2>, sparse_tile<9, 2>, sparse_tile<10, 2>, sparse_tile<11, 2>,
     sparse_tile<12, 2>}};
constexpr Tile kDense[kTiles][kRows] = {
    {dense_tile<1, 1>, dense_tile<2, 1>, dense_tile<3, 1>, dense_tile<4, 1>, dense_tile<5, 1>, dense_tile<6, 1>,
     dense_tile<7, 1>, dense_tile<8, 1>, dense_tile<9, 1>, dense_tile<10, 1>, dense_tile<11, 1>, dense_tile<12, 1>},
    {dense_tile<1, 2>, dense_tile<2, 2>, dense_tile<3, 2>, dense_tile<4, 2>, dense_tile<5, 2>, dense_tile<6, 2>,
     dense_tile<7, 2>, dense_tile<8, 2>, dense_tile<9, 2>, dense_tile<10, 2>, dense_tile<11, 2>, dense_tile<12, 2>}};

void multiply_sparse(const uint8_t* rows, size_t row_stride, size_t count, const Weights& weights, const uint8_t*,
                     size_t tiles, const int32_t* offsets, int32_t* out, size_t out_stride) {
  kSparse[tiles - 1][count - 1](rows, row_stride, weights, offsets, out, out_stride);
}

void multiply_dense(const uint8_t* rows, size_t row_stride, size_t count, const Weights& weights, const uint8_t*,
                    size_t tiles, const int32_t* offsets, int32_t* out, size_t out_stride) {
  kDense[tiles - 1][count - 1](rows, row_stride, weights, offsets, out, out_stride);
}

}  // namespace

const Gemm kSparseVnni{kRows, kTiles, 1, 0, prepare_rows, set_offsets, nullptr, multiply_sparse};
const Gemm kDenseVnni{kRows, kTiles, 1, 0, prepare_rows, set_offsets, nullptr, multiply_dense};

}  // namespace sqat
#endif
