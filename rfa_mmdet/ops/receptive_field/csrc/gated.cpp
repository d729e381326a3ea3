// Kernels of RFCBAMConv and RFCAConv, whose gates depend on sums over all features.
//
// Features are recomputed tile by tile for each use: for the sums, for the convolution of weighted
// features once the gates are known, and for the gradients of both. That takes less time than
// writing K times the input to memory and reading it.

#include "kernels.h"

#include <limits>
#include <vector>

#include "convolve.h"
#include "convolve_backward.h"
#include "products.h"

namespace rfa {
namespace {

// Calls use(i, q, value) with act(feature patch + shift) for each position i of the windows and
// each vector of outputs, starting at q.
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
  // One panel of a few positions and a few vectors at a time.
  constexpr int64_t size = Vec<T>::size();
  alignas(64) T panel[kRows * kVectors * size];
  const int64_t rows = ceil_div(K, ceil_div(K, kRows));
  for (int64_t v = 0; v < vectors; v += kVectors) {
    const int64_t width = std::min<int64_t>(kVectors, vectors - v);
    for (int64_t first = 0; first < K; first += rows) {
      const int64_t count = std::min(rows, K - first);
      row_block<T, kRows>(width, count, K, feature + first * K, K, 1, patch + v * size, pitch,
                          panel, width * size, width * size, false, shift + first);
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t q = 0; q < width; ++q) {
          const Vec<T> z = Vec<T>::loadu(panel + (i * width + q) * size);
          use(first + i, (v + q) * size, response.relu ? at::vec::clamp_min(z, Vec<T>(T(0))) : z);
        }
      }
    }
  }
}

// Returns the gradient before the activation, given that of a feature with this `value`.
template <typename T>
RFA_INLINE inline Vec<T> through_act(const Response<T>& response, const Vec<T>& grad,
                                     const Vec<T>& value) {
  const Vec<T> zero(T(0));
  return response.relu ? Vec<T>::blendv(zero, grad, value > zero) : grad;
}

template <typename T>
void add_sums(const T* grad, int64_t pitch, int64_t n, int64_t K, double* sums) {
  for (int64_t i = 0; i < K; ++i) {
    sums[i] += sum_of(grad + i * pitch, n);
  }
}

// Row and column values of windows laid out side by side, spread to every position of a tile.
template <typename T>
struct Coordinates {
  const Geometry& g;
  const int64_t pitch;
  Buffer<T> rows, columns; // (kh, positions), (kw, positions)
  std::vector<std::pair<const T*, const T*>> of; // row and column of each position of a window

  Coordinates(const Geometry& g, int64_t positions)
      : g(g), pitch(positions), rows(g.kh * positions), columns(g.kw * positions) {
    for (int64_t i = 0; i < g.K(); ++i) {
      of.emplace_back(rows.get() + i / g.kw * pitch, columns.get() + i % g.kw * pitch);
    }
  }
  // row (B * C, kh, h), column (B * C, kw, w)
  void spread(const Tile& tile, int64_t plane, const T* row, const T* column) {
    for (int64_t i = 0; i < g.kh; ++i) {
      const T* from = row + (plane * g.kh + i) * g.h + tile.row;
      T* to = rows.get() + i * pitch;
      for (int64_t r = 0; r < tile.rows; ++r, to += tile.columns) {
        std::fill(to, to + tile.columns, from[r]);
      }
    }
    for (int64_t j = 0; j < g.kw; ++j) {
      const T* from = column + (plane * g.kw + j) * g.w + tile.column;
      T* to = columns.get() + j * pitch;
      for (int64_t r = 0; r < tile.rows; ++r, to += tile.columns) {
        std::copy(from, from + tile.columns, to);
      }
    }
  }
  const T* row(int64_t i) const {
    return of[i].first;
  }
  const T* column(int64_t i) const {
    return of[i].second;
  }
};

