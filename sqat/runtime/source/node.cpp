// Reading nodes through ONNX Runtime's ABI; see node.h.
#include "node.h"

namespace sqat {

const Api* api = nullptr;

Status* make_status(const Api* table, ErrorCode code, const char* message) noexcept {
  using Function = Status* (*)(int, const char*);
  return reinterpret_cast<Function>(const_cast<void*>(table[kCreateStatus]))(code, message);
}

std::string take_message(Status* status) {
  using Function = const char* (*)(const Status*);
  std::string message = reinterpret_cast<Function>(const_cast<void*>(api[kGetErrorMessage]))(status);
  release(kReleaseStatus, status);
  return message;
}

void check(Status* status) {
  if (status != nullptr) throw Failure{kFail, take_message(status)};
}

std::string text(const Shape& shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); ++i) out += (i ? "," : "") + std::to_string(shape[i]);
  return out + "]";
}

size_t product(const Shape& shape) {
  size_t out = 1;
  for (int64_t length : shape) out *= static_cast<size_t>(length);
  return out;
}

void refuse(ErrorCode code, const std::string& where, const std::string& problem) {
  throw Failure{code, "sqat." + where + " " + problem};
}

void require_shape(const Tensor& tensor, const Shape& expected, ErrorCode code) {
  if (tensor.shape == expected) return;
  refuse(code, tensor.name, "has shape " + text(tensor.shape) + ", expected " + text(expected));
}

float inverse_of(float scale, const std::string& where) {
  if (!(scale > 0.0f) || !std::isfinite(scale) || !std::isfinite(1.0f / scale)) {
    refuse(kInvalidGraph, where, "is " + std::to_string(scale) + ", expected a positive finite number with a finite inverse");
  }
  return 1.0f / scale;
}

namespace {

Tensor describe(const Value* value, const std::string& name) {
  Tensor tensor{name, kUndefined, {}, nullptr};
  if (value == nullptr) return tensor;
  ShapeInfo* info = nullptr;
  check(call(kGetTensorTypeAndShape, value, &info));
  int type = 0;
  size_t rank = 0;
  Status* status = call(kGetTensorElementType, static_cast<const ShapeInfo*>(info), &type);
  if (status == nullptr) status = call(kGetDimensionsCount, static_cast<const ShapeInfo*>(info), &rank);
  if (status == nullptr) {
    tensor.shape.resize(rank);
    status = call(kGetDimensions, static_cast<const ShapeInfo*>(info), tensor.shape.data(), rank);
  }
  release(kReleaseShapeInfo, info);
  check(status);
  tensor.type = static_cast<ElementType>(type);
  check(call(kGetTensorMutableData, const_cast<Value*>(value), &tensor.data));
  return tensor;
}

// A status of an attribute: true where it is simply missing; another type than expected is the writer's mistake.
bool is_missing(Status* status, const std::string& where) {
  if (status == nullptr) return false;
  std::string message = take_message(status);
  if (message.find("type") != std::string::npos) refuse(kInvalidGraph, where, "has another type: " + message);
  return true;
}

}  // namespace

float Node::number(const char* name, float missing) const {
  float value = missing;
  return is_missing(call(kGetAttributeFloat, info_, name, &value), place(name)) ? missing : value;
}

int64_t Node::integer(const char* name) const {
  int64_t value = 0;
  if (is_missing(call(kGetAttributeInt, info_, name, &value), place(name))) {
    refuse(kInvalidGraph, place(name), "is missing, expected an integer attribute");
  }
  return value;
}

std::string Node::word(const char* name, const std::string& missing) const {
  size_t size = 0;
  char* nowhere = nullptr;
  if (is_missing(call(kGetAttributeString, info_, name, nowhere, &size), place(name)) || size == 0) return missing;
  std::string value(size, '\0');
  check(call(kGetAttributeString, info_, name, value.data(), &size));
  value.resize(value.find('\0') == std::string::npos ? value.size() : value.find('\0'));
  return value;
}

Tensor Node::constant(size_t index, const char* name, ElementType type) const {
  int is_constant = 0;
  const Value* value = nullptr;
  Status* status = call(kGetConstantInput, info_, index, &is_constant, &value);
  if (status != nullptr) take_message(status);  // an index past the node's inputs
  if (status != nullptr || is_constant == 0 || value == nullptr) return Tensor{place(name), kUndefined, {}, nullptr};
  Tensor tensor = describe(value, place(name));
  if (tensor.type != type) refuse(kInvalidGraph, place(name), "has element type " + std::to_string(tensor.type));
  return tensor;
}

Call::Call(KernelContext* context, std::string op) : context_(context), op_(std::move(op)) {
  check(call(kGetInputCount, static_cast<const KernelContext*>(context), &inputs_));
  check(call(kGetOutputCount, static_cast<const KernelContext*>(context), &outputs_));
}

Tensor Call::input(size_t index, const char* name) const {
  const Value* value = nullptr;
  if (index < inputs_) check(call(kGetInput, static_cast<const KernelContext*>(context_), index, &value));
  return describe(value, place(name));
}

Tensor Call::output(size_t index, const Shape& shape) const {
  Value* value = nullptr;
  if (index < outputs_) check(call(kGetOutput, context_, index, shape.data(), shape.size(), &value));
  return describe(value, place("output"));
}

void Call::run(size_t count, void (*step)(void*, size_t), void* user) const {
  if (count == 0) return;
  check(call(kParallelFor, static_cast<const KernelContext*>(context_), step, count, size_t{0}, user));
}

}  // namespace sqat
