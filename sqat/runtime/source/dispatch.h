// Which instruction set serves: what the processor offers, or what SQAT_RUNTIME_ISA asks for.
#pragma once

#include "engine.h"

namespace sqat {

constexpr size_t kEngines = 3;

// Engines from best to portable; throws where SQAT_RUNTIME_ISA names none or one this processor lacks.
size_t choose_engine();
const Engine& engine_at(size_t index);

// Whether 2:4 weights are multiplied as such or expanded to dense ones when a kernel is made: SQAT_RUNTIME_SPARSE
// (0 or 1), else what is faster on this processor.
bool keep_sparse(const Engine& engine);

}  // namespace sqat