// Gradients of the two gates. `partial` holds those of position gates, (slots, B, K, h, w).
template <typename T>
struct GateGradients {
  T* first = nullptr;
  T* second = nullptr;
  T* partial = nullptr;
};

// Common base of both kinds of gates; a source for convolve.h and convolve_backward.h.
template <typename T>
class Gated {
 public:
  Gated(const Geometry& g, const Response<T>& response, const Gates<T>& gates,
        const GateGradients<T>& grads, int64_t positions)
      : g(g), response(response), gates(gates), grads(grads), pitch(positions),
        weighted(grads.first ? g.K() * positions : 0) {}
  void enter_slot(int64_t slot) {
    this->slot = slot;
  }
  const T* feature() const {
    return response.feature + c * g.K() * g.K();
  }
  const T* constant() const {
    return nullptr;
  }
  void leave(int64_t) {}

 protected:
  // `gate_of(i, q)` returns the product of both gates. `weighted` receives dU times the features.
  template <typename F>
  RFA_INLINE inline void differentiate(const T* patch, int64_t patch_pitch, int64_t vectors, T* u,
                                       T* grad, int64_t grad_pitch, double* shift, F&& gate_of) {
    T* const to = weighted.get();
    respond(patch, patch_pitch, vectors, response, g.K(), c,
            [&](auto i, int64_t q, const Vec<T>& z) RFA_INLINE {
              const Vec<T> gate = gate_of(i, q);
              T* const at = grad + i * grad_pitch + q;
              const Vec<T> du = Vec<T>::loadu(at);
              (z * gate).store(u + i * grad_pitch + q);
              (z * du).store(to + i * pitch + q);
              through_act(response, du * gate, z).store(at);
            });
    add_sums(grad, grad_pitch, tile.positions(), g.K(), shift);
  }

  const Geometry& g;
  const Response<T>& response;
  const Gates<T> gates;
  const GateGradients<T> grads;
  const int64_t pitch;
  Buffer<T> weighted;
  Tile tile{};
  int64_t b = 0, c = 0, slot = 0;
};

// Channel gates, (B, C), times position gates, (B, K, h, w).
template <typename T>
class ByChannelAndPosition : public Gated<T> {
 public:
  ByChannelAndPosition(const Geometry& g, const Response<T>& response, const Gates<T>& gates,
                       const GateGradients<T>& grads, int64_t positions)
      : Gated<T>(g, response, gates, grads, positions), of_positions(g.K() * positions) {}
  void enter(int64_t b, const Tile& tile) {
    this->b = b;
    this->tile = tile;
    for (int64_t i = 0; i < g.K(); ++i) {
      const T* from = gates.second + (b * g.K() + i) * g.h * g.w + tile.start(g);
      std::copy(from, from + tile.positions(), of_positions.get() + i * pitch);
    }
  }
  void enter_channel(int64_t c) {
    this->c = c;
    of_channel = gates.first[b * g.C + c];
  }
  void write(const T* patch, int64_t patch_pitch, int64_t start, int64_t vectors, T* out,
             int64_t out_pitch) {
    const Vec<T> all(of_channel);
    const T* const from = of_positions.get() + start;
    respond(patch, patch_pitch, vectors, response, g.K(), c,
            [&](auto i, int64_t q, const Vec<T>& z) RFA_INLINE {
              (z * all * Vec<T>::loadu(from + i * pitch + q)).store(out + i * out_pitch + q);
            });
  }
  void backward(const T* patch, int64_t patch_pitch, int64_t vectors, T* u, T* grad,
                int64_t grad_pitch, double* shift) {
    const Vec<T> all(of_channel);
    const T* const from = of_positions.get();
    this->differentiate(patch, patch_pitch, vectors, u, grad, grad_pitch, shift,
                        [&](auto i, int64_t q) RFA_INLINE {
                          return all * Vec<T>::loadu(from + i * pitch + q);
                        });
    const int64_t n = tile.positions(), area = g.h * g.w;
    T* const to = grads.partial + (slot * g.B + b) * g.K() * area + tile.start(g);
    T sum(0);
    for (int64_t i = 0; i < g.K(); ++i) {
      const T* const w = weighted.get() + i * pitch;
      sum += dot(w, from + i * pitch, n);
      for (int64_t q = 0; q < n; ++q) {
        to[i * area + q] += of_channel * w[q];
      }
    }
    grads.first[b * g.C + c] += sum;
  }

