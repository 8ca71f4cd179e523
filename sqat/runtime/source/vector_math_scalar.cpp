// The float epilogues in vectors of 4 lanes, which every processor has or its compiler spells out; see vector_math.h.
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include <type_traits>

#include "engine.h"

#define SQAT_LANES 4
#define SQAT_EPILOGUES kEpiloguesScalar
#include "vector_math.h"
