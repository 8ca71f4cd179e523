// Multiplying with AVX2, exact without VNNI.
//
// 2:4: a prepared row holds, for every 8 inputs q, the 16 bytes [q, -q]; a prepared tile holds for every kept weight
// its magnitude and position + 8 * (weight < 0). One vpshufb of the broadcast 16 bytes then both selects and applies
// the sign, and |w| <= 127 unsigned times +-q in vpmaddubsw cannot saturate: 2 * 127 * 127 < 32768. Four instructions
// for 32 products, against five with vpsignb and six with 16-bit products (measured: 361, 255 and 256 GOPS on Zen 3).
// Dense: 16-bit products, vpmaddwd; as many multiplying instructions as vpmaddubsw with signs (161 and 150 GOPS).
// Tiles of rows are templates with every loop unrolled: else gcc keeps the sums in memory.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "engine.h"

#pragma GCC target("avx2")

namespace sqat {
namespace {

using Bytes = __m256i;

inline Bytes load(const void* from) { return _mm256_loadu_si256(static_cast<const Bytes*>(from)); }
inline void store(void* to, Bytes value) { _mm256_storeu_si256(static_cast<Bytes*>(to), value); }

// The 16 inputs at x + k as q + zero; those past the end are zero.
inline __m128i read16(const uint8_t* x, size_t k, size_t inputs, int zero) {
  if (k + 16 <= inputs) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + k));
  alignas(16) uint8_t tail[16];
  std::memset(tail, zero, sizeof tail);
  std::memcpy(tail, x + k, inputs - k);
  return _mm_load_si128(reinterpret_cast<const __m128i*>(tail));
}

void prepare_sparse_rows(const uint8_t* x, size_t stride, size_t count, size_t inputs, size_t padded, int,
                         uint8_t* rows) {
  for (size_t row = 0; row < count; ++row, x += stride) {
    for (size_t k = 0; k < padded; k += 16, rows += 32) {
      __m128i bytes = _mm_max_epu8(read16(x, k, inputs, 128), _mm_set1_epi8(1));
      __m128i q = _mm_xor_si128(bytes, _mm_set1_epi8(-128));
      __m128i negative = _mm_sub_epi8(_mm_setzero_si128(), q);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(rows), _mm_unpacklo_epi64(q, negative));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(rows + 16), _mm_unpackhi_epi64(q, negative));
    }
  }
}

// 128 bytes per group of 8 inputs: two vectors of selections, two of magnitudes.
void prepare_sparse_panel(const Weights& weights, uint8_t* panel) {
  const Bytes low = _mm256_set1_epi8(7), sign = _mm256_set1_epi8(8);
  const int8_t* values = weights.values;
  const uint8_t* positions = weights.positions;
  for (size_t k = 0; k < weights.padded; k += 16, panel += 256, values += 2 * kTileBytes, positions += kTileBytes) {
#pragma GCC unroll 2
    for (size_t half = 0; half < 64; half += 32) {
      Bytes even = load(values + half), odd = load(values + kTileBytes + half), at = load(positions + half);
      Bytes minus_even = _mm256_and_si256(_mm256_srli_epi16(even, 4), sign);
      Bytes minus_odd = _mm256_and_si256(_mm256_srli_epi16(odd, 4), sign);
      store(panel + half, _mm256_or_si256(_mm256_and_si256(at, low), minus_even));
      store(panel + 64 + half, _mm256_abs_epi8(even));
      store(panel + 128 + half, _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(at, 4), low), minus_odd));
      store(panel + 192 + half, _mm256_abs_epi8(odd));
    }
  }
}

inline Bytes sparse_products(Bytes x, Bytes selection, Bytes magnitude) {
  Bytes pairs = _mm256_maddubs_epi16(magnitude, _mm256_shuffle_epi8(x, selection));
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

template <int kRows>
__attribute__((noinline)) void sparse_tile(const uint8_t* __restrict rows, size_t row_stride,
                                           const uint8_t* __restrict panel, size_t groups, int32_t* __restrict out,
                                           size_t out_stride) {
  Bytes sums[kRows][2];
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) sums[row][0] = sums[row][1] = _mm256_setzero_si256();
  for (size_t group = 0; group < groups; ++group, panel += 128, rows += 16) {
    Bytes select0 = load(panel), select1 = load(panel + 32), weight0 = load(panel + 64), weight1 = load(panel + 96);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      auto* from = reinterpret_cast<const __m128i*>(rows + row * row_stride);
      Bytes x = _mm256_broadcastsi128_si256(_mm_loadu_si128(from));
      sums[row][0] = _mm256_add_epi32(sums[row][0], sparse_products(x, select0, weight0));
      sums[row][1] = _mm256_add_epi32(sums[row][1], sparse_products(x, select1, weight1));
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
    store(out + row * out_stride, sums[row][0]);
    store(out + row * out_stride + 8, sums[row][1]);
  }
}

