// sqat.Attention: softmax(Q K^T) V of one head at a time, in int8.
//
// Keys and values of a head are laid out as dense weights, those with mask 0 left out: masked keys cost nothing, and a
// padded text gives the bits of an unpadded one. Queries of padding are left out too, and give 0; see rows.h. Both products are those of the engine's dense tiles; the scores of
// some rows of queries at a time stay in the second-level cache. One task is one head of one text.
#include <algorithm>
#include <cstring>

#include "blocks.h"
#include "operators.h"
#include "rows.h"

namespace sqat {
namespace {

constexpr size_t kQueries = 24;  // rows of scores at a time

typedef uint8_t Sixteen __attribute__((vector_size(16)));

inline Sixteen load(const uint8_t* from) {
  Sixteen out;
  std::memcpy(&out, from, sizeof out);
  return out;
}

// Four rows of 16 bytes to 16 columns of 4 bytes, from u8 with zero point 128 to int8.
inline void store_columns(const Sixteen (&rows)[4], int8_t* to) {
  const Sixteen low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  const Sixteen high = low + 8;
  typedef uint16_t Eight __attribute__((vector_size(16)));
  const Eight low2 = {0, 8, 1, 9, 2, 10, 3, 11}, high2 = low2 + 4;
  const Eight a = (Eight)__builtin_shuffle(rows[0], rows[1], low), b = (Eight)__builtin_shuffle(rows[2], rows[3], low);
  const Eight c = (Eight)__builtin_shuffle(rows[0], rows[1], high),
              d = (Eight)__builtin_shuffle(rows[2], rows[3], high);
  const Sixteen out[4] = {(Sixteen)__builtin_shuffle(a, b, low2) ^ 128, (Sixteen)__builtin_shuffle(a, b, high2) ^ 128,
                          (Sixteen)__builtin_shuffle(c, d, low2) ^ 128, (Sixteen)__builtin_shuffle(c, d, high2) ^ 128};
  std::memcpy(to, out, sizeof out);
}

// One head of one text.
struct Head {
  const uint8_t* q;  // first row of each, rows `stride` apart
  const uint8_t* k;
  const uint8_t* v;
  uint8_t* out;
  size_t stride, out_stride, width;
};

// Keys as weights [tiles of 16 keys][width/4][64].
void pack_keys(const Head& head, const std::vector<uint32_t>& kept, size_t padded, int8_t* to) {
  const size_t tile_bytes = padded / 4 * kTileBytes;
  std::memset(to, 0, round_up(kept.size(), kTile) / kTile * tile_bytes);
  for (size_t key = 0; key < kept.size(); ++key) {
    const uint8_t* from = head.k + kept[key] * head.stride;
    int8_t* tile = to + key / kTile * tile_bytes + key % kTile * 4;
    size_t at = 0;
    for (; at + 4 <= head.width; at += 4) {
      uint32_t four;
      std::memcpy(&four, from + at, 4);
      four ^= 0x80808080u;
      std::memcpy(tile + at / 4 * kTileBytes, &four, 4);
    }
    for (; at < head.width; ++at) tile[at / 4 * kTileBytes + at % 4] = static_cast<int8_t>(from[at] ^ 128);
  }
}

// Values as weights [tiles of 16 columns][keys/4][64].
void pack_values(const Head& head, const std::vector<uint32_t>& kept, size_t keys, int8_t* to) {
  for (size_t column = 0; column < head.width; column += kTile) {
    const size_t count = std::min(kTile, head.width - column);
    for (size_t key = 0; key < keys; key += 4, to += kTileBytes) {
      Sixteen rows[4];
      for (size_t j = 0; j < 4; ++j) {
        rows[j] = Sixteen{} + 128;
        if (key + j >= kept.size()) continue;
        const uint8_t* from = head.v + kept[key + j] * head.stride + column;
        if (count == kTile) {
          rows[j] = load(from);
        } else {
          std::memcpy(&rows[j], from, count);
        }
      }
      store_columns(rows, to);
    }
  }
}

// A product's right side: weights, prepared for many rows.
class Operand {
 public:
  // Room for `tiles` tiles of `padded` inputs; the caller fills it and calls `prepare`.
  int8_t* room(const Gemm& gemm, size_t tiles, size_t padded) {
    tiles_ = tiles;
    panel_bytes_ = padded * gemm.panel_bytes;
    weights_ = {values_.take<int8_t>(tiles * padded * kTile), nullptr, padded};
    return const_cast<int8_t*>(weights_.values);
  }

