// The kernels and the table by which ONNX Runtime knows them.
#pragma once

#include <memory>
#include <vector>

#include "engine.h"
#include "node.h"

namespace sqat {

class Kernel {
 public:
  virtual ~Kernel() = default;
  virtual void compute(KernelContext* context) = 0;
};

std::unique_ptr<Kernel> make_linear(const Engine& engine, const KernelInfo* info);
std::unique_ptr<Kernel> make_attention(const Engine& engine, const KernelInfo* info);
std::unique_ptr<Kernel> make_embed(const Engine& engine, const KernelInfo* info);
std::unique_ptr<Kernel> make_embed_int8(const Engine& engine, const KernelInfo* info);
std::unique_ptr<Kernel> make_mean_pool(const Engine& engine, const KernelInfo* info);

struct Slot {
  ElementType type;
  Characteristic characteristic;
};

struct Operator {
  const char* name;
  std::vector<Slot> inputs;
  std::vector<Slot> outputs;
  std::unique_ptr<Kernel> (*make)(const Engine&, const KernelInfo*);
};

}  // namespace sqat
