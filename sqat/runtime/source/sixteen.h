// Sixteen floats or integers as vectors of SQAT_LANES: 4 x 4, 2 x 8 or 1 x 16. Included by vector_math.h,
// for passes.h too.
//
// Every operation is done on all parts before the next one: the parts do not wait for each other, which keeps a
// processor busy whose scheduler would fill up with one long chain.
namespace sqat {
namespace {

typedef float F __attribute__((vector_size(SQAT_LANES * 4)));
typedef int32_t I __attribute__((vector_size(SQAT_LANES * 4)));

#if SQAT_LANES == 4
constexpr I kNumbers = {0, 1, 2, 3};
#elif SQAT_LANES == 8
constexpr I kNumbers = {0, 1, 2, 3, 4, 5, 6, 7};
#else
constexpr I kNumbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#endif
constexpr size_t kLanes = SQAT_LANES;
constexpr size_t kParts = kTile / kLanes;

template <typename V>
struct Sixteen {
  V part[kParts];
};
using Floats = Sixteen<F>;
using Integers = Sixteen<I>;

#define SQAT_ALWAYS __attribute__((always_inline))
#define SQAT_INLINE inline SQAT_ALWAYS

template <typename Out, typename Function>
SQAT_INLINE Sixteen<Out> each(const Function& function) {
  Sixteen<Out> out;
#pragma GCC unroll 4
  for (size_t i = 0; i < kParts; ++i) out.part[i] = function(i);
  return out;
}

#define SQAT_OPERATOR(op)                                                           \
  template <typename V>                                                             \
  SQAT_INLINE Sixteen<V> operator op(const Sixteen<V>& a, const Sixteen<V>& b) {    \
    return each<V>([&](size_t i) { return a.part[i] op b.part[i]; });               \
  }                                                                                 \
  template <typename V>                                                             \
  SQAT_INLINE Sixteen<V> operator op(const Sixteen<V>& a, decltype(V{}[0] + 0) b) { \
    return each<V>([&](size_t i) { return a.part[i] op b; });                       \
  }
SQAT_OPERATOR(+)
SQAT_OPERATOR(-)
SQAT_OPERATOR(*)
SQAT_OPERATOR(/)
SQAT_OPERATOR(&)
SQAT_OPERATOR(<<)
#undef SQAT_OPERATOR

SQAT_INLINE Integers bits(const Floats& x) {
  return each<I>([&](size_t i) { return (I)x.part[i]; });
}
SQAT_INLINE Floats floats_of_bits(const Integers& x) {
  return each<F>([&](size_t i) { return (F)x.part[i]; });
}
SQAT_INLINE Floats to_floats(const Integers& x) {
  return each<F>([&](size_t i) { return __builtin_convertvector(x.part[i], F); });
}

// Where a comparison is false for NaN, both give b, as the processor's instructions do.
SQAT_INLINE F higher(F a, F b) {
#if SQAT_LANES == 4 && defined(__SSE2__)
  return (F)_mm_max_ps((__m128)a, (__m128)b);
#elif SQAT_LANES == 8
  return (F)_mm256_max_ps((__m256)a, (__m256)b);
#elif SQAT_LANES == 16 && !defined(SQAT_EMULATE_VNNI)
  return (F)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}
SQAT_INLINE F lower(F a, F b) {
#if SQAT_LANES == 4 && defined(__SSE2__)
  return (F)_mm_min_ps((__m128)a, (__m128)b);
#elif SQAT_LANES == 8
  return (F)_mm256_min_ps((__m256)a, (__m256)b);
#elif SQAT_LANES == 16 && !defined(SQAT_EMULATE_VNNI)
  return (F)_mm512_min_ps((__m512)a, (__m512)b);
#else
  return a < b ? a : b;
#endif
}
SQAT_INLINE I higher(I a, I b) {
#if SQAT_LANES == 8
  return (I)_mm256_max_epi32((__m256i)a, (__m256i)b);
#elif SQAT_LANES == 16 && !defined(SQAT_EMULATE_VNNI)
  return (I)_mm512_max_epi32((__m512i)a, (__m512i)b);
#else
  return a > b ? a : b;
#endif
}
SQAT_INLINE Floats clamp(const Floats& x, float low, float high) {
  Floats above = each<F>([&](size_t i) { return higher(x.part[i], low - F{}); });
  return each<F>([&](size_t i) { return lower(above.part[i], high - F{}); });
}
SQAT_INLINE Integers higher(const Integers& a, const Integers& b) {
  return each<I>([&](size_t i) { return higher(a.part[i], b.part[i]); });
}

template <typename T>
SQAT_INLINE auto load(const T* from) {
  using V = std::conditional_t<std::is_same<T, float>::value, F, I>;
  return each<V>([&](size_t i) {
    V out;
    __builtin_memcpy(&out, from + i * kLanes, sizeof out);
    return out;
  });
}

// The first `count` of sixteen, then zeros.
template <typename T>
SQAT_INLINE auto load(const T* from, size_t count) {
  if (count == kTile) return load(from);
  T whole[kTile] = {};
  __builtin_memcpy(whole, from, count * sizeof(T));
  return load(whole);
}

SQAT_INLINE void store(float* to, const Floats& x) {
#pragma GCC unroll 4
  for (size_t i = 0; i < kParts; ++i) __builtin_memcpy(to + i * kLanes, &x.part[i], sizeof x.part[i]);
}
SQAT_INLINE void store(float* to, const Floats& x, size_t count) {
  if (count == kTile) return store(to, x);
  float whole[kTile];
  store(whole, x);
  __builtin_memcpy(to, whole, count * sizeof(float));
}

// The low byte of every lane.
SQAT_INLINE void store_bytes(uint8_t* to, const Integers& x) {
#if SQAT_LANES == 8
  const __m256i low = _mm256_set1_epi32(255);
  __m256i words =
      _mm256_packus_epi32(_mm256_and_si256((__m256i)x.part[0], low), _mm256_and_si256((__m256i)x.part[1], low));
  __m256i bytes = _mm256_packus_epi16(words, words);  // four of part 0, four of part 1, in each half
  bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(bytes));
#elif SQAT_LANES == 4 && defined(__SSE2__)
  const __m128i low = _mm_set1_epi32(255);
  __m128i first = _mm_packs_epi32(_mm_and_si128((__m128i)x.part[0], low), _mm_and_si128((__m128i)x.part[1], low));
  __m128i second = _mm_packs_epi32(_mm_and_si128((__m128i)x.part[2], low), _mm_and_si128((__m128i)x.part[3], low));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(first, second));
#elif SQAT_LANES == 16 && !defined(SQAT_EMULATE_VNNI)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)x.part[0]));
#else
  typedef uint8_t B __attribute__((vector_size(SQAT_LANES)));
  for (size_t i = 0; i < kParts; ++i) {
    B bytes = __builtin_convertvector(x.part[i], B);
    __builtin_memcpy(to + i * kLanes, &bytes, sizeof bytes);
  }
#endif
}
SQAT_INLINE void store_bytes(uint8_t* to, const Integers& x, size_t count) {
  if (count == kTile) return store_bytes(to, x);
  uint8_t whole[kTile];
  store_bytes(whole, x);
  __builtin_memcpy(to, whole, count);
}