  // For rows whose zero is 128 (activations) or 0 (P).
  void prepare(const Gemm& gemm, int zero) {
    if (panel_bytes_) {
      panels_.take<uint8_t>(tiles_ * panel_bytes_);
      for (size_t tile = 0; tile < tiles_; ++tile) gemm.prepare_panel(weights_.from(tile), panel(tile));
    }
    int32_t* offsets = offsets_.take<int32_t>(tiles_ * kTile);
    if (gemm.set_offsets && zero != 0) {
      gemm.set_offsets(weights_, tiles_, offsets);
    } else {
      std::memset(offsets, 0, tiles_ * kTile * sizeof(int32_t));
    }
  }

  // out [count, tiles * 16] = rows times all tiles.
  void multiply(const Gemm& gemm, const uint8_t* rows, size_t count, int32_t* out) {
    const size_t row_stride = weights_.padded * gemm.row_bytes;
    const int32_t* offsets = offsets_.take<int32_t>(tiles_ * kTile);
    for (size_t tile = 0; tile < tiles_; tile += gemm.max_tiles) {
      const size_t tiles = std::min(gemm.max_tiles, tiles_ - tile);
      split_evenly(count, gemm.max_rows, [&](size_t row, size_t some) {
        gemm.multiply(rows + row * row_stride, row_stride, some, weights_.from(tile),
                      panel_bytes_ ? panel(tile) : nullptr, tiles, offsets + tile * kTile,
                      out + row * tiles_ * kTile + tile * kTile, tiles_ * kTile);
      });
    }
  }

 private:
  uint8_t* panel(size_t tile) { return panels_.take<uint8_t>(tiles_ * panel_bytes_) + tile * panel_bytes_; }

  Scratch values_, panels_, offsets_;
  Weights weights_{};
  size_t tiles_ = 0, panel_bytes_ = 0;
};

struct Workspace {
  Operand keys, values;
  Scratch queries, scores, p, prepared_p, products;
  std::vector<uint32_t> kept;
};

class Attention : public Kernel {
 public:
  Attention(const Engine& engine, const Node& node);
  void compute(KernelContext* context) override;

 private:
  void attend(const Head& head, const Rows& queries, Workspace& work) const;
  void attend_queries(const Head& head, size_t first, size_t count, Workspace& work) const;

