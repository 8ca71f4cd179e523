// sqat.MeanPool: the mean of the states of a text's tokens. A sum over tokens runs in their order, whatever the number of
// threads, and leaves padding out, so that neither changes a bit.
#include <algorithm>

#include "blocks.h"
#include "operators.h"

namespace sqat {
namespace {

constexpr size_t kChannels = 128;  // of a task

class MeanPool : public Kernel {
 public:
  explicit MeanPool(const Engine& engine) : engine_(engine) {}
  void compute(KernelContext* context) override;

 private:
  const Engine& engine_;
};

void MeanPool::compute(KernelContext* context) {
  Call call(context, "MeanPool");
  Tensor states = call.input(0, "states"), mask = call.input(1, "mask");
  if (states.shape.size() != 3)
    refuse(kInvalidArgument, states.name, "has shape " + text(states.shape) + ", expected [texts,tokens,width]");
  require_shape(mask, {states.shape[0], states.shape[1]}, kInvalidArgument);
  Tensor y = call.output(0, {states.shape[0], states.shape[2]});
  if (!y || y.size() == 0) return;

  const size_t tokens = static_cast<size_t>(states.shape[1]), width = static_cast<size_t>(states.shape[2]);
  const size_t chunks = (width + kChannels - 1) / kChannels;
  auto* rows = static_cast<float*>(y.data);
  call.parallel(static_cast<size_t>(states.shape[0]) * chunks, [&](size_t task) {
    const size_t row = task / chunks, first = task % chunks * kChannels;
    engine_.epilogues->mean(states.as<float>() + row * tokens * width + first, mask.as<int64_t>() + row * tokens, tokens,
                            width, std::min(kChannels, width - first), rows + row * width + first);
  });
}

}  // namespace

std::unique_ptr<Kernel> make_mean_pool(const Engine& engine, const KernelInfo*) {
  return std::make_unique<MeanPool>(engine);
}

}  // namespace sqat
