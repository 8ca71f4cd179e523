// The passes of training for callers outside: plain C, called by sqat.runtime.kernels with the addresses of torch's tensors.
//
// One thread each: a caller whose framework computes with several has more of its own operators. None of them can fail:
// what is wrong with SQAT_RUNTIME_ISA is told by SqatInstructionSet, here it means the portable loops. A function whose
// arguments change takes another name: sqat.runtime.kernels knows an older library by what it lacks.
#include "dispatch.h"

#include "ort_abi.h"

namespace {

const sqat::Passes& choose_passes() {
  try {
    return *sqat::engine_at(sqat::choose_engine()).passes;
  } catch (const sqat::Failure&) {
    return sqat::kPassesScalar;
  }
}

const sqat::Passes& passes() {
  static const sqat::Passes& chosen = choose_passes();
  return chosen;
}

}  // namespace

SQAT_EXPORT void SqatMask(const float* x, const uint8_t* kept, size_t values, float added, float* y) noexcept {
  passes().mask(x, kept, values, added, y);
}

SQAT_EXPORT void SqatSelect(const float* x, const uint8_t* kept, size_t values, float* y) noexcept {
  passes().select(x, kept, values, y);
}

SQAT_EXPORT void SqatFakeQuantize(const float* x, size_t values, float amax, float low, float* y,
                                  uint8_t* inside) noexcept {
  passes().fake_quantize(x, values, amax, low, y, inside);
}

SQAT_EXPORT void SqatFakeQuantizeRows(const float* x, const uint8_t* kept, size_t rows, size_t columns,
                                      float* y) noexcept {
  passes().fake_quantize_rows(x, kept, rows, columns, y);
}

SQAT_EXPORT void SqatRankFours(const float* x, size_t values, uint8_t* ranks) noexcept {
  passes().rank_fours(x, values, ranks);
}

SQAT_EXPORT float SqatLargest(const float* x, size_t values) noexcept { return passes().largest(x, values); }

SQAT_EXPORT void SqatCountBins(const float* x, size_t values, float inverse, size_t bins, int64_t* counts) noexcept {
  passes().count_bins(x, values, inverse, bins, counts);
}
