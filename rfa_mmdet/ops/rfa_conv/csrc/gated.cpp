// Inference with gates that depend on sums over all features, as of RFCBAMConv and RFCAConv.
//
// The features of the windows are made twice, tile by tile: for the sums, and, when the gates are
// known, for the convolution of the weighed features. That costs less than to write them all to
// memory, K times the input, and to read them again.

#include "kernels.h"

#include <limits>

#include "convolve.h"

namespace rfa {
namespace {

// Calls use(i, q, value) with act(feature patch + shift) of each position i of the windows, a vector
// of outputs from q on at a time.
template <typename T, int KK, bool relu, typename F>
RFA_INLINE inline void respond_fixed(const T* patch, int64_t pitch, int64_t vectors,
                                     const T* feature, const T* shift, F&& use) {
  for (int64_t q = 0; q < vectors * Vec<T>::size(); q += Vec<T>::size()) {
    Vec<T> p[KK];
    unroll<KK>([&](auto j) RFA_INLINE { p[j] = Vec<T>::loadu(patch + j * pitch + q); });
    unroll<KK>([&](auto i) RFA_INLINE {
      Vec<T> z(shift[i]);
      unroll<KK>([&](auto j) RFA_INLINE {
        z = at::vec::fmadd(Vec<T>(feature[i * KK + j]), p[j], z);
      });
      use(i, q, relu ? at::vec::clamp_min(z, Vec<T>(T(0))) : z);
    });
  }
}

template <typename T, typename F>
RFA_INLINE inline void respond(const T* patch, int64_t pitch, int64_t vectors,
                               const Response<T>& response, int64_t K, int64_t c, F&& use) {
  const T* const feature = response.feature + c * K * K;
  const T* const shift = response.shift + c * K;
  if (K == 9) {
    if (response.relu) {
      respond_fixed<T, 9, true>(patch, pitch, vectors, feature, shift, use);
    } else {
      respond_fixed<T, 9, false>(patch, pitch, vectors, feature, shift, use);
    }
    return;
  }
  for (int64_t q = 0; q < vectors * Vec<T>::size(); q += Vec<T>::size()) {
    for (int64_t i = 0; i < K; ++i) {
      Vec<T> z(shift[i]);
      for (int64_t j = 0; j < K; ++j) {
        const Vec<T> p = Vec<T>::loadu(patch + j * pitch + q);
        z = at::vec::fmadd(Vec<T>(feature[i * K + j]), p, z);
      }
      use(i, q, response.relu ? at::vec::clamp_min(z, Vec<T>(T(0))) : z);
    }
  }
}

template <typename T>
T sum_of(const T* values, int64_t n) {
  Vec<T> sum(T(0));
  int64_t q = 0;
  for (; q + Vec<T>::size() <= n; q += Vec<T>::size()) {
    sum = sum + Vec<T>::loadu(values + q);
  }
  T total = horizontal_sum<T>(sum);
  for (; q < n; ++q) {
    total += values[q];
  }
  return total;
}

// A gate of each channel times one of each position of each window.
template <typename T>
class ByChannelAndPosition {
 public:
  ByChannelAndPosition(const Geometry& g, const Response<T>& response, const T* channel,
                       const T* position, int64_t positions)
      : g(g), response(response), channel(channel), position(position), pitch(positions),
        gates(g.K() * positions) {}
  void enter(int64_t b, const Tile& tile) {
    of_channel = channel + b * g.C;
    const int64_t area = g.h * g.w;
    for (int64_t i = 0; i < g.K(); ++i) {
      const T* from = position + (b * g.K() + i) * area + tile.start(g);
      std::copy(from, from + tile.positions(), gates.get() + i * pitch);
    }
  }
  void enter_channel(int64_t c) {
    this->c = c;
  }
  void write(const T* patch, int64_t patch_pitch, int64_t start, int64_t vectors, T* out,
             int64_t out_pitch) {
    const Vec<T> all(of_channel[c]);
    const T* const from = gates.get() + start;
    respond(patch, patch_pitch, vectors, response, g.K(), c,
            [&](auto i, int64_t q, const Vec<T>& z) RFA_INLINE {
              (z * all * Vec<T>::loadu(from + i * pitch + q)).store(out + i * out_pitch + q);
            });
  }

