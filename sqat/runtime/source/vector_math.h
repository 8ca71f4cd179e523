// The float work around the products, written once on sixteen floats; included by one source for each instruction set,
// after the headers it needs and its target.
//
// The same bits everywhere: every operation is elementwise IEEE (no contraction to fma), and sums over channels are
// kept in 16 parts, channel c in part c % 16, added by a fixed tree. Rounding is to nearest even by adding 1.5 * 2^23.
// GELU: x (1/2 + x P(x^2)), P a polynomial fitted to the erf or tanh form, |error| < 6e-5. exp: 2^n times a polynomial,
// relative error < 1e-6. Polynomials are summed in pairs rather than by Horner's chain.
#include "sixteen.h"

namespace sqat {
namespace {

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23

// Steps to the low byte of each lane: q + 128.
template <typename Inverse>  // one, or one for every lane
SQAT_INLINE Integers quantize(const Floats& x, const Inverse& inverse) {
  return bits(clamp(x * inverse, -127.0f, 127.0f) + (kRound + 128.0f));
}

constexpr float kErf[] = {0.398711711f,     -0.0659830123f,  0.00958418939f,  -0.00103729276f, 8.13770312e-05f,
                          -4.44724492e-06f, 1.58859123e-07f, -3.3077634e-09f, 3.02824085e-11f};
constexpr float kTanh[] = {0.398851544f,     -0.0665272027f,  0.00993551128f,   -0.00113463902f, 9.60572506e-05f,
                           -5.74656497e-06f, 2.26307421e-07f, -5.20880272e-09f, 5.27343239e-11f};

// From `bound` on the polynomial is past 1/2, so that x or 0 comes out.
SQAT_INLINE Floats gelu(const Floats& x, const float* c, float bound) {
  Floats inside = clamp(x, -bound, bound);
  Floats t = inside * inside, t2 = t * t, t4 = t2 * t2;
  Floats low = (t * c[1] + c[0]) + (t * c[3] + c[2]) * t2;
  Floats high = (t * c[5] + c[4]) + (t * c[7] + c[6]) * t2;
  Floats half = inside * (low + (t4 * c[8] + high) * t4);
  return x * clamp(half + 0.5f, 0.0f, 1.0f);
}

template <Activation kActivation>
SQAT_INLINE Floats activate(const Floats& x) {
  if (kActivation == Activation::kGelu) return gelu(x, kErf, 4.5f);
  if (kActivation == Activation::kGeluTanh) return gelu(x, kTanh, 4.3f);
  if (kActivation == Activation::kRelu) return each<F>([&](size_t i) { return higher(x.part[i], F{}); });
  return x;
}

template <Activation kActivation, typename Count>
SQAT_INLINE void dequantize_rows(const int32_t* product, size_t stride, size_t rows, const Dequantize& how,
                                 Count count) {
  const Floats scale = load(how.scale), bias = load(how.bias), inverse = load(how.inverse);
  float* to = how.y;  // a byte that is written could be one of `how`: then all of it is read again for every row
  uint8_t* to_bytes = how.q;
  const size_t y_stride = how.y_stride, q_stride = how.q_stride;
  for (size_t row = 0; row < rows; ++row) {
    Floats y = activate<kActivation>(to_floats(load(product + row * stride)) * scale + bias);
    if (to) store(to + row * y_stride, y, count);
    if (to_bytes) store_bytes(to_bytes + row * q_stride, quantize(y, inverse), count);
  }
}

template <Activation kActivation>
void dequantize_as(const int32_t* product, size_t stride, size_t rows, const Dequantize& how) {
  if (how.channels == kTile) {
    dequantize_rows<kActivation>(product, stride, rows, how, std::integral_constant<size_t, kTile>{});
  } else {
    dequantize_rows<kActivation>(product, stride, rows, how, how.channels);
  }
}

void dequantize(const int32_t* product, size_t stride, size_t rows, const Dequantize& how) {
  switch (how.activation) {
    case Activation::kNone:
      return dequantize_as<Activation::kNone>(product, stride, rows, how);
    case Activation::kGelu:
      return dequantize_as<Activation::kGelu>(product, stride, rows, how);
    case Activation::kGeluTanh:
      return dequantize_as<Activation::kGeluTanh>(product, stride, rows, how);
    case Activation::kRelu:
      return dequantize_as<Activation::kRelu>(product, stride, rows, how);
  }
}

// step(at, count) for every 16 channels, then for those left; two instances, so that whole steps know their count.
template <typename Step>
SQAT_INLINE void for_steps(size_t channels, const Step& step) {
  size_t at = 0;
  for (; at + kTile <= channels; at += kTile) step(at, std::integral_constant<size_t, kTile>{});
  if (at < channels) step(at, channels - at);
}

// Adds the residual and returns the row's mean.
float add_residual(float* row, const FinishRow& how) {
  Floats sums{};
  for_steps(how.channels, [&](size_t at, auto count) SQAT_ALWAYS {
    Floats x = load(row + at, count);
    if (how.residual) {
      x = x + load(how.residual + at, count);
      store(row + at, x, count);
    }
    sums = sums + x;
  });
  return sum(sums) / static_cast<float>(how.channels);
}

float variance(const float* row, size_t channels, float mean) {
  Floats sums{};
  for_steps(channels, [&](size_t at, auto count) SQAT_ALWAYS {
    Floats x = load(row + at, count) - mean;
    Floats squares = x * x;
    if (count < kTile) {  // what fills the last step up is no deviation
      float whole[kTile];
      store(whole, squares);
      squares = load(whole, count);
    }
    sums = sums + squares;
  });
  return sum(sums) / static_cast<float>(channels);
}

void finish_row(float* row, const FinishRow& given) {
  const FinishRow how = given;  // no byte that is written is one of these
  const float mean = add_residual(row, how);
  const float deviation = how.gamma ? 1.0f / __builtin_sqrtf(variance(row, how.channels, mean) + how.epsilon) : 1.0f;
  for_steps(how.channels, [&](size_t at, auto count) SQAT_ALWAYS {
    Floats x = load(row + at, count);
    if (how.gamma) x = (x - mean) * deviation * load(how.gamma + at, count) + load(how.beta + at, count);
    if (how.y) store(how.y + at, x, count);
    if (how.q) store_bytes(how.q + at, quantize(x, how.inverse), count);
  });
}

void embed_row(const EmbedRow& from, size_t channels, float* row) {
  for_steps(channels, [&](size_t at, auto count) SQAT_ALWAYS {
    Floats x = from.word ? load(from.word + at, count) : to_floats(widen(from.word_int8 + at, count)) * from.word_scale;
    if (from.type) x = x + load(from.type + at, count);
    x = x + load(from.position + at, count);
    store(row + at, x, count);
  });
}

// 255 * 2^x for x <= 0, 255 * 2^-40 below -40.
SQAT_INLINE Floats power255(const Floats& x) {
  Floats inside = each<F>([&](size_t i) { return higher(x.part[i], -40.0f - F{}); });
  Floats whole = inside + kRound;
  Floats rest = inside - (whole - kRound);
  Floats square = rest * rest;
  Floats low = (rest * 176.752479f + 255.0f) + (rest * 14.154371f + 61.2567173f) * square;
  Floats sum = low + (rest * 0.338250544f + 2.46623577f) * (square * square);
  return floats_of_bits(bits(sum) + (bits(whole) << 23));
}

int32_t highest_of(const int32_t* scores, size_t keys) {
  Integers all = Integers{} + scores[0];
  size_t key = 0;
  for (; key + kTile <= keys; key += kTile) all = higher(load(scores + key), all);
  int32_t most = highest(all);
  for (; key < keys; ++key) most = scores[key] > most ? scores[key] : most;
  return most;
}

// Of a text's tokens whose weight is not 0, in their order; rows are `width` apart.
void mean(const float* states, const int64_t* weights, size_t tokens, size_t width, size_t channels, float* y) {
  constexpr float kLeast = 1e-9f;  // sum of weights: a text without any is 0
  __builtin_memset(y, 0, channels * sizeof(float));
  float total = 0.0f;
  for (size_t token = 0; token < tokens; ++token, states += width) {
    if (weights[token] == 0) continue;
    const float weight = static_cast<float>(weights[token]);
    total += weight;
    for_steps(channels, [&](size_t at, auto count) SQAT_ALWAYS {
      store(y + at, load(y + at, count) + load(states + at, count) * weight, count);
    });
  }
  const float divisor = total > kLeast ? total : kLeast;
  for_steps(channels, [&](size_t at, auto count) SQAT_ALWAYS { store(y + at, load(y + at, count) / divisor, count); });
}

int32_t softmax(const int32_t* scores, size_t keys, size_t padded, float scale, uint8_t* p) {
  const int32_t highest = highest_of(scores, keys);
  const float power = scale * 1.44269504f;
  Integers sums{};
  auto step = [&](size_t key, auto count) SQAT_ALWAYS {
    Integers values = bits(power255(to_floats(load(scores + key) - highest) * power) + kRound) & 255;
    if (count < kTile) {
      int32_t whole[kTile];
      __builtin_memcpy(whole, values.part, sizeof whole);
      values = load(whole, count);
    }
    sums = sums + values;
    store_bytes(p + key, values);
  };
  for_steps(keys, step);
  for (size_t key = round_up(keys, kTile); key < padded; key += kTile) __builtin_memset(p + key, 0, kTile);
  return sum(sums);
}

void context(const int32_t* product, int32_t sum, float scale, float inverse, size_t channels, uint8_t* q) {
  Floats out = to_floats(load(product)) / static_cast<float>(sum) * scale;
  store_bytes(q, quantize(out, inverse), channels);
}

}  // namespace

const Epilogues SQAT_EPILOGUES{dequantize, finish_row, embed_row, softmax, context, mean};

}  // namespace sqat
