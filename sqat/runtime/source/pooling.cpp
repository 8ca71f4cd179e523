// sqat.MeanPool: the mean of the states of a text's tokens. A sum over tokens runs in their order, whatever the number of
// threads, and leaves padding out, so that neither changes a bit.
#include <algorithm>

#include "blocks.h"
#include "operators.h"

namespace sqat {
namespace {

constexpr size_t kChannels = 128;  // of a task
constexpr float kLeastCount = 1e-9f;  // of tokens: a text without any is 0

class MeanPool : public Kernel {
 public:
  void compute(KernelContext* context) override;
};

void pool_channels(const float* states, const int64_t* mask, size_t tokens, size_t width, size_t channels, float* y) {
  std::fill(y, y + channels, 0.0f);
  float count = 0.0f;
  for (size_t token = 0; token < tokens; ++token) {
    if (mask[token] == 0) continue;
    const float weight = static_cast<float>(mask[token]);
    const float* row = states + token * width;
    for (size_t i = 0; i < channels; ++i) y[i] += row[i] * weight;
    count += weight;
  }
  const float divisor = std::max(count, kLeastCount);
  for (size_t i = 0; i < channels; ++i) y[i] /= divisor;
}

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
    pool_channels(states.as<float>() + row * tokens * width + first, mask.as<int64_t>() + row * tokens, tokens, width,
                  std::min(kChannels, width - first), rows + row * width + first);
  });
}

}  // namespace

std::unique_ptr<Kernel> make_mean_pool(const Engine&, const KernelInfo*) { return std::make_unique<MeanPool>(); }

}  // namespace sqat
