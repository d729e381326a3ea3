// Tiles of output positions, the windows that they see, and the way back.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "vectors.h"

namespace rfa {
namespace {

// Whole rows of one map, or a part of one row: in either case consecutive positions.
struct Tile {
  int64_t row, rows, column, columns;
  int64_t positions() const {
    return rows * columns;
  }
  int64_t start(const Geometry& g) const {
    return row * g.w + column;
  }
};

// Split a map into tiles of at most about `wanted` positions, and at least `least` tiles if it can.
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

// Moves one channel's windows of one tile between a map and (K, positions).
//
// Between the two stands a buffer with the input rows that the tile sees, padded, and split by the
// column's remainder modulo the stride: position j of a window is then one run of it, whatever the
// stride, the padding and the dilation, and no inner loop has a branch.
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
  // Distance of two positions of a window in patches(): whole vectors.
  int64_t pitch() const {
    return pitch_;
  }

  // Fill patches() from a channel's plane of x; zero past the tile's positions up to whole vectors.
  void load(const Tile& tile, const E* plane) {
    const int64_t first = tile.column * g.sw - g.pw; // input column of run 0's first value
    for (int64_t i = 0; i < input_rows(tile); ++i) {
      T* row = rows_->get() + i * g.sw * run_;
      const int64_t y = input_y(tile, i);
      if (y < 0 || y >= g.H) {
        std::fill(row, row + g.sw * run_, T(0));
      } else {
        load_row(row, plane + y * g.W, first, run_length(tile));
      }
    }
    T* out = patches_.get();
    for (int64_t ki = 0; ki < g.kh; ++ki) {
      for (int64_t kj = 0; kj < g.kw; ++kj, out += pitch_) {
        for (int64_t r = 0; r < tile.rows; ++r) {
          const T* from = run(tile, r, ki, kj);
          T* to = out + r * tile.columns;
          // What runs over is overwritten by the next row, or zeroed below.
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

  // Add (K, positions), with the distance pitch(), to a channel's plane: the transpose of load.
  void add(const Tile& tile, const T* values, T* plane) {
    const int64_t rows = input_rows(tile), length = run_length(tile);
    std::fill(rows_->get(), rows_->get() + rows * g.sw * run_, T(0));
    for (int64_t ki = 0; ki < g.kh; ++ki) {
      for (int64_t kj = 0; kj < g.kw; ++kj, values += pitch_) {
        for (int64_t r = 0; r < tile.rows; ++r) {
          T* to = run(tile, r, ki, kj);
          const T* from = values + r * tile.columns;
          int64_t q = 0;
          for (; q + Vec<T>::size() <= tile.columns; q += Vec<T>::size()) {
            (Vec<T>::loadu(to + q) + Vec<T>::loadu(from + q)).store(to + q);
          }
          for (; q < tile.columns; ++q) {
            to[q] += from[q];
          }
        }
      }
    }
    const int64_t first = tile.column * g.sw - g.pw;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t y = input_y(tile, i);
      if (y >= 0 && y < g.H) {
        add_row(rows_->get() + i * g.sw * run_, plane + y * g.W, first, length);
      }
    }
  }

 private:
  // Input rows in the buffer: all that the tile spans, or only those it sees where that is less.
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
  // Length of a run: every sw-th column, as far as the last position of a window sees.
  int64_t run_length(const Tile& tile) const {
    return tile.columns + (g.kw - 1) * g.dw / g.sw;
  }
  T* run(const Tile& tile, int64_t r, int64_t ki, int64_t kj) const {
    const int64_t i = spans(tile) ? r * g.sh + ki * g.dh : r * g.kh + ki;
    const int64_t shift = kj * g.dw;
    return rows_->get() + (i * g.sw + shift % g.sw) * run_ + shift / g.sw;
  }

  // Of run f, value m is column first + f + m * sw; [begin, end) of them lie in the map.
  void inside(int64_t first, int64_t length, int64_t& begin, int64_t& end) const {
    begin = first >= 0 ? 0 : std::min(length, ceil_div(-first, g.sw));
    end = first >= g.W ? begin : std::max(begin, std::min(length, ceil_div(g.W - first, g.sw)));
  }

  void load_row(T* row, const E* from, int64_t first, int64_t length) const {
    for (int64_t f = 0; f < g.sw; ++f, ++first, row += run_) {
      int64_t begin, end;
      inside(first, length, begin, end);
      std::fill(row, row + begin, T(0));
      const E* x = from + first;
      if (g.sw == 1) {
        for (int64_t m = begin; m < end; ++m) {
          row[m] = static_cast<T>(x[m]);
        }
      } else if (g.sw == 2) {
        for (int64_t m = begin; m < end; ++m) {
          row[m] = static_cast<T>(x[2 * m]);
        }
      } else {
        for (int64_t m = begin; m < end; ++m) {
          row[m] = static_cast<T>(x[g.sw * m]);
        }
      }
      std::fill(row + end, row + length, T(0));
    }
  }

  void add_row(const T* row, T* to, int64_t first, int64_t length) const {
    for (int64_t f = 0; f < g.sw; ++f, ++first, row += run_) {
      int64_t begin, end;
      inside(first, length, begin, end);
      T* x = to + first;
      if (g.sw == 1) {
        for (int64_t m = begin; m < end; ++m) {
          x[m] += row[m];
        }
      } else {
        for (int64_t m = begin; m < end; ++m) {
          x[g.sw * m] += row[m];
        }
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
