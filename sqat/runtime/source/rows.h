// The rows of a batch that are computed: those of tokens, and the first of every text, which heads read. Rows of padding
// are left out, so that a batch of mixed lengths costs what its tokens cost. The kept rows are numbered from 0 on.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace sqat {

class Rows {
 public:
  explicit Rows(size_t all) : runs_{{0, 0, all}}, all_(all) {}  // without padding

  Rows(const int64_t* mask, size_t all, size_t tokens) : all_(all) {
    size_t first = 0;  // of the row's text
    for (size_t row = 0, kept = 0; row < all; ++row) {
      if (row - first == tokens) first = row;
      if (mask[row] == 0 && row != first) continue;
      if (runs_.empty() || runs_.back().row + runs_.back().count != row) runs_.push_back({kept, row, 0});
      ++runs_.back().count;
      ++kept;
    }
  }

  size_t kept() const { return runs_.empty() ? 0 : runs_.back().at + runs_.back().count; }

  // part(at, row, count) for kept rows [first, end), neighbours together: those numbered from `at` on lie from `row` on.
  template <typename Part>
  void each_run(size_t first, size_t end, const Part& part) const {
    auto run = std::upper_bound(runs_.begin(), runs_.end(), first,
                                [](size_t number, const Run& each) { return number < each.at + each.count; });
    for (; run != runs_.end() && run->at < end; ++run) {
      const size_t at = std::max(first, run->at), stop = std::min(end, run->at + run->count);
      part(at, run->row + at - run->at, stop - at);
    }
  }

  // part(row, count) for the rows of padding, neighbours together.
  template <typename Part>
  void each_gap(const Part& part) const {
    size_t row = 0;
    for (const Run& run : runs_) {
      if (run.row > row) part(row, run.row - row);
      row = run.row + run.count;
    }
    if (row < all_) part(row, all_ - row);
  }

 private:
  struct Run {
    size_t at, row, count;  // number of the first, where it lies, how many
  };

  std::vector<Run> runs_;
  size_t all_;
};

}  // namespace sqat
