// The float epilogues in vectors of 8 lanes; see vector_math.h.
#if defined(__x86_64__)
#include <immintrin.h>

#include <type_traits>

#include "engine.h"

#pragma GCC target("avx2")

#define SQAT_LANES 8
#define SQAT_EPILOGUES kEpiloguesAvx2
#include "vector_math.h"
#endif