// 16-bit rows in the order 0 2 1 3 of every 4 inputs: the pairs in which `prepare_dense_panel` unpacks weights.
void prepare_dense_rows(const uint8_t* x, size_t stride, size_t count, size_t inputs, size_t padded, int zero,
                        uint8_t* rows) {
  const __m128i order = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
  const __m128i lowest = _mm_set1_epi8(zero != 0 ? 1 : 0);
  for (size_t row = 0; row < count; ++row, x += stride) {
    for (size_t k = 0; k < padded; k += 16, rows += 32) {
      __m128i bytes = _mm_shuffle_epi8(_mm_max_epu8(read16(x, k, inputs, zero), lowest), order);
      store(rows, _mm256_sub_epi16(_mm256_cvtepu8_epi16(bytes), _mm256_set1_epi16(static_cast<int16_t>(zero))));
    }
  }
}

// 128 bytes per 4 inputs: inputs 0 and 2 of 16 channels as pairs of 16 bits, then inputs 1 and 3.
void prepare_dense_panel(const Weights& weights, uint8_t* panel) {
  for (size_t step = 0; step < weights.padded / 4; ++step, panel += 128) {
    for (size_t half = 0; half < 2; ++half) {
      Bytes values = load(weights.values + step * kTileBytes + 32 * half);
      store(panel + 32 * half, _mm256_srai_epi16(_mm256_slli_epi16(values, 8), 8));
      store(panel + 64 + 32 * half, _mm256_srai_epi16(values, 8));
    }
  }
}

template <int kRows>
__attribute__((noinline)) void dense_tile(const uint8_t* __restrict rows, size_t row_stride,
                                          const uint8_t* __restrict panel, size_t pairs, int32_t* __restrict out,
                                          size_t out_stride) {
  Bytes sums[kRows][2];
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) sums[row][0] = sums[row][1] = _mm256_setzero_si256();
  for (size_t pair = 0; pair < pairs; ++pair, panel += 64, rows += 4) {
    Bytes weight0 = load(panel), weight1 = load(panel + 32);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      Bytes x = _mm256_set1_epi32(*reinterpret_cast<const int32_t*>(rows + row * row_stride));
      sums[row][0] = _mm256_add_epi32(sums[row][0], _mm256_madd_epi16(x, weight0));
      sums[row][1] = _mm256_add_epi32(sums[row][1], _mm256_madd_epi16(x, weight1));
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
    store(out + row * out_stride, sums[row][0]);
    store(out + row * out_stride + 8, sums[row][1]);
  }
}

using TileFunction = void (*)(const uint8_t*, size_t, const uint8_t*, size_t, int32_t*, size_t);
constexpr TileFunction kSparseTiles[] = {sparse_tile<1>, sparse_tile<2>, sparse_tile<3>, sparse_tile<4>,
                                         sparse_tile<5>};
constexpr TileFunction kDenseTiles[] = {dense_tile<1>, dense_tile<2>, dense_tile<3>,
                                        dense_tile<4>, dense_tile<5>, dense_tile<6>};

void multiply_sparse(const uint8_t* rows, size_t row_stride, size_t count, const Weights& weights, const uint8_t* panel,
                     size_t, const int32_t*, int32_t* out, size_t out_stride) {
  kSparseTiles[count - 1](rows, row_stride, panel, weights.padded / 8, out, out_stride);
}

void multiply_dense(const uint8_t* rows, size_t row_stride, size_t count, const Weights& weights, const uint8_t* panel,
                    size_t, const int32_t*, int32_t* out, size_t out_stride) {
  kDenseTiles[count - 1](rows, row_stride, panel, weights.padded / 2, out, out_stride);
}

}  // namespace

const Gemm kSparseAvx2{5, 1, 2, 16, prepare_sparse_rows, nullptr, prepare_sparse_panel, multiply_sparse};
const Gemm kDenseAvx2{6, 1, 2, 32, prepare_dense_rows, nullptr, prepare_dense_panel, multiply_dense};

}  // namespace sqat
#endif
