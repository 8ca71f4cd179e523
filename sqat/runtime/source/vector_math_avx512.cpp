// The float epilogues and the passes of training in vectors of 16 lanes; see vector_math.h and passes.h.
#if defined(__x86_64__)
#include <immintrin.h>

#include <type_traits>

#include "engine.h"

#if !defined(SQAT_EMULATE_VNNI)
#pragma GCC target("avx512f,avx512bw,avx512vl")
#endif

#define SQAT_LANES 16
#define SQAT_EPILOGUES kEpiloguesAvx512
#define SQAT_PASSES kPassesAvx512
#include "vector_math.h"
#include "passes.h"
#endif
