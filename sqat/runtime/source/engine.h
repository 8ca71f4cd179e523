// What an instruction set brings: two ways of multiplying (2:4 and dense weights) and the float work around them.
//
// Layouts. Weights lie in tiles of 16 output channels. 2:4: per 8 consecutive inputs 64 bytes, byte lane*4 + j the j-th
// kept weight of channel `lane`; their positions (0..7) in the low nibbles of 64 bytes for an even group of 8 and in
// the high nibbles for the odd one after it. Dense: per 4 consecutive inputs 64 bytes, byte lane*4 + j. Inputs are
// padded to a multiple of 16 with zero weights. Activations are u8 = q + 128 with q in -127..127; a byte 0 is read
// as 1 where rows are prepared (a linear's input, queries) and as -128 in keys and values.
#pragma once

#if defined(__FAST_MATH__)
#error "sqat's float work must give the same bits everywhere: compile without -ffast-math"
#endif

#include <cstddef>
#include <cstdint>

#define SQAT_EXPORT extern "C" __attribute__((visibility("default")))  // named in exports.map too

namespace sqat {

constexpr size_t kTile = 16;       // channels in a tile of weights
constexpr size_t kInputStep = 16;  // inputs are padded to a multiple
constexpr size_t kTileBytes = 64;  // of one step of one tile
constexpr size_t kMostInputs = 65536;  // of one sum: 255 * 127 * 65536 fits in 31 bits

constexpr size_t round_up(size_t value, size_t step) { return (value + step - 1) / step * step; }

// One or more neighbouring tiles of weights; `positions` is null where they are dense.
struct Weights {
  const int8_t* values;
  const uint8_t* positions;
  size_t padded;  // inputs

  size_t value_stride() const { return padded / (positions ? 8 : 4) * kTileBytes; }
  size_t position_stride() const { return padded / 16 * kTileBytes; }
  Weights from(size_t tile) const {
    return {values + tile * value_stride(), positions ? positions + tile * position_stride() : nullptr, padded};
  }
};

// Exact int32 products of rows of activations with tiles of weights.
struct Gemm {
  size_t max_rows;     // of one call of `multiply`
  size_t max_tiles;    // of one call of `multiply`
  size_t row_bytes;    // of a prepared row, per padded input
  size_t panel_bytes;  // of a prepared tile, per padded input; 0: weights are used in place

  // Writes rows [count, padded * row_bytes]; zero is 128 (activations) or 0 (attention's P, dense only).
  void (*prepare_rows)(const uint8_t* x, size_t stride, size_t count, size_t inputs, size_t padded, int zero,
                       uint8_t* rows);
  // offsets[channel] = -128 * (sum of the channel's weights), from which `multiply` starts; null where it needs none.
  void (*set_offsets)(const Weights& weights, size_t tiles, int32_t* offsets);
  // Unpacks one tile into `panel`, for use by many rows.
  void (*prepare_panel)(const Weights& weights, uint8_t* panel);
  // out[row * out_stride + channel] for count rows and tiles * 16 channels; panel is null where weights are used in
  // place.
  void (*multiply)(const uint8_t* rows, size_t row_stride, size_t count, const Weights& weights, const uint8_t* panel,
                   size_t tiles, const int32_t* offsets, int32_t* out, size_t out_stride);
};

enum class Activation { kNone, kGelu, kGeluTanh, kRelu };

// What happens to 16 channels of some rows after their product; y or q may be null.
struct Dequantize {
  const float* scale;  // 16 of each
  const float* bias;
  const float* inverse;  // 1 / step of q
  Activation activation;
  size_t channels;  // of the 16 that exist
  float* y;
  size_t y_stride;
  uint8_t* q;
  size_t q_stride;
};

// What happens to a whole row; residual, gamma (with beta), y and q may be null.
struct FinishRow {
  size_t channels;
  const float* residual;
  const float* gamma;
  const float* beta;
  float epsilon;
  float inverse;
  float* y;
  uint8_t* q;
};

// One row of each table of embeddings; words are f32 or int8 with a scale, type may be null.
struct EmbedRow {
  const float* word;
  const int8_t* word_int8;
  float word_scale;
  const float* position;
  const float* type;
};

// Float work, the same bits in every instruction set: elementwise IEEE operations, and sums in a fixed order.
struct Epilogues {
  void (*dequantize)(const int32_t* product, size_t product_stride, size_t rows, const Dequantize& how);
  void (*finish_row)(float* row, const FinishRow& how);  // row is overwritten
  void (*embed_row)(const EmbedRow& from, size_t channels, float* row);
  // P = round(255 exp(s - max s)) with s = score * scale, for `keys` scores and 0 up to `padded`; returns the sum of P.
  int32_t (*softmax)(const int32_t* scores, size_t keys, size_t padded, float scale, uint8_t* p);
  // u8 of product / sum * scale * inverse, 16 channels of which `channels` exist.
  void (*context)(const int32_t* product, int32_t sum, float scale, float inverse, size_t channels, uint8_t* q);
  // Mean of rows [tokens, channels], `width` apart, by weights that are mostly 0 or 1.
  void (*mean)(const float* states, const int64_t* weights, size_t tokens, size_t width, size_t channels, float* y);
};

// Elementwise work of training, over tensors that lie without gaps; bytes of masks are 0 or 1. Spares a processor that
// computes with one thread the passes of a framework's operators; see training.cpp.
struct Passes {
  // x * kept + added: with 0 no -0 is left, with -0 it is the product alone.
  void (*mask)(const float* x, const uint8_t* kept, size_t values, float added, float* y);
  // x where `kept` is 1, else 0, whatever x is there.
  void (*select)(const float* x, const uint8_t* kept, size_t values, float* y);
  // To multiples low to 127 of amax / 127; inside: whether the gradient passes, up to half a step beyond the ends.
  void (*fake_quantize)(const float* x, size_t values, float amax, float low, float* y, uint8_t* inside);
  // Every row [columns], times `kept` where that is not null, by a step of its own, its largest |x| / 127; zeros are +0.
  void (*fake_quantize_rows)(const float* x, const uint8_t* kept, size_t rows, size_t columns, float* y);
  // 0 for the largest of four neighbours to 3 for the smallest, of equal ones the first before the others.
  void (*rank_fours)(const float* x, size_t values, uint8_t* ranks);
  // Of |x|; 0 of no values, NaN or infinity where there is one.
  float (*largest)(const float* x, size_t values);
  // Adds one to counts[int(|x| * inverse)] for every x; what has no place among the bins goes to the last.
  void (*count_bins)(const float* x, size_t values, float inverse, size_t bins, int64_t* counts);
};

struct Engine {
  const char* name;
  const Gemm* sparse;
  const Gemm* dense;
  const Epilogues* epilogues;
  const Passes* passes;

  const Gemm& gemm(const Weights& weights) const { return weights.positions ? *sparse : *dense; }
};

extern const Gemm kSparseScalar, kDenseScalar;
extern const Epilogues kEpiloguesScalar;
extern const Passes kPassesScalar;
#if defined(__x86_64__)
extern const Gemm kSparseAvx2, kDenseAvx2, kSparseVnni, kDenseVnni;
extern const Epilogues kEpiloguesAvx2, kEpiloguesAvx512;
extern const Passes kPassesAvx2, kPassesAvx512;
#endif

}  // namespace sqat
