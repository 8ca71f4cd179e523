// The float epilogues and the passes of training in vectors of 8 lanes; see vector_math.h and passes.h.
#if defined(__x86_64__)
#include <immintrin.h>

#include <type_traits>

#include "engine.h"

#pragma GCC target("avx2")

#define SQAT_LANES 8
#define SQAT_EPILOGUES kEpiloguesAvx2
#define SQAT_PASSES kPassesAvx2
#include "vector_math.h"
#include "passes.h"
#endif
