// The part of ONNX Runtime's C ABI this library uses, by hand: its wheel ships no headers.
//
// The table of functions only ever grows at its end, so that an index holds for every later version; version 17 is the
// first with all of them. Every call returns null or a status, which `check` turns into a Failure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace sqat {

constexpr uint32_t kApiVersion = 17;

// ONNX Runtime's own types, never looked into.
struct Status;
struct SessionOptions;
struct KernelInfo;
struct KernelContext;
struct Value;
struct ShapeInfo;
struct Allocator;
struct CustomOpDomain;

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2, kInvalidGraph = 10 };
enum ElementType : int { kUndefined = 0, kFloat = 1, kUint8 = 2, kInt8 = 3, kInt64 = 7 };
enum Characteristic : int { kRequired = 0, kOptional = 1 };

using Api = const void*;  // the first entry of the table

struct ApiBase {
  const Api* (*get_api)(uint32_t version);
  const char* (*get_version)();
};

// Indices in the table.
enum ApiIndex : size_t {
  kCreateStatus = 0,
  kGetErrorMessage = 2,
  kCreateCustomOpDomain = 26,
  kCustomOpDomainAdd = 27,
  kAddCustomOpDomain = 28,
  kGetTensorMutableData = 51,
  kGetTensorElementType = 60,
  kGetDimensionsCount = 61,
  kGetDimensions = 62,
  kGetTensorTypeAndShape = 65,
  kGetAttributeFloat = 85,
  kGetAttributeInt = 86,
  kGetAttributeString = 87,
  kGetInputCount = 88,
  kGetOutputCount = 89,
  kGetInput = 90,
  kGetOutput = 91,
  kReleaseStatus = 93,
  kReleaseShapeInfo = 99,
  kGetConstantInput = 249,
  kParallelFor = 274,
};

// A custom op as ONNX Runtime sees it, 208 bytes; functions that may be null are void pointers here.
struct CustomOp {
  uint32_t version;
  const void* create_kernel;
  const char* (*get_name)(const CustomOp*);
  const char* (*get_provider)(const CustomOp*);
  int (*get_input_type)(const CustomOp*, size_t);
  size_t (*get_input_count)(const CustomOp*);
  int (*get_output_type)(const CustomOp*, size_t);
  size_t (*get_output_count)(const CustomOp*);
  const void* compute;
  void (*destroy)(void* kernel);
  int (*get_input_characteristic)(const CustomOp*, size_t);
  int (*get_output_characteristic)(const CustomOp*, size_t);
  int (*get_input_memory)(const CustomOp*, size_t);
  int (*get_variadic_input_arity)(const CustomOp*);
  int (*get_variadic_input_homogeneity)(const CustomOp*);
  int (*get_variadic_output_arity)(const CustomOp*);
  int (*get_variadic_output_homogeneity)(const CustomOp*);
  Status* (*create_kernel_v2)(const CustomOp*, const Api*, const KernelInfo*, void** kernel);
  Status* (*compute_v2)(void* kernel, KernelContext*);
  const void* infer_output_shape;
  int (*get_start_version)(const CustomOp*);
  int (*get_end_version)(const CustomOp*);
  const void* unused[4];
};
static_assert(sizeof(CustomOp) == 208, "ONNX Runtime reads these 208 bytes");

// What went wrong, thrown within the library and turned into a status at its border.
struct Failure {
  ErrorCode code;
  std::string message;
};

// The table, set once by the first registration that is not refused; the same for every session of a process.
extern const Api* api;

template <typename... Arguments>
Status* call(ApiIndex index, Arguments... arguments) {
  using Function = Status* (*)(Arguments...);
  return reinterpret_cast<Function>(const_cast<void*>(api[index]))(arguments...);
}

template <typename... Arguments>
void release(ApiIndex index, Arguments... arguments) {
  using Function = void (*)(Arguments...);
  reinterpret_cast<Function>(const_cast<void*>(api[index]))(arguments...);
}

Status* make_status(const Api* table, ErrorCode code, const char* message) noexcept;
std::string take_message(Status* status);  // releases the status
void check(Status* status);                // throws what the status says

}  // namespace sqat
