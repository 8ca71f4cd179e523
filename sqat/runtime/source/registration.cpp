// The entry point: ops of the domain `sqat`, one set for each instruction set, alive as long as the process (which the
// library is linked to stay in: sessions hold pointers into it).
#include <climits>
#include <exception>
#include <mutex>

#include "dispatch.h"
#include "operators.h"

namespace sqat {
namespace {

constexpr Slot f32{kFloat, kRequired}, u8{kUint8, kRequired}, i8{kInt8, kRequired}, i64{kInt64, kRequired};

constexpr Slot optional(Slot slot) { return {slot.type, kOptional}; }

// Never taken down either.
const std::vector<Operator>& operators() {
  static const auto* all = new std::vector<Operator>{
    // X, values, positions, scale, bias, residual, gamma, beta, steps, mask -> Y, Q
    {"Linear",
     {u8, i8, optional(u8), f32, f32, optional(f32), optional(f32), optional(f32), optional(f32), optional(i64)},
     {optional(f32), optional(u8)},
     make_linear},
    // QKV, mask
    {"Attention", {u8, i64}, {u8}, make_attention},
    // ids, types, places, word, position, type, gamma, beta -> Y, Q
    {"Embed",
     {i64, optional(i64), optional(i64), f32, f32, optional(f32), f32, f32},
     {optional(f32), optional(u8)},
     make_embed},
    // ids, types, places, word, word_scale, position, type, gamma, beta -> Y, Q
    {"EmbedInt8",
     {i64, optional(i64), optional(i64), i8, f32, f32, optional(f32), f32, f32},
     {optional(f32), optional(u8)},
     make_embed_int8},
    // states, mask -> Y
    {"MeanPool", {f32, i64}, {f32}, make_mean_pool},
  };
  return *all;
}

// What ONNX Runtime gets a pointer to, with what our functions need behind it.
struct Definition {
  CustomOp op;
  const Operator* what;
  const Engine* engine;
};

const Operator& what(const CustomOp* op) { return *reinterpret_cast<const Definition*>(op)->what; }

template <typename Body>
Status* guarded(const Body& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Failure& failure) {
    return make_status(api, failure.code, failure.message.c_str());
  } catch (const std::bad_alloc&) {
    return make_status(api, kFail, "sqat: out of memory");
  } catch (const std::exception& failure) {
    return make_status(api, kFail, failure.what());
  } catch (...) {
    return make_status(api, kFail, "sqat: unknown failure");
  }
}

Status* create(const CustomOp* op, const Api*, const KernelInfo* info, void** kernel) {
  return guarded([&] { *kernel = what(op).make(*reinterpret_cast<const Definition*>(op)->engine, info).release(); });
}

Status* compute(void* kernel, KernelContext* context) {
  return guarded([&] { static_cast<Kernel*>(kernel)->compute(context); });
}

Definition define(const Operator& which, const Engine& engine) {
  CustomOp op{};
  op.version = kApiVersion;
  op.get_name = [](const CustomOp* self) { return what(self).name; };
  op.get_provider = [](const CustomOp*) -> const char* { return nullptr; };
  op.get_input_type = [](const CustomOp* self, size_t i) -> int { return what(self).inputs[i].type; };
  op.get_input_count = [](const CustomOp* self) { return what(self).inputs.size(); };
  op.get_output_type = [](const CustomOp* self, size_t i) -> int { return what(self).outputs[i].type; };
  op.get_output_count = [](const CustomOp* self) { return what(self).outputs.size(); };
  op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.get_input_characteristic = [](const CustomOp* self, size_t i) -> int {
    return what(self).inputs[i].characteristic;
  };
  op.get_output_characteristic = [](const CustomOp* self, size_t i) -> int {
    return what(self).outputs[i].characteristic;
  };
  op.get_input_memory = [](const CustomOp*, size_t) { return 0; };
  op.get_variadic_input_arity = op.get_variadic_output_arity = [](const CustomOp*) { return 1; };
  op.get_variadic_input_homogeneity = op.get_variadic_output_homogeneity = [](const CustomOp*) { return 1; };
  op.create_kernel_v2 = create;
  op.compute_v2 = compute;
  op.get_start_version = [](const CustomOp*) { return 1; };
  op.get_end_version = [](const CustomOp*) { return INT_MAX; };
  return {op, &which, &engine};
}

struct Domain {
  std::vector<Definition> definitions;
  CustomOpDomain* handle = nullptr;
};

// Never taken down: sessions keep pointers into it, and the order of destructors at exit is not ours.
Domain& domain_of(size_t engine) {
  static std::mutex mutex;
  static auto* domains = new Domain[kEngines];
  std::lock_guard<std::mutex> lock(mutex);
  Domain& domain = domains[engine];
  if (domain.handle != nullptr) return domain;
  domain.definitions.clear();
  for (const Operator& op : operators()) domain.definitions.push_back(define(op, engine_at(engine)));
  CustomOpDomain* handle = nullptr;
  check(call(kCreateCustomOpDomain, "sqat", &handle));
  for (const Definition& definition : domain.definitions) check(call(kCustomOpDomainAdd, handle, &definition.op));
  domain.handle = handle;
  return domain;
}

// Takes a table as the one of this process, which running kernels read: false where there is another one already.
bool adopt(const Api* table) {
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  if (api == nullptr) api = table;
  return api == table;
}

}  // namespace
}  // namespace sqat

// Registers the ops with a session's options; the one symbol ONNX Runtime looks for.
SQAT_EXPORT sqat::Status* RegisterCustomOps(sqat::SessionOptions* options, const sqat::ApiBase* base) {
  using namespace sqat;
  const Api* table = base->get_api(kApiVersion);
  if (table == nullptr) {
    const Api* first = base->get_api(1);  // old enough for every version, to have something that makes a status
    if (first == nullptr) return nullptr;
    const std::string problem = std::string("sqat needs ONNX Runtime 1.17 or later, this is ") + base->get_version();
    return make_status(first, kFail, problem.c_str());
  }
  if (!adopt(table)) {
    return make_status(table, kFail, "sqat's library serves another ONNX Runtime of this process: load a copy of it");
  }
  return guarded([&] { check(call(kAddCustomOpDomain, options, domain_of(choose_engine()).handle)); });
}

// The instruction set a session made now would use; what is wrong with SQAT_RUNTIME_ISA starts with "error: ".
SQAT_EXPORT const char* SqatInstructionSet() noexcept {
  static thread_local std::string answer;
  try {
    return sqat::engine_at(sqat::choose_engine()).name;
  } catch (const sqat::Failure& failure) {
    answer = "error: " + failure.message;
    return answer.c_str();
  } catch (...) {
    return "error: out of memory";
  }
}
