// Tiles of output positions, and copies between maps and the windows of a tile.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "vectors.h"

namespace rfa {
namespace {

// Consecutive positions: whole rows of one map, or part of one row.
struct Tile {
  int64_t row, rows, column, columns;
  int64_t positions() const {
    return rows * columns;
  }
  int64_t start(const Geometry& g) const {
    return row * g.w + column;
  }
};

// Positions per tile, such that its windows and what is computed from them fit in the L1 cache.
template <typename T>
int64_t tile_positions(const Geometry& g) {
  constexpr int64_t bytes = 32 << 10;
  return std::clamp<int64_t>(bytes / (g.K() * static_cast<int64_t>(sizeof(T))), 96, 640);
}

// Splits a map into tiles of at most about `wanted` positions, at least `least` tiles if possible.
inline std::vector<Tile> split_map(const Geometry& g, int64_t wanted, int64_t least) {
  wanted = std::max<int64_t>(1, std::min(wanted, ceil_div(g.h * g.w, least)));
  std::vector<Tile> tiles;
  if (g.w <= wanted + wanted / 2) {
    const int64_t rows = std::max<int64_t>(1, wanted / g.w);
    const int64_t count = ceil_div(g.h, rows), even = ceil_div(g.h, count);
    for (int64_t row = 0; row < g.h; row += even) {
      tiles.push_back({row, std::min(even, g.h - row), 0, g.w});
    }
  } else {
    const int64_t even = ceil_div(g.w, ceil_div(g.w, wanted));
    for (int64_t row = 0; row < g.h; ++row) {
      for (int64_t column = 0; column < g.w; column += even) {
        tiles.push_back({row, 1, column, std::min(even, g.w - column)});
      }
    }
  }
  return tiles;
}

template <typename T>
int64_t largest_tile(const std::vector<Tile>& tiles) {
  int64_t most = 1;
  for (const auto& tile : tiles) {
    most = std::max(most, tile.positions());
  }
  return round_up<T>(most);
}

// Copies one channel's windows of one tile between a map and (K, positions).
//
// The copy goes through a buffer with the input rows that the tile sees, padded, and split by
// column modulo the stride. Position j of all windows is then one run of the buffer for any stride,
// padding and dilation, and no inner loop has a branch.
template <typename E>
class Windows {
 public:
  using T = Compute<E>;

  Windows(const Geometry& geometry, const std::vector<Tile>& tiles)
      : g(geometry), pitch_(largest_tile<T>(tiles)), patches_(g.K() * pitch_) {
    int64_t rows = 1, columns = 1;
    for (const auto& tile : tiles) {
      rows = std::max(rows, input_rows(tile));
      columns = std::max(columns, run_length(tile));
    }
    run_ = round_up<T>(columns) + Vec<T>::size();
    rows_.reset(new Buffer<T>(rows * g.sw * run_));
  }

  T* patches() const {
    return patches_.get();
  }
  // Stride between the positions of a window in patches(), in whole vectors.
  int64_t pitch() const {
    return pitch_;
  }

  // Fills patches() from a channel's plane of x, with zeros up to whole vectors.
  void load(const Tile& tile, const E* plane) {
    for_runs(tile, [&](T* run, int64_t length, int64_t y, int64_t x, int64_t begin, int64_t end) {
      if (y < 0 || y >= g.H) {
        std::fill(run, run + length, T(0));
        return;
      }
      std::fill(run, run + begin, T(0));
      copy_run(plane + y * g.W + x, run, begin, end);
      std::fill(run + end, run + length, T(0));
    });
    T* out = patches_.get();
    const int64_t step = run_step(tile);
    for (int64_t ki = 0; ki < g.kh; ++ki) {
      for (int64_t kj = 0; kj < g.kw; ++kj, out += pitch_) {
        const T* from = first_run(tile, ki, kj);
        T* to = out;
        for (int64_t r = 0; r < tile.rows; ++r, from += step, to += tile.columns) {
          // The next row overwrites the overrun, or it is zeroed below.
          for (int64_t q = 0; q < tile.columns; q += Vec<T>::size()) {
            Vec<T>::loadu(from + q).store(to + q);
          }
        }
      }
    }
    const int64_t n = tile.positions(), padded = round_up<T>(n);
    for (int64_t k = 0; k < g.K(); ++k) {
      std::fill(patches_.get() + k * pitch_ + n, patches_.get() + k * pitch_ + padded, T(0));
    }
  }

