// sqat.Linear: an exact int8 product and all that follows it up to the next product.
//
// y = acc * scale + bias, activation, then optionally + residual and LayerNorm; out as f32 (Y), as u8 (Q) or both. The
// step of Q is one of all channels (y_scale) or, where no whole row is needed, one of each (steps).
// With a mask [texts,tokens], rows of padding are 0 and cost nothing; see rows.h.
// Work is shared as blocks of rows times runs of channel tiles. A block keeps its rows, prepared once, in the
// second-level cache; where one task has all channels of its rows it also finishes them, else a second round over the
// rows does.
#include <algorithm>
#include <cstring>
#include <utility>

#include "blocks.h"
#include "dispatch.h"
#include "operators.h"
#include "rows.h"

namespace sqat {
namespace {

constexpr size_t kBlockBytes = 192 * 1024;  // of prepared rows in a task, so that they stay in the second-level cache
constexpr size_t kFewestRows = 60;          // of a task, unless there are no more: unpacking a tile is worth that many
constexpr size_t kWantedTasks = 8;          // several for each thread, so that they finish together
constexpr size_t kFewestTiles = 6;          // of a task: it prepares its rows

Activation activation_of(const Node& node) {
  std::string name = node.word("activation", "none");
  if (name == "none") return Activation::kNone;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "relu") return Activation::kRelu;
  refuse(kInvalidGraph, node.place("activation"), "is '" + name + "', expected none, gelu, gelu_tanh or relu");
}

Tensor required(const Node& node, size_t index, const char* name, ElementType type) {
  Tensor tensor = node.constant(index, name, type);
  if (!tensor) refuse(kInvalidGraph, node.place(name), "is missing or computed, expected an initializer");
  return tensor;
}

std::vector<float> padded_copy(const Tensor& tensor, size_t channels) {
  std::vector<float> copy(channels, 0.0f);
  std::copy(tensor.as<float>(), tensor.as<float>() + tensor.size(), copy.begin());
  return copy;
}

// Every kept weight that is not 0 has a place of its own: else the tiles of 2:4 and dense weights would differ.
void check_positions(const Tensor& values, const Tensor& positions, size_t padded) {
  const size_t groups = padded / 8;
  const auto* packed = positions.as<uint8_t>();
  for (size_t step = 0; step < values.size() / kTileBytes; ++step) {
    const size_t tile = step / groups, group = step % groups;
    const uint8_t* places = packed + (tile * (groups / 2) + group / 2) * kTileBytes;
    const int8_t* kept = values.as<int8_t>() + step * kTileBytes;
    for (size_t lane = 0; lane < kTileBytes; lane += 4) {
      uint32_t taken = 0;
      for (size_t j = lane; j < lane + 4; ++j) {
        const uint32_t place = places[j] >> (group % 2 * 4) & 15;
        if (place > 7) refuse(kInvalidGraph, positions.name, "has a position above 7");
        if (kept[j] == 0) continue;
        if (taken >> place & 1) refuse(kInvalidGraph, positions.name, "has a position twice in a group");
        taken |= 1u << place;
      }
    }
  }
}

struct Split {
  size_t blocks, block_rows, runs, run_tiles;

  Split(size_t rows, size_t padded, size_t tiles, const Gemm& gemm) {
    const size_t most = std::max(kFewestRows, kBlockBytes / (padded * gemm.row_bytes));
    const size_t about = std::min(most, std::max(kFewestRows, rows / kWantedTasks));
    blocks = std::max<size_t>(1, (rows + about / 2) / about);
    block_rows = round_up((rows + blocks - 1) / blocks, gemm.max_rows);
    blocks = (rows + block_rows - 1) / block_rows;
    size_t wanted = blocks >= kWantedTasks ? 1 : (kWantedTasks + blocks - 1) / blocks;
    run_tiles = round_up(std::max(kFewestTiles, (tiles + wanted - 1) / wanted), gemm.max_tiles);
    runs = (tiles + run_tiles - 1) / run_tiles;
  }
};

class Linear : public Kernel {
 public:
  Linear(const Engine& engine, const Node& node);
  void compute(KernelContext* context) override;

