// What an op asks of its node: attributes, constant inputs, tensors of a call, and the session's threads.
#pragma once

#include <atomic>
#include <cmath>
#include <new>
#include <string>
#include <vector>

#include "ort_abi.h"

namespace sqat {

using Shape = std::vector<int64_t>;

std::string text(const Shape& shape);  // [2,3]
size_t product(const Shape& shape);

// A tensor of ONNX Runtime's; `data` is null where an optional one is missing.
struct Tensor {
  std::string name;
  ElementType type = kUndefined;
  Shape shape;
  void* data = nullptr;

  explicit operator bool() const { return data != nullptr || type != kUndefined; }
  size_t size() const { return product(shape); }
  template <typename T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
};

// Throws what is wrong with a node; `where` is an op and an input's name.
[[noreturn]] void refuse(ErrorCode code, const std::string& where, const std::string& problem);
void require_shape(const Tensor& tensor, const Shape& expected, ErrorCode code);

// A node while its kernel is made.
class Node {
 public:
  Node(const KernelInfo* info, std::string op) : info_(info), op_(std::move(op)) {}

  float number(const char* name, float missing) const;
  int64_t integer(const char* name) const;  // throws where the attribute is missing
  std::string word(const char* name, const std::string& missing) const;
  Tensor constant(size_t index, const char* name, ElementType type) const;  // empty unless an initializer
  std::string place(const std::string& name) const { return op_ + ": " + name; }

 private:
  const KernelInfo* info_;
  std::string op_;
};

// A node while it runs.
class Call {
 public:
  Call(KernelContext* context, std::string op);

  Tensor input(size_t index, const char* name) const;
  Tensor output(size_t index, const Shape& shape) const;  // empty where the node does not ask for it
  std::string place(const std::string& name) const { return op_ + ": " + name; }

  // body(i) for every i below count on the session's threads; what a body throws is thrown here as bad_alloc.
  template <typename Body>
  void parallel(size_t count, const Body& body) const;

 private:
  void run(size_t count, void (*step)(void*, size_t), void* user) const;

  KernelContext* context_;
  std::string op_;
  size_t inputs_ = 0;
  size_t outputs_ = 0;
};

template <typename Body>
void Call::parallel(size_t count, const Body& body) const {
  if (count == 1) return body(size_t{0});
  struct Work {
    const Body* body;
    std::atomic<bool> failed;
  } work{&body, false};
  // Nothing may be thrown through ONNX Runtime's threads; all a body can run out of is memory.
  auto step = [](void* user, size_t index) {
    try {
      (*static_cast<Work*>(user)->body)(index);
    } catch (...) {
      static_cast<Work*>(user)->failed = true;
    }
  };
  run(count, step, &work);
  if (work.failed) throw std::bad_alloc();
}

// A step that a scale divides by: its inverse, after a check that it is a positive finite number.
float inverse_of(float scale, const std::string& where);

}  // namespace sqat