  const Engine& engine_;
  size_t heads_;
  float score_scale_, value_scale_, inverse_;
};

Attention::Attention(const Engine& engine, const Node& node) : engine_(engine) {
  int64_t heads = node.integer("heads");
  if (heads < 1) refuse(kInvalidGraph, node.place("heads"), "is " + std::to_string(heads) + ", expected 1 or more");
  heads_ = static_cast<size_t>(heads);
  score_scale_ = node.number("score_scale", 0.0f);
  value_scale_ = node.number("value_scale", 0.0f);
  inverse_of(score_scale_, node.place("score_scale"));
  inverse_of(value_scale_, node.place("value_scale"));
  inverse_ = inverse_of(node.number("y_scale", 1.0f), node.place("y_scale"));
}

void Attention::attend(const Head& head, const Rows& queries, Workspace& work) const {
  const Gemm& gemm = *engine_.dense;
  const size_t padded = round_up(head.width, kInputStep), keys = round_up(work.kept.size(), kTile);
  pack_keys(head, work.kept, padded, work.keys.room(gemm, keys / kTile, padded));
  pack_values(head, work.kept, keys, work.values.room(gemm, padded / kTile, keys));
  work.keys.prepare(gemm, 128);
  work.values.prepare(gemm, 0);
  queries.each_run(0, queries.kept(), [&](size_t, size_t row, size_t count) {
    for (size_t done = 0; done < count; done += kQueries) {
      attend_queries(head, row + done, std::min(kQueries, count - done), work);
    }
  });
}

void Attention::attend_queries(const Head& head, size_t first, size_t count, Workspace& work) const {
  const Gemm& gemm = *engine_.dense;
  const size_t padded = round_up(head.width, kInputStep), keys = round_up(work.kept.size(), kTile);
  auto* queries = work.queries.take<uint8_t>(count * padded * gemm.row_bytes);
  auto* scores = work.scores.take<int32_t>(count * keys);
  auto* p = work.p.take<uint8_t>(count * keys);
  auto* prepared_p = work.prepared_p.take<uint8_t>(count * keys * gemm.row_bytes);
  auto* products = work.products.take<int32_t>(count * padded);
  int32_t sums[kQueries];

  gemm.prepare_rows(head.q + first * head.stride, head.stride, count, head.width, padded, 128, queries);
  work.keys.multiply(gemm, queries, count, scores);
  for (size_t row = 0; row < count; ++row) {
    sums[row] = engine_.epilogues->softmax(scores + row * keys, work.kept.size(), keys, score_scale_, p + row * keys);
  }
  gemm.prepare_rows(p, keys, count, keys, keys, 0, prepared_p);
  work.values.multiply(gemm, prepared_p, count, products);
  for (size_t row = 0; row < count; ++row) {
    uint8_t* out = head.out + (first + row) * head.out_stride;
    for (size_t column = 0; column < head.width; column += kTile) {
      engine_.epilogues->context(products + row * padded + column, sums[row], value_scale_, inverse_,
                                 std::min(kTile, head.width - column), out + column);
    }
  }
}

void Attention::compute(KernelContext* context) {
  Call call(context, "Attention");
  Tensor qkv = call.input(0, "QKV"), mask = call.input(1, "mask");
  const int64_t columns = qkv.shape.size() == 3 ? qkv.shape[2] : 0;
  if (columns == 0 || columns % 3 != 0 || columns / 3 % static_cast<int64_t>(heads_) != 0) {
    refuse(kInvalidArgument, qkv.name,
           "has shape " + text(qkv.shape) +
               ", expected [texts,tokens,3*width] with width a "
               "multiple of " +
               std::to_string(heads_) + " heads");
  }
  require_shape(mask, {qkv.shape[0], qkv.shape[1]}, kInvalidArgument);
  const auto texts = static_cast<size_t>(qkv.shape[0]), tokens = static_cast<size_t>(qkv.shape[1]);
  const size_t all = static_cast<size_t>(columns) / 3, width = all / heads_;
  if (tokens > kMostInputs || width > kMostInputs) {
    refuse(kInvalidArgument, qkv.name,
           "has shape " + text(qkv.shape) + ", expected up to " + std::to_string(kMostInputs) + " tokens and columns a head");
  }
  Tensor out = call.output(0, {qkv.shape[0], qkv.shape[1], static_cast<int64_t>(all)});
  if (texts * tokens == 0 || !out) return;

  call.parallel(texts * heads_, [&](size_t task) {
    static thread_local Workspace work;
    const size_t text = task / heads_, column = task % heads_ * width;
    const int64_t* is_token = mask.as<int64_t>() + text * tokens;
    const uint8_t* from = qkv.as<uint8_t>() + text * tokens * 3 * all + column;
    uint8_t* to = static_cast<uint8_t*>(out.data) + text * tokens * all + column;
    work.kept.clear();
    for (size_t token = 0; token < tokens; ++token) {
      if (is_token[token] != 0) work.kept.push_back(static_cast<uint32_t>(token));
    }
    auto clear = [&](size_t token, size_t count) {
      for (size_t end = token + count; token < end; ++token) std::memset(to + token * all, 128, width);
    };
    if (work.kept.empty()) return clear(0, tokens);
    const Rows queries(is_token, tokens, tokens);
    queries.each_gap(clear);
    attend({from, from + all, from + 2 * all, to, 3 * all, all, width}, queries, work);
  });
}

}  // namespace

std::unique_ptr<Kernel> make_attention(const Engine& engine, const KernelInfo* info) {
  return std::make_unique<Attention>(engine, Node(info, "Attention"));
}

}  // namespace sqat