 private:
  struct Buffers {
    const Rows* rows;
    const uint8_t* x;
    size_t inputs;
    const float* residual;
    float* rows_f32;  // where products of whole rows wait for their end, or Y
    float* y;
    uint8_t* q;
  };

  void read_steps(const Node& node);
  void read_weights(const Node& node);
  void expand();
  void multiply_block(const Buffers& buffers, const Split& split, size_t block, size_t run) const;
  void finish_rows(const Buffers& buffers, size_t first, size_t end) const;
  void clear_padding(const Buffers& buffers) const;
  void refuse_computed(const Call& call) const;

  const Engine& engine_;
  Weights weights_{};
  std::vector<int8_t> expanded_;
  size_t channels_ = 0;
  std::vector<float> scale_, bias_, inverses_;
  std::vector<int32_t> offsets_;
  Activation activation_;
  bool sparse_ = false, each_its_own_ = false;  // positions, steps of each channel are given
  float inverse_, epsilon_;
  Tensor gamma_, beta_;
};

Linear::Linear(const Engine& engine, const Node& node)
    : engine_(engine),
      activation_(activation_of(node)),
      inverse_(inverse_of(node.number("y_scale", 1.0f), node.place("y_scale"))),
      epsilon_(node.number("epsilon", 1e-12f)),
      gamma_(node.constant(6, "gamma", kFloat)),
      beta_(node.constant(7, "beta", kFloat)) {
  Tensor scale = required(node, 3, "scale", kFloat), bias = required(node, 4, "bias", kFloat);
  if (scale.shape.size() != 1 || scale.size() == 0) {
    refuse(kInvalidGraph, scale.name, "has shape " + text(scale.shape) + ", expected one scale per channel");
  }
  channels_ = scale.size();
  require_shape(bias, scale.shape, kInvalidGraph);
  if (static_cast<bool>(gamma_) != static_cast<bool>(beta_)) {
    refuse(kInvalidGraph, node.place(gamma_ ? "beta" : "gamma"), "is missing, LayerNorm needs gamma and beta");
  }
  if (gamma_) require_shape(gamma_, scale.shape, kInvalidGraph);
  if (beta_) require_shape(beta_, scale.shape, kInvalidGraph);
  if (!(epsilon_ >= 0.0f) || !std::isfinite(epsilon_))
    refuse(kInvalidGraph, node.place("epsilon"), "is no small number");
  scale_ = padded_copy(scale, round_up(channels_, kTile));
  bias_ = padded_copy(bias, round_up(channels_, kTile));
  read_steps(node);
  read_weights(node);
  if (weights_.positions && !keep_sparse(engine)) expand();
  if (const auto set_offsets = engine_.gemm(weights_).set_offsets) {
    offsets_.resize(scale_.size());
    set_offsets(weights_, scale_.size() / kTile, offsets_.data());
  }
}

void Linear::read_steps(const Node& node) {
  inverses_.assign(scale_.size(), inverse_);
  Tensor steps = node.constant(8, "steps", kFloat);
  if (!steps) return;
  require_shape(steps, {static_cast<int64_t>(channels_)}, kInvalidGraph);
  if (gamma_) refuse(kInvalidGraph, steps.name, "are given beside a LayerNorm, whose rows have one step: y_scale");
  for (size_t i = 0; i < channels_; ++i) inverses_[i] = inverse_of(steps.as<float>()[i], steps.name);
  each_its_own_ = true;
}

void Linear::read_weights(const Node& node) {
  Tensor values = required(node, 1, "values", kInt8), positions = node.constant(2, "positions", kUint8);
  const int64_t tiles = static_cast<int64_t>(round_up(channels_, kTile) / kTile);
  if (values.shape.size() != 3 || values.shape[0] != tiles || values.shape[2] != static_cast<int64_t>(kTileBytes)) {
    refuse(kInvalidGraph, values.name,
           "has shape " + text(values.shape) + ", expected [" + std::to_string(tiles) + ",inputs/" +
               (positions ? "8" : "4") + ",64] for " + std::to_string(channels_) + " channels");
  }
  const size_t padded = static_cast<size_t>(values.shape[1]) * (positions ? 8 : 4);
  if (padded % kInputStep != 0 || padded == 0 || padded > kMostInputs) {
    refuse(
        kInvalidGraph, values.name,
        "is for " + std::to_string(padded) + " inputs, expected a multiple of 16 up to " + std::to_string(kMostInputs));
  }
  if (positions) {
    require_shape(positions, {tiles, static_cast<int64_t>(padded / 16), static_cast<int64_t>(kTileBytes)},
                  kInvalidGraph);
    check_positions(values, positions, padded);
  }
  sparse_ = static_cast<bool>(positions);
  weights_ = {values.as<int8_t>(), positions ? positions.as<uint8_t>() : nullptr, padded};
}

void Linear::expand() {
  const size_t tiles = scale_.size() / kTile, step_bytes = weights_.padded / 4 * kTileBytes;
  expanded_.assign(tiles * step_bytes, 0);
  for (size_t tile = 0; tile < tiles; ++tile) {
    const Weights from = weights_.from(tile);
    int8_t* to = expanded_.data() + tile * step_bytes;
    for (size_t group = 0; group < from.padded / 8; ++group) {
      for (size_t i = 0; i < kTileBytes; ++i) {
        const size_t at = (from.positions[group / 2 * kTileBytes + i] >> (group % 2 * 4)) & 7;
        to[(group * 2 + at / 4) * kTileBytes + i / 4 * 4 + at % 4] |= from.values[group * kTileBytes + i];
      }
    }
  }
  weights_ = {expanded_.data(), nullptr, weights_.padded};
}

void Linear::multiply_block(const Buffers& buffers, const Split& split, size_t block, size_t run) const {
  static thread_local Scratch prepared;
  const Gemm& gemm = engine_.gemm(weights_);
  const size_t first = block * split.block_rows, last = std::min(first + split.block_rows, buffers.rows->kept());
  const size_t row_stride = weights_.padded * gemm.row_bytes;
  auto* x = prepared.take<uint8_t>((last - first) * row_stride);
  buffers.rows->each_run(first, last, [&](size_t at, size_t row, size_t count) {
    gemm.prepare_rows(buffers.x + row * buffers.inputs, buffers.inputs, count, buffers.inputs, weights_.padded, 128,
                      x + (at - first) * row_stride);
  });

  const size_t end = std::min((run + 1) * split.run_tiles, scale_.size() / kTile);
  const int32_t* offsets = offsets_.empty() ? nullptr : offsets_.data();
  auto then = [&](size_t tile, size_t tiles, const int32_t* products) {
    for (size_t i = 0; i < tiles; ++i) {
      const size_t channel = (tile + i) * kTile;
      buffers.rows->each_run(first, last, [&](size_t at, size_t row, size_t count) {
        const size_t to = row * channels_ + channel;
        engine_.epilogues->dequantize(
            products + (at - first) * tiles * kTile + i * kTile, tiles * kTile, count,
            {scale_.data() + channel, bias_.data() + channel, inverses_.data() + channel, activation_,
             std::min(kTile, channels_ - channel), buffers.rows_f32 ? buffers.rows_f32 + to : nullptr, channels_,
             buffers.q ? buffers.q + to : nullptr, channels_});
      });
    }
  };
  multiply_tiles(gemm, weights_, offsets, x, last - first, run * split.run_tiles, end, then);
}

void Linear::finish_rows(const Buffers& buffers, size_t first, size_t end) const {
  buffers.rows->each_run(first, end, [&](size_t, size_t row, size_t count) {
    for (size_t to = row * channels_; to < (row + count) * channels_; to += channels_) {
      engine_.epilogues->finish_row(
          buffers.rows_f32 + to,
          {channels_, buffers.residual ? buffers.residual + to : nullptr, gamma_.as<float>(), beta_.as<float>(),
           epsilon_, inverse_, buffers.y ? buffers.y + to : nullptr, buffers.q ? buffers.q + to : nullptr});
    }
  });
}

void Linear::clear_padding(const Buffers& buffers) const {
  buffers.rows->each_gap([&](size_t row, size_t count) {
    if (buffers.y) std::memset(buffers.y + row * channels_, 0, count * channels_ * sizeof(float));
    if (buffers.q) std::memset(buffers.q + row * channels_, 128, count * channels_);
  });
}

// What is read once, when the kernel is made, must have been there: a computed one would be ignored.
void Linear::refuse_computed(const Call& call) const {
  const std::pair<size_t, bool> optional[] = {{2, sparse_}, {6, static_cast<bool>(gamma_)}, {8, each_its_own_}};
  for (const auto& [index, known] : optional) {
    Tensor given = call.input(index, index == 2 ? "positions" : index == 6 ? "gamma" : "steps");
    if (given && !known) refuse(kInvalidGraph, given.name, "is computed, expected an initializer");
  }
}

void Linear::compute(KernelContext* context) {
  Call call(context, "Linear");
  Tensor x = call.input(0, "X"), residual = call.input(5, "residual"), mask = call.input(9, "mask");
  const size_t inputs = x.shape.empty() ? 0 : static_cast<size_t>(x.shape.back());
  if (round_up(inputs, kInputStep) != weights_.padded) {
    refuse(kInvalidArgument, x.name,
           "has shape " + text(x.shape) + ", but the weights are for up to " + std::to_string(weights_.padded) +
               " inputs in its last dimension");
  }
  Shape shape = x.shape;
  if (mask && shape.size() == 1) refuse(kInvalidArgument, mask.name, "is given for one row");
  if (mask) require_shape(mask, Shape(shape.begin(), shape.end() - 1), kInvalidArgument);
  shape.back() = static_cast<int64_t>(channels_);
  if (residual) require_shape(residual, shape, kInvalidArgument);
  if (residual && each_its_own_) refuse(kInvalidArgument, residual.name, "is given beside steps of each channel");
  refuse_computed(call);
  Tensor y = call.output(0, shape), q = call.output(1, shape);
  const size_t all = product(shape) / channels_;
  if (all == 0 || (!y && !q)) return;

  const Rows kept = mask ? Rows(mask.as<int64_t>(), all, static_cast<size_t>(mask.shape.back())) : Rows(all);
  const size_t rows = kept.kept();
  const bool whole_rows = residual || gamma_;
  std::unique_ptr<float[]> waiting;
  if (whole_rows && !y) waiting.reset(new float[all * channels_]);
  Buffers buffers{&kept,
                  x.as<uint8_t>(),
                  inputs,
                  residual.as<float>(),
                  waiting ? waiting.get() : static_cast<float*>(y.data),
                  static_cast<float*>(y.data),
                  static_cast<uint8_t*>(q.data)};
  const Split split(rows, weights_.padded, scale_.size() / kTile, engine_.gemm(weights_));
  clear_padding(buffers);
  Buffers first_round = buffers;
  if (whole_rows) first_round.q = nullptr;
  call.parallel(split.blocks * split.runs, [&](size_t task) {
    const size_t block = task / split.runs;
    multiply_block(first_round, split, block, task % split.runs);
    if (!whole_rows || split.runs > 1) return;
    finish_rows(buffers, block * split.block_rows, std::min(rows, (block + 1) * split.block_rows));
  });
  if (!whole_rows || split.runs == 1) return;
  const size_t some = (rows + kWantedTasks - 1) / kWantedTasks;
  call.parallel((rows + some - 1) / some,
                [&](size_t part) { finish_rows(buffers, part * some, std::min(rows, (part + 1) * some)); });
}

}  // namespace

std::unique_ptr<Kernel> make_linear(const Engine& engine, const KernelInfo* info) {
  return std::make_unique<Linear>(engine, Node(info, "Linear"));
}

}  // namespace sqat
