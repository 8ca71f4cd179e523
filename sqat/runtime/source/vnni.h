// The few 512-bit instructions of the VNNI tiles. With SQAT_EMULATE_VNNI they are plain C++, so that the tiles' logic
// is tested on processors without them: same sources, same bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if !defined(SQAT_EMULATE_VNNI)
#include <immintrin.h>

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vnni")

namespace sqat {
namespace {

using Bytes = __m512i;

inline Bytes load(const void* from) { return _mm512_loadu_si512(from); }
inline void store(void* to, Bytes value) { _mm512_storeu_si512(to, value); }
inline __mmask64 first(size_t count) { return ~__mmask64{0} >> (64 - count); }  // of 1 to 64 bytes
inline Bytes load_first(size_t count, const void* from, Bytes others) {
  return _mm512_mask_loadu_epi8(others, first(count), from);
}
inline void store_first(size_t count, void* to, Bytes value) { _mm512_mask_storeu_epi8(to, first(count), value); }
inline Bytes repeat_byte(uint8_t byte) { return _mm512_set1_epi8(static_cast<char>(byte)); }
inline Bytes higher(Bytes a, Bytes b) { return _mm512_max_epu8(a, b); }
inline Bytes times_minus_128(Bytes sums) { return _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(sums, 7)); }
inline Bytes broadcast8(const uint8_t* from) {
  int64_t bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  return _mm512_set1_epi64(bytes);
}
inline Bytes broadcast4(const uint8_t* from) {
  int32_t bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  return _mm512_set1_epi32(bytes);
}
inline Bytes select(Bytes bytes, Bytes positions) { return _mm512_shuffle_epi8(bytes, positions); }
inline Bytes high_nibbles(Bytes positions) { return _mm512_srli_epi32(positions, 4); }
inline Bytes dot(Bytes sums, Bytes x, Bytes weights) { return _mm512_dpbusd_epi32(sums, x, weights); }

}  // namespace
}  // namespace sqat

#else

namespace sqat {
namespace {

struct Bytes {
  uint8_t at[64];
};

inline Bytes load(const void* from) {
  Bytes out;
  std::memcpy(out.at, from, 64);
  return out;
}
inline void store(void* to, Bytes value) { std::memcpy(to, value.at, 64); }
inline Bytes load_first(size_t count, const void* from, Bytes others) {
  std::memcpy(others.at, from, count);
  return others;
}
inline void store_first(size_t count, void* to, Bytes value) { std::memcpy(to, value.at, count); }
inline Bytes repeat_byte(uint8_t byte) {
  Bytes out;
  std::memset(out.at, byte, 64);
  return out;
}
inline Bytes higher(Bytes a, Bytes b) {
  for (size_t i = 0; i < 64; ++i) a.at[i] = a.at[i] > b.at[i] ? a.at[i] : b.at[i];
  return a;
}
inline Bytes times_minus_128(Bytes sums) {
  for (size_t i = 0; i < 64; i += 4) {
    uint32_t sum;
    std::memcpy(&sum, sums.at + i, 4);
    sum *= -128u;
    std::memcpy(sums.at + i, &sum, 4);
  }
  return sums;
}
inline Bytes repeat(const uint8_t* from, size_t width) {
  Bytes out;
  for (size_t i = 0; i < 64; ++i) out.at[i] = from[i % width];
  return out;
}
inline Bytes broadcast8(const uint8_t* from) { return repeat(from, 8); }
inline Bytes broadcast4(const uint8_t* from) { return repeat(from, 4); }
inline Bytes select(Bytes bytes, Bytes positions) {  // vpshufb: bit 7 gives 0, bits 4-6 mean nothing, within 16 bytes
  Bytes out;
  for (size_t i = 0; i < 64; ++i) {
    uint8_t position = positions.at[i];
    out.at[i] = position & 128 ? 0 : bytes.at[i / 16 * 16 + position % 16];
  }
  return out;
}
inline Bytes high_nibbles(Bytes positions) {  // vpsrld: the bits above come from the next byte of the four
  Bytes out;
  for (size_t i = 0; i < 64; i += 4) {
    uint32_t four;
    std::memcpy(&four, positions.at + i, 4);
    four >>= 4;
    std::memcpy(out.at + i, &four, 4);
  }
  return out;
}
inline Bytes dot(Bytes sums, Bytes x, Bytes weights) {  // vpdpbusd: wraps like unsigned numbers
  for (size_t i = 0; i < 64; i += 4) {
    uint32_t sum;
    std::memcpy(&sum, sums.at + i, 4);
    for (size_t j = i; j < i + 4; ++j) sum += static_cast<uint32_t>(x.at[j] * static_cast<int8_t>(weights.at[j]));
    std::memcpy(sums.at + i, &sum, 4);
  }
  return sums;
}

}  // namespace
}  // namespace sqat

#endif