 private:
  const Geometry& g;
  const Response<T>& response;
  const T *channel, *position, *of_channel = nullptr;
  const int64_t pitch;
  Buffer<T> gates;
  int64_t c = 0;
};

// For each channel, a gate of each row of the windows laid side by side times one of each column.
template <typename T>
class ByRowAndColumn {
 public:
  ByRowAndColumn(const Geometry& g, const Response<T>& response, const T* row, const T* column,
                 int64_t positions)
      : g(g), response(response), row(row), column(column), pitch(positions),
        rows(g.kh * positions), columns(g.kw * positions) {}
  void enter(int64_t b, const Tile& tile) {
    this->b = b;
    this->tile = tile;
  }
  void enter_channel(int64_t c) {
    this->c = c;
    for (int64_t i = 0; i < g.kh; ++i) {
      const T* from = row + ((b * g.C + c) * g.kh + i) * g.h + tile.row;
      T* to = rows.get() + i * pitch;
      for (int64_t r = 0; r < tile.rows; ++r, to += tile.columns) {
        std::fill(to, to + tile.columns, from[r]);
      }
    }
    for (int64_t j = 0; j < g.kw; ++j) {
      const T* from = column + ((b * g.C + c) * g.kw + j) * g.w + tile.column;
      T* to = columns.get() + j * pitch;
      for (int64_t r = 0; r < tile.rows; ++r, to += tile.columns) {
        std::copy(from, from + tile.columns, to);
      }
    }
  }
  void write(const T* patch, int64_t patch_pitch, int64_t start, int64_t vectors, T* out,
             int64_t out_pitch) {
    const T *const r = rows.get() + start, *const s = columns.get() + start;
    respond(patch, patch_pitch, vectors, response, g.K(), c,
            [&](auto i, int64_t q, const Vec<T>& z) RFA_INLINE {
              const Vec<T> gate = Vec<T>::loadu(r + i / g.kw * pitch + q) *
                  Vec<T>::loadu(s + i % g.kw * pitch + q);
              (z * gate).store(out + i * out_pitch + q);
            });
  }

 private:
  const Geometry& g;
  const Response<T>& response;
  const T *row, *column;
  const int64_t pitch;
  Buffer<T> rows, columns;
  Tile tile{};
  int64_t b = 0, c = 0;
};

} // namespace

template <typename E>
void pool_channels(const Geometry& g, const Response<Compute<E>>& response, const E* x,
                   Compute<E>* pooled) {
  using T = Compute<E>;
  const int64_t K = g.K(), area = g.h * g.w;
  const int64_t threads = at::get_num_threads();
  const auto tiles = split_map(g, 640, std::max<int64_t>(1, ceil_div(threads, g.B)));
  const int64_t count = tiles.size(), pitch = largest_tile<T>(tiles);
  at::parallel_for(0, g.B * count, 1, [&](int64_t begin, int64_t end) {
    Windows<E> windows(g, tiles);
    Buffer<T> most(K * pitch), sum(K * pitch);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / count;
      const Tile& tile = tiles[task % count];
      std::fill(most.get(), most.get() + K * pitch, -std::numeric_limits<T>::infinity());
      std::fill(sum.get(), sum.get() + K * pitch, T(0));
      for (int64_t c = 0; c < g.C; ++c) {
        windows.load(tile, x + (b * g.C + c) * g.H * g.W);
        respond(windows.patches(), windows.pitch(), ceil_div(tile.positions(), Vec<T>::size()),
                response, K, c, [&](auto i, int64_t q, const Vec<T>& z) RFA_INLINE {
                  T *const m = most.get() + i * pitch + q, *const s = sum.get() + i * pitch + q;
                  at::vec::maximum(Vec<T>::loadu(m), z).store(m); // lets NaN through
                  (Vec<T>::loadu(s) + z).store(s);
                });
      }
      T* const to = pooled + b * 2 * K * area + tile.start(g);
      for (int64_t i = 0; i < K; ++i) {
        const T *m = most.get() + i * pitch, *s = sum.get() + i * pitch;
        for (int64_t q = 0; q < tile.positions(); ++q) {
          to[i * area + q] = m[q];
          to[(K + i) * area + q] = s[q] / static_cast<T>(g.C);
        }
      }
    }
  });
}

