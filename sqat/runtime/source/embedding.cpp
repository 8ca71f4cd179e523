// sqat.Embed and sqat.EmbedInt8: word (+ type) + position embeddings and their LayerNorm, out as f32 and u8.
//
// Words are f32 or int8 with a scale for each row. Numbers of words, places and types are checked before anything is
// read: they come from the caller.
#include <algorithm>

#include "blocks.h"
#include "operators.h"

namespace sqat {
namespace {

constexpr size_t kTokens = 16;  // of a task

class Embed : public Kernel {
 public:
  Embed(const Engine& engine, const Node& node, bool is_int8);
  void compute(KernelContext* context) override;

 private:
  struct Numbers {  // of tokens, types, places; the last two may be null
    const int64_t* ids;
    const int64_t* types;
    const int64_t* places;
    size_t tokens;  // of a text
  };

  void require_table(const Tensor& table) const;
  void embed_token(const Numbers& numbers, size_t token, float* row, float* y, uint8_t* q) const;

  const Engine& engine_;
  std::string op_;
  Tensor word_, word_scale_, position_, type_, gamma_, beta_;
  size_t channels_ = 0;
  float inverse_, epsilon_;
};

Tensor required(const Node& node, size_t index, const char* name, ElementType type) {
  Tensor tensor = node.constant(index, name, type);
  if (!tensor) refuse(kInvalidGraph, node.place(name), "is missing or computed, expected an initializer");
  return tensor;
}

Embed::Embed(const Engine& engine, const Node& node, bool is_int8)
    : engine_(engine),
      op_(is_int8 ? "EmbedInt8" : "Embed"),
      word_(required(node, 3, "word", is_int8 ? kInt8 : kFloat)),
      inverse_(inverse_of(node.number("y_scale", 1.0f), node.place("y_scale"))),
      epsilon_(node.number("epsilon", 1e-12f)) {
  size_t next = 4;
  if (is_int8) word_scale_ = required(node, next++, "word_scale", kFloat);
  position_ = required(node, next++, "position", kFloat);
  type_ = node.constant(next++, "type", kFloat);
  gamma_ = required(node, next++, "gamma", kFloat);
  beta_ = required(node, next++, "beta", kFloat);
  if (word_.shape.size() != 2 || word_.size() == 0) {
    refuse(kInvalidGraph, word_.name, "has shape " + text(word_.shape) + ", expected [words,width]");
  }
  channels_ = static_cast<size_t>(word_.shape[1]);
  if (is_int8) require_shape(word_scale_, {word_.shape[0]}, kInvalidGraph);
  require_table(position_);
  if (type_) require_table(type_);
  require_shape(gamma_, {word_.shape[1]}, kInvalidGraph);
  require_shape(beta_, {word_.shape[1]}, kInvalidGraph);
  if (!(epsilon_ >= 0.0f) || !std::isfinite(epsilon_))
    refuse(kInvalidGraph, node.place("epsilon"), "is no small number");
}

void Embed::require_table(const Tensor& table) const {
  if (table.shape.size() == 2 && table.shape[1] == word_.shape[1] && table.shape[0] > 0) return;
  refuse(kInvalidGraph, table.name,
         "has shape " + text(table.shape) + ", expected [rows," + std::to_string(word_.shape[1]) + "]");
}

void require_below(const Tensor& numbers, int64_t rows) {
  for (size_t i = 0; i < numbers.size(); ++i) {
    int64_t number = numbers.as<int64_t>()[i];
    if (number >= 0 && number < rows) continue;
    refuse(kInvalidArgument, numbers.name,
           "has " + std::to_string(number) + ", expected 0 to " + std::to_string(rows - 1));
  }
}

void Embed::embed_token(const Numbers& numbers, size_t token, float* row, float* y, uint8_t* q) const {
  const size_t word = static_cast<size_t>(numbers.ids[token]);
  const size_t place = numbers.places ? static_cast<size_t>(numbers.places[token]) : token % numbers.tokens;
  const size_t type = numbers.types ? static_cast<size_t>(numbers.types[token]) : 0;
  EmbedRow from{};
  if (word_scale_) {
    from.word_int8 = word_.as<int8_t>() + word * channels_;
    from.word_scale = word_scale_.as<float>()[word];
  } else {
    from.word = word_.as<float>() + word * channels_;
  }
  from.position = position_.as<float>() + place * channels_;
  from.type = type_ ? type_.as<float>() + type * channels_ : nullptr;
  engine_.epilogues->embed_row(from, channels_, row);
  engine_.epilogues->finish_row(row,
                                {channels_, nullptr, gamma_.as<float>(), beta_.as<float>(), epsilon_, inverse_, y, q});
}

void Embed::compute(KernelContext* context) {
  Call call(context, op_);
  Tensor ids = call.input(0, "ids"), types = call.input(1, "types"), places = call.input(2, "places");
  if (ids.shape.size() != 2)
    refuse(kInvalidArgument, ids.name, "has shape " + text(ids.shape) + ", expected [texts,tokens]");
  require_below(ids, word_.shape[0]);
  if (types) require_shape(types, ids.shape, kInvalidArgument);
  if (types && !type_) refuse(kInvalidArgument, types.name, "are given, but there is no table of types");
  if (types) require_below(types, type_.shape[0]);
  if (places) {
    require_shape(places, ids.shape, kInvalidArgument);
    require_below(places, position_.shape[0]);
  } else if (ids.shape[1] > position_.shape[0]) {
    refuse(kInvalidArgument, ids.name,
           "has " + std::to_string(ids.shape[1]) + " tokens, but there are only " + std::to_string(position_.shape[0]) +
               " positions");
  }
  const Shape shape{ids.shape[0], ids.shape[1], word_.shape[1]};
  Tensor y = call.output(0, shape), q = call.output(1, shape);
  const size_t tokens = ids.size();
  if (tokens == 0 || (!y && !q)) return;

  const Numbers numbers{ids.as<int64_t>(), types.as<int64_t>(), places.as<int64_t>(),
                        static_cast<size_t>(ids.shape[1])};
  auto* y_rows = static_cast<float*>(y.data);
  auto* q_rows = static_cast<uint8_t*>(q.data);
  call.parallel((tokens + kTokens - 1) / kTokens, [&](size_t task) {
    static thread_local Scratch rows;
    float* row = rows.take<float>(channels_);
    for (size_t token = task * kTokens; token < std::min(tokens, (task + 1) * kTokens); ++token) {
      const size_t at = token * channels_;
      embed_token(numbers, token, row, y_rows ? y_rows + at : nullptr, q_rows ? q_rows + at : nullptr);
    }
  });
}

}  // namespace

std::unique_ptr<Kernel> make_embed(const Engine& engine, const KernelInfo* info) {
  return std::make_unique<Embed>(engine, Node(info, "Embed"), false);
}

std::unique_ptr<Kernel> make_embed_int8(const Engine& engine, const KernelInfo* info) {
  return std::make_unique<Embed>(engine, Node(info, "EmbedInt8"), true);
}

}  // namespace sqat