  // Adds (K, positions), with stride pitch(), to a channel's plane: the transpose of load.
  void add(const Tile& tile, const T* values, T* plane) {
    std::fill(rows_->get(), rows_->get() + input_rows(tile) * g.sw * run_, T(0));
    const int64_t step = run_step(tile), whole = tile.columns - tile.columns % Vec<T>::size();
    alignas(64) T lanes[Vec<T>::size()] = {}; // mask of the last columns
    std::memset(lanes, -1, (tile.columns - whole) * sizeof(T));
    const Vec<T> zero(T(0)), rest = Vec<T>::loadu(lanes);
    for (int64_t ki = 0; ki < g.kh; ++ki) {
      for (int64_t kj = 0; kj < g.kw; ++kj, values += pitch_) {
        T* to = first_run(tile, ki, kj);
        const T* from = values;
        for (int64_t r = 0; r < tile.rows; ++r, to += step, from += tile.columns) {
          for (int64_t q = 0; q < whole; q += Vec<T>::size()) {
            (Vec<T>::loadu(to + q) + Vec<T>::loadu(from + q)).store(to + q);
          }
          if (whole < tile.columns) {
            const Vec<T> last = Vec<T>::blendv(zero, Vec<T>::loadu(from + whole), rest);
            (Vec<T>::loadu(to + whole) + last).store(to + whole);
          }
        }
      }
    }
    for_runs(tile, [&](const T* run, int64_t, int64_t y, int64_t x, int64_t begin, int64_t end) {
      if (y >= 0 && y < g.H) {
        add_run(run, plane + y * g.W + x, begin, end);
      }
    });
  }

 private:
  // The buffer holds all input rows that the tile spans, or, if fewer, only those it sees.
  bool spans(const Tile& tile) const {
    return span(tile) <= tile.rows * g.kh;
  }
  int64_t span(const Tile& tile) const {
    return (tile.rows - 1) * g.sh + (g.kh - 1) * g.dh + 1;
  }
  int64_t input_rows(const Tile& tile) const {
    return std::min(span(tile), tile.rows * g.kh);
  }
  int64_t input_y(const Tile& tile, int64_t i) const {
    const int64_t top = tile.row * g.sh - g.ph;
    return spans(tile) ? top + i : top + i / g.kh * g.sh + i % g.kh * g.dh;
  }
  // Length of a run: every sw-th column, up to the last one that a window sees.
  int64_t run_length(const Tile& tile) const {
    return tile.columns + (g.kw - 1) * g.dw / g.sw;
  }
  // Run of position (ki, kj) for the tile's first row; run_step leads to the next row.
  T* first_run(const Tile& tile, int64_t ki, int64_t kj) const {
    const int64_t i = spans(tile) ? ki * g.dh : ki, shift = kj * g.dw;
    return rows_->get() + (i * g.sw + shift % g.sw) * run_ + shift / g.sw;
  }
  int64_t run_step(const Tile& tile) const {
    return (spans(tile) ? g.sh : g.kh) * g.sw * run_;
  }

  // Calls f(run, length, y, x, begin, end) for each run of the buffer. Its value m is column
  // x + m * sw of row y; values [begin, end) are inside the map if row y is.
  template <typename F>
  RFA_INLINE inline void for_runs(const Tile& tile, F&& f) const {
    const int64_t length = run_length(tile), rows = input_rows(tile);
    for (int64_t i = 0; i < g.sw; ++i) {
      const int64_t x = tile.column * g.sw - g.pw + i;
      const int64_t begin = x >= 0 ? 0 : std::min(length, ceil_div(-x, g.sw));
      const int64_t end =
          x >= g.W ? begin : std::max(begin, std::min(length, ceil_div(g.W - x, g.sw)));
      for (int64_t row = 0; row < rows; ++row) {
        f(rows_->get() + (row * g.sw + i) * run_, length, input_y(tile, row), x, begin, end);
      }
    }
  }

  void copy_run(const E* from, T* run, int64_t begin, int64_t end) const {
    if (g.sw == 1) {
      for (int64_t m = begin; m < end; ++m) {
        run[m] = static_cast<T>(from[m]);
      }
    } else if (g.sw == 2) {
      for (int64_t m = begin; m < end; ++m) {
        run[m] = static_cast<T>(from[2 * m]);
      }
    } else {
      for (int64_t m = begin; m < end; ++m) {
        run[m] = static_cast<T>(from[g.sw * m]);
      }
    }
  }

  void add_run(const T* run, T* to, int64_t begin, int64_t end) const {
    if (g.sw == 1) {
      for (int64_t m = begin; m < end; ++m) {
        to[m] += run[m];
      }
    } else {
      for (int64_t m = begin; m < end; ++m) {
        to[g.sw * m] += run[m];
      }
    }
  }

  const Geometry g;
  const int64_t pitch_;
  Buffer<T> patches_;
  int64_t run_ = 0;
  std::unique_ptr<Buffer<T>> rows_;
};

} // namespace
} // namespace rfa