template <typename E>
void pool_coordinates(const Geometry& g, const Response<Compute<E>>& response, const E* x,
                      Compute<E>* rows, Compute<E>* columns) {
  using T = Compute<E>;
  const int64_t K = g.K();
  const auto tiles = split_map(g, 640, 1);
  const int64_t pitch = largest_tile<T>(tiles);
  at::parallel_for(0, g.B * g.C, 1, [&](int64_t begin, int64_t end) {
    Windows<E> windows(g, tiles);
    Buffer<T> values(K * pitch);
    for (int64_t plane = begin; plane < end; ++plane) {
      T *const row = rows + plane * g.kh * g.h, *const column = columns + plane * g.kw * g.w;
      std::fill(row, row + g.kh * g.h, T(0));
      std::fill(column, column + g.kw * g.w, T(0));
      for (const auto& tile : tiles) {
        windows.load(tile, x + plane * g.H * g.W);
        respond(windows.patches(), windows.pitch(), ceil_div(tile.positions(), Vec<T>::size()),
                response, K, plane % g.C, [&](auto i, int64_t q, const Vec<T>& z) RFA_INLINE {
                  z.store(values.get() + i * pitch + q);
                });
        for (int64_t i = 0; i < K; ++i) {
          T* const to = column + i % g.kw * g.w + tile.column;
          for (int64_t r = 0; r < tile.rows; ++r) {
            const T* from = values.get() + i * pitch + r * tile.columns;
            row[i / g.kw * g.h + tile.row + r] += sum_of(from, tile.columns);
            for (int64_t q = 0; q < tile.columns; ++q) {
              to[q] += from[q];
            }
          }
        }
      }
      for (int64_t r = 0; r < g.kh * g.h; ++r) {
        row[r] /= static_cast<T>(g.kw * g.w);
      }
      for (int64_t q = 0; q < g.kw * g.w; ++q) {
        column[q] /= static_cast<T>(g.kh * g.h);
      }
    }
  });
}

template <typename E>
void forward_gated(const Geometry& g, const Response<Compute<E>>& response,
                   const Gates<Compute<E>>& gates, const E* x, const E* weight, const E* bias,
                   E* y) {
  using T = Compute<E>;
  if (gates.of_coordinates) {
    convolve(g, x, weight, bias, y, [&](int64_t positions) {
      return ByRowAndColumn<T>(g, response, gates.first, gates.second, positions);
    });
  } else {
    convolve(g, x, weight, bias, y, [&](int64_t positions) {
      return ByChannelAndPosition<T>(g, response, gates.first, gates.second, positions);
    });
  }
}

#define RFA_INSTANTIATE(E)                                                                       \
  template void pool_channels<E>(                                                                \
      const Geometry&, const Response<Compute<E>>&, const E*, Compute<E>*);                      \
  template void pool_coordinates<E>(                                                             \
      const Geometry&, const Response<Compute<E>>&, const E*, Compute<E>*, Compute<E>*);         \
  template void forward_gated<E>(const Geometry&, const Response<Compute<E>>&,                   \
                                 const Gates<Compute<E>>&, const E*, const E*, const E*, E*);

RFA_INSTANTIATE(float)
RFA_INSTANTIATE(double)
RFA_INSTANTIATE(c10::BFloat16)

} // namespace rfa
