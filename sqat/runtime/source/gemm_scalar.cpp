// Multiplying in plain C++: for processors without a faster way, and the oracle of those that have one.
#include "engine.h"

namespace sqat {
namespace {

void prepare_rows(const uint8_t* x, size_t stride, size_t count, size_t inputs, size_t padded, int zero,
                  uint8_t* rows) {
  auto* out = reinterpret_cast<int16_t*>(rows);
  for (size_t row = 0; row < count; ++row, x += stride, out += padded) {
    for (size_t k = 0; k < padded; ++k) {
      int value = k < inputs ? x[k] : zero;
      out[k] = static_cast<int16_t>((zero != 0 && value == 0 ? 1 : value) - zero);
    }
  }
}

void multiply_sparse(const uint8_t* rows, size_t row_stride, size_t count, const Weights& weights, const uint8_t*,
                     size_t, const int32_t*, int32_t* out, size_t out_stride) {
  for (size_t row = 0; row < count; ++row) {
    auto* x = reinterpret_cast<const int16_t*>(rows + row * row_stride);
    int32_t sums[kTile] = {};
    for (size_t group = 0; group < weights.padded / 8; ++group) {
      const int8_t* values = weights.values + group * kTileBytes;
      const uint8_t* positions = weights.positions + group / 2 * kTileBytes;
      int shift = group % 2 ? 4 : 0;
      for (size_t i = 0; i < kTileBytes; ++i) sums[i / 4] += x[group * 8 + ((positions[i] >> shift) & 7)] * values[i];
    }
    for (size_t lane = 0; lane < kTile; ++lane) out[row * out_stride + lane] = sums[lane];
  }
}

void multiply_dense(const uint8_t* rows, size_t row_stride, size_t count, const Weights& weights, const uint8_t*,
                    size_t, const int32_t*, int32_t* out, size_t out_stride) {
  for (size_t row = 0; row < count; ++row) {
    auto* x = reinterpret_cast<const int16_t*>(rows + row * row_stride);
    int32_t sums[kTile] = {};
    for (size_t step = 0; step < weights.padded / 4; ++step) {
      const int8_t* values = weights.values + step * kTileBytes;
      for (size_t i = 0; i < kTileBytes; ++i) sums[i / 4] += x[step * 4 + i % 4] * values[i];
    }
    for (size_t lane = 0; lane < kTile; ++lane) out[row * out_stride + lane] = sums[lane];
  }
}

}  // namespace

const Gemm kSparseScalar{8, 1, 2, 0, prepare_rows, nullptr, nullptr, multiply_sparse};
const Gemm kDenseScalar{8, 1, 2, 0, prepare_rows, nullptr, nullptr, multiply_dense};

}  // namespace sqat
