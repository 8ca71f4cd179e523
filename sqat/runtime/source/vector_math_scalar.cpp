// The float epilogues and the passes of training in vectors of 4 lanes, which every processor has or its compiler spells
// out; see vector_math.h and passes.h.
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include <type_traits>

#include "engine.h"

#define SQAT_LANES 4
#define SQAT_EPILOGUES kEpiloguesScalar
#define SQAT_PASSES kPassesScalar
#include "vector_math.h"
#include "passes.h"