 private:
  using Gated<T>::g;
  using Gated<T>::response;
  using Gated<T>::gates;
  using Gated<T>::grads;
  using Gated<T>::pitch;
  using Gated<T>::weighted;
  using Gated<T>::tile;
  using Gated<T>::b;
  using Gated<T>::c;
  using Gated<T>::slot;
  Buffer<T> of_positions;
  T of_channel = 0;
};

// Row gates, (B, C, kh, h), times column gates, (B, C, kw, w), of windows laid out side by side.
template <typename T>
class ByRowAndColumn : public Gated<T> {
 public:
  ByRowAndColumn(const Geometry& g, const Response<T>& response, const Gates<T>& gates,
                 const GateGradients<T>& grads, int64_t positions)
      : Gated<T>(g, response, gates, grads, positions), values(g, positions) {}
  void enter(int64_t b, const Tile& tile) {
    this->b = b;
    this->tile = tile;
  }
  void enter_channel(int64_t c) {
    this->c = c;
    values.spread(tile, b * g.C + c, gates.first, gates.second);
  }
  void write(const T* patch, int64_t patch_pitch, int64_t start, int64_t vectors, T* out,
             int64_t out_pitch) {
    respond(patch, patch_pitch, vectors, response, g.K(), c,
            [&](auto i, int64_t q, const Vec<T>& z) RFA_INLINE {
              (z * gate(i, start + q)).store(out + i * out_pitch + q);
            });
  }
  void backward(const T* patch, int64_t patch_pitch, int64_t vectors, T* u, T* grad,
                int64_t grad_pitch, double* shift) {
    this->differentiate(patch, patch_pitch, vectors, u, grad, grad_pitch, shift,
                        [&](auto i, int64_t q) RFA_INLINE { return gate(i, q); });
    const int64_t plane = b * g.C + c;
    for (int64_t i = 0; i < g.K(); ++i) {
      T* const row = grads.first + (plane * g.kh + i / g.kw) * g.h + tile.row;
      T* const column = grads.second + (plane * g.kw + i % g.kw) * g.w + tile.column;
      for (int64_t r = 0; r < tile.rows; ++r) {
        const T* const w = weighted.get() + i * pitch + r * tile.columns;
        const T of_row = values.row(i)[r * tile.columns];
        row[r] += dot(w, values.column(i), tile.columns);
        for (int64_t q = 0; q < tile.columns; ++q) {
          column[q] += of_row * w[q];
        }
      }
    }
  }

 private:
  RFA_INLINE inline Vec<T> gate(int64_t i, int64_t q) const {
    return Vec<T>::loadu(values.row(i) + q) * Vec<T>::loadu(values.column(i) + q);
  }

  using Gated<T>::g;
  using Gated<T>::response;
  using Gated<T>::gates;
  using Gated<T>::grads;
  using Gated<T>::pitch;
  using Gated<T>::weighted;
  using Gated<T>::tile;
  using Gated<T>::b;
  using Gated<T>::c;
  Coordinates<T> values;
};

} // namespace

