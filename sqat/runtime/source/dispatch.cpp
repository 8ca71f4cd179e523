// Choosing the instruction set; see dispatch.h.
#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <string>

#include "ort_abi.h"

namespace sqat {
namespace {

bool always() { return true; }

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2"); }

#if defined(SQAT_EMULATE_VNNI)
bool has_vnni() { return true; }
#else
bool has_vnni() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}
#endif

// Intel's 512-bit shuffles use one port: by a model of the ports 2:4 gains nothing there.
bool shuffles_slowly() { return __builtin_cpu_is("intel"); }
#endif

struct Candidate {
  Engine engine;
  bool (*available)();
};

const Candidate kCandidates[] = {
#if defined(__x86_64__)
    {{"avx512_vnni", &kSparseVnni, &kDenseVnni, &kEpiloguesAvx512, &kPassesAvx512}, has_vnni},
    {{"avx2", &kSparseAvx2, &kDenseAvx2, &kEpiloguesAvx2, &kPassesAvx2}, has_avx2},
#endif
    {{"scalar", &kSparseScalar, &kDenseScalar, &kEpiloguesScalar, &kPassesScalar}, always},
};
constexpr size_t kCount = sizeof kCandidates / sizeof kCandidates[0];
static_assert(kCount <= kEngines, "engines and candidates");

}  // namespace

const Engine& engine_at(size_t index) { return kCandidates[index].engine; }

size_t choose_engine() {
  const char* wanted = std::getenv("SQAT_RUNTIME_ISA");
  const bool any = wanted == nullptr || *wanted == '\0';
  std::string names;
  for (size_t i = 0; i < kCount; ++i) {
    const Candidate& candidate = kCandidates[i];
    names += (i ? ", " : "") + std::string(candidate.engine.name);
    if (!any && std::strcmp(wanted, candidate.engine.name) != 0) continue;
    if (candidate.available()) return i;
    if (!any) throw Failure{kInvalidArgument, "SQAT_RUNTIME_ISA=" + std::string(wanted) + ": this processor lacks it"};
  }
  throw Failure{kInvalidArgument, "SQAT_RUNTIME_ISA=" + std::string(wanted) + ": expected one of " + names};
}

bool keep_sparse(const Engine& engine) {
  const char* wanted = std::getenv("SQAT_RUNTIME_SPARSE");
  if (wanted != nullptr && std::strcmp(wanted, "0") == 0) return false;
  if (wanted != nullptr && std::strcmp(wanted, "1") == 0) return true;
  if (wanted != nullptr && *wanted != '\0') {
    throw Failure{kInvalidArgument, "SQAT_RUNTIME_SPARSE=" + std::string(wanted) + ": expected 0 or 1"};
  }
#if defined(__x86_64__)
  if (engine.sparse == &kSparseVnni && shuffles_slowly()) return false;
#endif
  return true;
}

}  // namespace sqat
