// The elementwise passes of training in vectors of 16 lanes; included by one source for each instruction set, after
// sixteen.h. Each reads its tensors once, where a chain of a framework's operators reads them once for every operator.
//
// The same bits as that chain in every instruction set: elementwise IEEE, no contraction, half to even. A NaN stays one.
namespace sqat {
namespace {

constexpr float kWhole = 12582912.0f;  // 1.5 * 2^23: added and taken away, it rounds what is below 2^22
constexpr float kHighest = 127.0f;
constexpr float kSmallest = 9.094947017729282e-13f;  // 2^-40

SQAT_INLINE Integers bytes_from(const uint8_t* from) {
  return each<I>([&](size_t i) SQAT_ALWAYS {
#if SQAT_LANES == 16 && !defined(SQAT_EMULATE_VNNI)
    return (I)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif SQAT_LANES == 8
    return (I)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + i * kLanes)));
#else
    typedef uint8_t B __attribute__((vector_size(SQAT_LANES)));
    B bytes;
    __builtin_memcpy(&bytes, from + i * kLanes, sizeof bytes);
    return __builtin_convertvector(bytes, I);
#endif
  });
}
SQAT_INLINE Integers bytes_from(const uint8_t* from, size_t count) {
  if (count == kTile) return bytes_from(from);
  uint8_t whole[kTile] = {};
  __builtin_memcpy(whole, from, count);
  return bytes_from(whole);
}

// x where `kept` is 1, +0 where it is 0.
SQAT_INLINE Floats where(const Integers& kept, const Floats& x) {
  return each<F>([&](size_t i) { return (F)((I)x.part[i] & -kept.part[i]); });
}

// step(at, count) for every 16 values, then for those left.
template <typename Step>
SQAT_INLINE void for_all(size_t values, const Step& step) {
  size_t at = 0;
  for (; at + kTile <= values; at += kTile) step(at, std::integral_constant<size_t, kTile>{});
  if (at < values) step(at, values - at);
}

void mask(const float* x, const uint8_t* kept, size_t values, float* y) {
  for_all(values, [&](size_t at, auto count) SQAT_ALWAYS {
    store(y + at, where(bytes_from(kept + at, count), load(x + at, count)) + 0.0f, count);  // -0 becomes +0
  });
}

void fake_quantize(const float* x, size_t values, float amax, float low, float* y, uint8_t* inside) {
  const float step = amax / kHighest, inverse = 1.0f / step;
  const float least = static_cast<float>((low - 0.5) * step), most = static_cast<float>((kHighest + 0.5) * step);
  for_all(values, [&](size_t at, auto count) SQAT_ALWAYS {
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
  Integers highest{};  // bits of |x| are in the order of |x|, and those of a NaN are above all
  for_all(values, [&](size_t at, auto count) SQAT_ALWAYS {
    Floats from = load(x + at, count);
    if (kept) from = where(bytes_from(kept + at, count), from);
    highest = higher(bits(from) & INT32_MAX, highest);
  });
  int32_t found = 0;
  for (size_t i = 0; i < kTile; ++i) {
    const int32_t one = highest.part[i / kLanes][i % kLanes];
    found = one > found ? one : found;
  }
  float answer;
  __builtin_memcpy(&answer, &found, sizeof answer);
  return answer;
}

void fake_quantize_rows(const float* x, const uint8_t* kept, size_t rows, size_t columns, float* y) {
  for (size_t row = 0; row < rows; ++row, x += columns, y += columns) {
    const float largest = largest_of(x, kept, columns);
    const float step = (largest < kSmallest ? kSmallest : largest) / kHighest, inverse = 1.0f / step;
    for_all(columns, [&](size_t at, auto count) SQAT_ALWAYS {
      Floats from = load(x + at, count);
      if (kept) from = where(bytes_from(kept + at, count), from);
      store(y + at, (from * inverse + kWhole - kWhole) * step + 0.0f, count);
    });
    if (kept) kept += columns;
  }
}

float largest(const float* x, size_t values) { return largest_of(x, nullptr, values); }

// Each x is compared with the next, the next but one and the third of its group of four, round and round.
template <int kNext>
SQAT_INLINE I beaten_by(F x, I lane) {
  const F other = __builtin_shuffle(x, (lane & -4) | ((lane + kNext) & 3));
  const I later = (lane & 3) + kNext < 4;  // of equal ones the first wins
  return (other > x) | (~later & (other == x));
}

void rank_fours(const float* x, size_t values, uint8_t* ranks) {
  I lane;
  for (size_t i = 0; i < kLanes; ++i) lane[i] = static_cast<int32_t>(i);
  for_all(values, [&](size_t at, auto count) SQAT_ALWAYS {
    const Floats from = load(x + at, count);
    store_bytes(ranks + at, each<I>([&](size_t i) SQAT_ALWAYS {
                  const F v = from.part[i];
                  return -(beaten_by<1>(v, lane) + beaten_by<2>(v, lane) + beaten_by<3>(v, lane));
                }),
                count);
  });
}

void count_bins(const float* x, size_t values, float inverse, int64_t* counts) {
  size_t at = 0;
  for (; at + kTile <= values; at += kTile) {
    const Floats places = floats_of_bits(bits(load(x + at)) & INT32_MAX) * inverse;
    const Integers bins = each<I>([&](size_t i) { return __builtin_convertvector(places.part[i], I); });
    int32_t each_bin[kTile];
    for (size_t i = 0; i < kParts; ++i) __builtin_memcpy(each_bin + i * kLanes, &bins.part[i], sizeof bins.part[i]);
#pragma GCC unroll 16
    for (size_t i = 0; i < kTile; ++i) ++counts[each_bin[i]];
  }
  for (; at < values; ++at) ++counts[static_cast<int32_t>(__builtin_fabsf(x[at]) * inverse)];
}

}  // namespace

const Passes SQAT_PASSES{mask, fake_quantize, fake_quantize_rows, rank_fours, largest, count_bins};

}  // namespace sqat
