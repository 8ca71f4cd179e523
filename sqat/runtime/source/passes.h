// The elementwise passes of training in vectors of 16 lanes; included by one source for each instruction set, after
// vector_math.h. Each reads its tensors once, where a chain of a framework's operators reads them once for every one.
//
// The same bits as that chain in every instruction set: elementwise IEEE, no contraction, half to even. NaN stays NaN.
namespace sqat {
namespace {

constexpr float kWhole = 12582912.0f;  // 1.5 * 2^23: added and taken away, it rounds what is below 2^22
constexpr float kHighest = 127.0f;
constexpr float kSmallest = 9.094947017729282e-13f;  // 2^-40

SQAT_INLINE Floats times(const Floats& x, const uint8_t* kept, size_t count) {
  return x * to_floats(widen(kept, count));
}

void mask(const float* x, const uint8_t* kept, size_t values, float added, float* y) {
  for_steps(values, [&](size_t at, auto count) SQAT_ALWAYS {
    store(y + at, times(load(x + at, count), kept + at, count) + added, count);
  });
}

void select(const float* x, const uint8_t* kept, size_t values, float* y) {
  for_steps(values, [&](size_t at, auto count) SQAT_ALWAYS {
    const Floats from = load(x + at, count);
    const Integers ones = widen(kept + at, count);
    store(y + at, each<F>([&](size_t i) SQAT_ALWAYS { return (F)((I)from.part[i] & -ones.part[i]); }), count);
  });
}

void fake_quantize(const float* x, size_t values, float amax, float low, float* y, uint8_t* inside) {
  const float step = amax / kHighest, inverse = 1.0f / step;
  const float least = static_cast<float>((low - 0.5) * step), most = static_cast<float>((kHighest + 0.5) * step);
  for_steps(values, [&](size_t at, auto count) SQAT_ALWAYS {
    const Floats from = load(x + at, count);
    store(y + at, each<F>([&](size_t i) SQAT_ALWAYS {
            F v = from.part[i] * inverse;
            v = v < low ? low - F{} : v;  // in this order a NaN stays
            v = v > kHighest ? kHighest - F{} : v;
            const F whole = v + kWhole - kWhole;
            const F sign = (F)((I)v & INT32_MIN);  // lost where v rounds to 0
            return (F)((I)whole | (I)sign) * step;
          }),
          count);
    store_bytes(inside + at, each<I>([&](size_t i) SQAT_ALWAYS {
                  return (from.part[i] > least) & (from.part[i] < most) & 1;
                }),
                count);
  });
}

float largest_of(const float* x, const uint8_t* kept, size_t values) {
  Integers found{};  // bits of |x| are in the order of |x|, and those of a NaN are above all
  for_steps(values, [&](size_t at, auto count) SQAT_ALWAYS {
    Floats from = load(x + at, count);
    if (kept) from = times(from, kept + at, count);
    found = higher(bits(from) & INT32_MAX, found);
  });
  const int32_t most = highest(found);
  float answer;
  __builtin_memcpy(&answer, &most, sizeof answer);
  return answer;
}

void fake_quantize_rows(const float* x, const uint8_t* kept, size_t rows, size_t columns, float* y) {
  for (size_t row = 0; row < rows; ++row, x += columns, y += columns) {
    const float largest = largest_of(x, kept, columns);
    const float step = (largest < kSmallest ? kSmallest : largest) / kHighest, inverse = 1.0f / step;
    for_steps(columns, [&](size_t at, auto count) SQAT_ALWAYS {
      Floats from = load(x + at, count);
      if (kept) from = times(from, kept + at, count);
      store(y + at, (from * inverse + kWhole - kWhole) * step + 0.0f, count);
    });
    if (kept) kept += columns;
  }
}

float largest(const float* x, size_t values) { return largest_of(x, nullptr, values); }

// Each x is compared with the next, the next but one and the third of its group of four, round and round.
template <int kNext>
SQAT_INLINE I beaten_by(F x) {
  const F other = __builtin_shuffle(x, (kNumbers & -4) | ((kNumbers + kNext) & 3));
  const I later = (kNumbers & 3) + kNext < 4;  // of equal ones the first wins
  return (other > x) | (~later & (other == x));
}

void rank_fours(const float* x, size_t values, uint8_t* ranks) {
  for_steps(values, [&](size_t at, auto count) SQAT_ALWAYS {
    const Floats from = load(x + at, count);
    store_bytes(ranks + at, each<I>([&](size_t i) SQAT_ALWAYS {
                  const F v = from.part[i];
                  return -(beaten_by<1>(v) + beaten_by<2>(v) + beaten_by<3>(v));
                }),
                count);
  });
}

void count_bins(const float* x, size_t values, float inverse, size_t bins, int64_t* counts) {
  const int32_t last = static_cast<int32_t>(bins) - 1;
  size_t at = 0;
  for (; at + kTile <= values; at += kTile) {
    const Floats places = floats_of_bits(bits(load(x + at)) & INT32_MAX) * inverse;
    int32_t found[kTile];
    for (size_t i = 0; i < kParts; ++i) {
      const F inside = places.part[i] < static_cast<float>(last) ? places.part[i] : static_cast<float>(last) - F{};
      const I bin = __builtin_convertvector(inside, I);
      __builtin_memcpy(found + i * kLanes, &bin, sizeof bin);
    }
#pragma GCC unroll 16
    for (size_t i = 0; i < kTile; ++i) ++counts[found[i]];
  }
  for (; at < values; ++at) {
    const float place = __builtin_fabsf(x[at]) * inverse;
    ++counts[place < static_cast<float>(last) ? static_cast<int32_t>(place) : last];
  }
}

}  // namespace

const Passes SQAT_PASSES{mask, select, fake_quantize, fake_quantize_rows, rank_fours, largest, count_bins};

}  // namespace sqat