// Integers of sixteen bytes, signed or not.
template <typename B>
SQAT_INLINE Integers widen(const B* from) {
  [[maybe_unused]] constexpr bool is_signed = std::is_signed<B>::value;
#if SQAT_LANES == 16 && !defined(SQAT_EMULATE_VNNI)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return {{(I)(is_signed ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes))}};
#elif SQAT_LANES == 8
  return each<I>([&](size_t i) SQAT_ALWAYS {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + i * kLanes));
    return (I)(is_signed ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
  });
#elif SQAT_LANES == 4 && defined(__SSE2__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  const __m128i low = _mm_unpacklo_epi8(bytes, bytes), high = _mm_unpackhi_epi8(bytes, bytes);
  const __m128i four_times[] = {_mm_unpacklo_epi16(low, low), _mm_unpackhi_epi16(low, low),
                                _mm_unpacklo_epi16(high, high), _mm_unpackhi_epi16(high, high)};
  return each<I>([&](size_t i) SQAT_ALWAYS {
    return (I)(is_signed ? _mm_srai_epi32(four_times[i], 24) : _mm_srli_epi32(four_times[i], 24));
  });
#else
  return each<I>([&](size_t i) SQAT_ALWAYS {
    typedef B Narrow __attribute__((vector_size(SQAT_LANES)));
    Narrow bytes;
    __builtin_memcpy(&bytes, from + i * kLanes, sizeof bytes);
    return __builtin_convertvector(bytes, I);
  });
#endif
}
template <typename B>
SQAT_INLINE Integers widen(const B* from, size_t count) {
  if (count == kTile) return widen(from);
  B whole[kTile] = {};
  __builtin_memcpy(whole, from, count);
  return widen(whole);
}

template <int32_t kWidth, typename V, typename Function>
SQAT_INLINE auto fold_lanes(const V& x, const Function& function) {
  if constexpr (kWidth == 0) {
    return x[0];
  } else {
    return fold_lanes<kWidth / 2>(function(x, __builtin_shuffle(x, kNumbers ^ kWidth)), function);
  }
}
// One value of sixteen: lane c with lane c + 8, then + 4, + 2, + 1, whatever the width of a vector.
template <typename V, typename Function>
SQAT_INLINE auto fold(const Sixteen<V>& x, const Function& function) {
  V folded = x.part[0];
  if constexpr (kParts == 2) folded = function(x.part[0], x.part[1]);
  if constexpr (kParts == 4) folded = function(function(x.part[0], x.part[2]), function(x.part[1], x.part[3]));
  return fold_lanes<SQAT_LANES / 2>(folded, function);
}
template <typename V>
SQAT_INLINE auto sum(const Sixteen<V>& x) {
  return fold(x, [&](const V& a, const V& b) SQAT_ALWAYS { return a + b; });
}
SQAT_INLINE int32_t highest(const Integers& x) {
  return fold(x, [&](const I& a, const I& b) SQAT_ALWAYS { return higher(a, b); });
}

}  // namespace
}  // namespace sqat