template <typename E>
void pool_channels(const Geometry& g, const Response<Compute<E>>& response, const E* x,
                   Compute<E>* pooled, Compute<E>* largest) {
  using T = Compute<E>;
  const int64_t K = g.K(), area = g.h * g.w;
  const int64_t threads = at::get_num_threads();
  const auto tiles =
      split_map(g, tile_positions<T>(g), std::max<int64_t>(1, ceil_div(threads, g.B)));
  const int64_t count = tiles.size(), pitch = largest_tile<T>(tiles);
  at::parallel_for(0, g.B * count, 1, [&](int64_t begin, int64_t end) {
    Windows<E> windows(g, tiles);
    Buffer<T> most(K * pitch), sum(K * pitch), index(largest ? K * pitch : 0);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / count;
      const Tile& tile = tiles[task % count];
      const int64_t n = tile.positions(), vectors = ceil_div(n, Vec<T>::size());
      std::fill(most.get(), most.get() + K * pitch, -std::numeric_limits<T>::infinity());
      std::fill(sum.get(), sum.get() + K * pitch, T(0));
      if (largest) { // if the first channel is NaN, no other is larger
        std::fill(index.get(), index.get() + K * pitch, T(0));
      }
      for (int64_t c = 0; c < g.C; ++c) {
        windows.load(tile, x + (b * g.C + c) * g.H * g.W);
        const auto add = [&](auto i, int64_t q, const Vec<T>& z) RFA_INLINE {
          T *const m = most.get() + i * pitch + q, *const s = sum.get() + i * pitch + q;
          at::vec::maximum(Vec<T>::loadu(m), z).store(m); // propagates NaN
          (Vec<T>::loadu(s) + z).store(s);
        };
        if (!largest) {
          respond(windows.patches(), windows.pitch(), vectors, response, K, c, add);
          continue;
        }
        const Vec<T> here(static_cast<T>(c));
        respond(windows.patches(), windows.pitch(), vectors, response, K, c,
                [&](auto i, int64_t q, const Vec<T>& z) RFA_INLINE {
                  T* const at = index.get() + i * pitch + q;
                  const Vec<T> before = Vec<T>::loadu(most.get() + i * pitch + q);
                  Vec<T>::blendv(Vec<T>::loadu(at), here, z > before).store(at);
                  add(i, q, z);
                });
      }
      const int64_t start = tile.start(g);
      for (int64_t i = 0; i < K; ++i) {
        const T *m = most.get() + i * pitch, *s = sum.get() + i * pitch;
        T* const to = pooled + (b * 2 * K + i) * area + start;
        std::copy(m, m + n, to);
        for (int64_t q = 0; q < n; ++q) {
          to[K * area + q] = s[q] / static_cast<T>(g.C);
        }
        if (largest) {
          const T* from = index.get() + i * pitch;
          std::copy(from, from + n, largest + (b * K + i) * area + start);
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
  const auto tiles = split_map(g, tile_positions<T>(g), 1);
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

namespace {

// Computes the gradients of the input from those of pools. `make_source(positions)` creates each
// thread's source, whose `at(i, q)` is the gradient of a vector of features of the current tile and
// channel.
template <typename E, typename MakeSource>
void pool_backward(const Geometry& g, const Response<Compute<E>>& response, const E* x,
                   const Gradients<Compute<E>>& grads, const MakeSource& make_source) {
  using T = Compute<E>;
  const int64_t K = g.K();
  const auto tiles = split_map(g, 640, 1);
  const int64_t pitch = largest_tile<T>(tiles);
  at::parallel_for(0, g.C, 1, [&](int64_t begin, int64_t end) {
    Windows<E> windows(g, tiles);
    Buffer<T> grad(K * pitch), mixed(K * windows.pitch());
    auto source = make_source(pitch);
    const int64_t per_channel = K + K * K;
    Buffer<double> sums((end - begin) * per_channel);
    for (int64_t b = 0; b < g.B; ++b) {
      for (const auto& tile : tiles) {
        const int64_t n = tile.positions(), vectors = ceil_div(n, Vec<T>::size());
        source.enter(b, tile);
        for (int64_t c = begin; c < end; ++c) {
          const int64_t plane = (b * g.C + c) * g.H * g.W;
          double* const sum = sums.get() + (c - begin) * per_channel;
          windows.load(tile, x + plane);
          source.enter_channel(c);
          respond(windows.patches(), windows.pitch(), vectors, response, K, c,
                  [&](auto i, int64_t q, const Vec<T>& z) RFA_INLINE {
                    through_act(response, source.at(i, q), z).store(grad.get() + i * pitch + q);
                  });
          for (int64_t i = 0; i < K; ++i) {
            T* const row = grad.get() + i * pitch;
            std::fill(row + n, row + vectors * Vec<T>::size(), T(0));
          }
          add_sums(grad.get(), pitch, n, K, sum);
          absorb<E>(tile, windows, K, grad.get(), pitch, response.feature + c * K * K, nullptr,
                    grads.products ? sum + K : nullptr, mixed.get(),
                    grads.x ? grads.x + plane : nullptr);
        }
      }
    }
    for (int64_t c = begin; grads.products && c < end; ++c) {
      const double* sum = sums.get() + (c - begin) * per_channel;
      std::copy(sum, sum + K, grads.shift + c * K);
      std::copy(sum + K, sum + per_channel, grads.products + c * K * K);
    }
  });
}

template <typename T>
class OfChannels {
 public:
  OfChannels(const Geometry& g, const T* grad, const T* largest, int64_t positions)
      : g(g), grad(grad), largest(largest), pitch(positions), most(g.K() * positions),
        mean(g.K() * positions), index(g.K() * positions) {}
  void enter(int64_t b, const Tile& tile) {
    const int64_t K = g.K(), area = g.h * g.w, n = tile.positions(), start = tile.start(g);
    for (int64_t i = 0; i < K; ++i) {
      const T* from = grad + (b * 2 * K + i) * area + start;
      std::copy(from, from + n, most.get() + i * pitch);
      for (int64_t q = 0; q < n; ++q) {
        mean.get()[i * pitch + q] = from[K * area + q] / static_cast<T>(g.C);
      }
      from = largest + (b * K + i) * area + start;
      std::copy(from, from + n, index.get() + i * pitch);
    }
  }
  void enter_channel(int64_t c) {
    here = static_cast<T>(c);
  }
  RFA_INLINE inline Vec<T> at(int64_t i, int64_t q) const {
    const int64_t k = i * pitch + q;
    const Vec<T> of_mean = Vec<T>::loadu(mean.get() + k);
    return Vec<T>::blendv(of_mean, of_mean + Vec<T>::loadu(most.get() + k),
                          Vec<T>::loadu(index.get() + k) == Vec<T>(here));
  }

 private:
  const Geometry& g;
  const T *grad, *largest;
  const int64_t pitch;
  Buffer<T> most, mean, index;
  T here = 0;
};

template <typename T>
class OfCoordinates {
 public:
  OfCoordinates(const Geometry& g, const T* rows, const T* columns, int64_t positions)
      : g(g), rows(rows), columns(columns), of_row(T(1) / static_cast<T>(g.kw * g.w)),
        of_column(T(1) / static_cast<T>(g.kh * g.h)), values(g, positions) {}
  void enter(int64_t b, const Tile& tile) {
    this->b = b;
    this->tile = tile;
  }
  void enter_channel(int64_t c) {
    values.spread(tile, b * g.C + c, rows, columns);
  }
  RFA_INLINE inline Vec<T> at(int64_t i, int64_t q) const {
    return Vec<T>::loadu(values.row(i) + q) * of_row +
        Vec<T>::loadu(values.column(i) + q) * of_column;
  }

 private:
  const Geometry& g;
  const T *rows, *columns;
  const Vec<T> of_row, of_column; // weight of a value in the means
  Coordinates<T> values;
  Tile tile{};
  int64_t b = 0;
};

} // namespace

template <typename E>
void pool_channels_backward(const Geometry& g, const Response<Compute<E>>& response, const E* x,
                            const Compute<E>* grad, const Compute<E>* largest,
                            const Gradients<Compute<E>>& grads) {
  pool_backward(g, response, x, grads, [&](int64_t positions) {
    return OfChannels<Compute<E>>(g, grad, largest, positions);
  });
}

template <typename E>
void pool_coordinates_backward(const Geometry& g, const Response<Compute<E>>& response, const E* x,
                               const Compute<E>* grad_rows, const Compute<E>* grad_columns,
                               const Gradients<Compute<E>>& grads) {
  pool_backward(g, response, x, grads, [&](int64_t positions) {
    return OfCoordinates<Compute<E>>(g, grad_rows, grad_columns, positions);
  });
}

template <typename E>
void forward_gated(const Geometry& g, const Response<Compute<E>>& response,
                   const Gates<Compute<E>>& gates, const E* x, const E* weight, const E* bias,
                   E* y) {
  using T = Compute<E>;
  if (gates.of_coordinates) {
    convolve(g, x, weight, bias, y, [&](int64_t positions) {
      return ByRowAndColumn<T>(g, response, gates, {}, positions);
    });
  } else {
    convolve(g, x, weight, bias, y, [&](int64_t positions) {
      return ByChannelAndPosition<T>(g, response, gates, {}, positions);
    });
  }
}

template <typename E>
void backward_gated(const Geometry& g, const Response<Compute<E>>& response,
                    const Gates<Compute<E>>& gates, const E* grad_y, const E* x, const E* weight,
                    const Gradients<Compute<E>>& grads, Compute<E>* grad_first,
                    Compute<E>* grad_second) {
  using T = Compute<E>;
  if (gates.of_coordinates) {
    convolve_backward(g, grad_y, x, weight, grads, 0, [&](int64_t positions) {
      return ByRowAndColumn<T>(
          g, response, gates, {grad_first, grad_second, nullptr}, positions);
    });
    return;
  }
  // All channels contribute to the gradients of position gates: each slot has its own sums, which
  // are then added in a fixed order. Slots, and so threads, are limited to keep their memory below
  // an eighth of the features'.
  const int64_t slots = std::clamp<int64_t>(g.C / 8, 1, 8), size = g.B * g.K() * g.h * g.w;
  Buffer<T> partial(slots * size);
  convolve_backward(g, grad_y, x, weight, grads, slots, [&](int64_t positions) {
    return ByChannelAndPosition<T>(
        g, response, gates, {grad_first, grad_second, partial.get()}, positions);
  });
  at::parallel_for(0, size, 4096, [&](int64_t begin, int64_t end) {
    std::copy(partial.get() + begin, partial.get() + end, grad_second + begin);
    for (int64_t slot = 1; slot < slots; ++slot) {
      const T* from = partial.get() + slot * size;
      for (int64_t q = begin; q < end; ++q) {
        grad_second[q] += from[q];
      }
    }
  });
}

#define RFA_INSTANTIATE(E)                                                                       \
  template void pool_channels<E>(                                                                \
      const Geometry&, const Response<Compute<E>>&, const E*, Compute<E>*, Compute<E>*);         \
  template void pool_coordinates<E>(                                                             \
      const Geometry&, const Response<Compute<E>>&, const E*, Compute<E>*, Compute<E>*);         \
  template void pool_channels_backward<E>(                                                       \
      const Geometry&, const Response<Compute<E>>&, const E*, const Compute<E>*,                 \
      const Compute<E>*, const Gradients<Compute<E>>&);                                          \
  template void pool_coordinates_backward<E>(                                                    \
      const Geometry&, const Response<Compute<E>>&, const E*, const Compute<E>*,                 \
      const Compute<E>*, const Gradients<Compute<E>>&);                                          \
  template void forward_gated<E>(const Geometry&, const Response<Compute<E>>&,                   \
                                 const Gates<Compute<E>>&, const E*, const E*, const E*, E*);    \
  template void backward_gated<E>(const Geometry&, const Response<Compute<E>>&,                  \
                                  const Gates<Compute<E>>&, const E*, const E*, const E*,        \
                                  const Gradients<Compute<E>>&, Compute<E>*, Compute<E>*);

RFA_INSTANTIATE(float)
RFA_INSTANTIATE(double)
RFA_INSTANTIATE(c10::BFloat16)

} // namespace rfa
