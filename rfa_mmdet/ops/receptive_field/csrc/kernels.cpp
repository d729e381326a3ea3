// RFAConv forward and backward; moments of the windows and their gradient.

#include "kernels.h"

#include "convolve.h"
#include "convolve_backward.h"
#include "products.h"

namespace rfa {
namespace {

// Parameters of one channel, prepared for the loops.
template <typename T>
struct Channel {
  const T* feature; // (K, K)
  const T* shift; // (K)
  const T* above; // (K): (attention - its maximum) * log2(e), the exponent where the mean >= 0
  const T* below; // (K): (attention - its minimum) * log2(e), where it is negative
};

template <typename T>
class Channels {
 public:
  Channels(const Geometry& g, const Window<T>& window)
      : K(g.K()), stride(K * K + 3 * K), data(g.C * stride) {
    constexpr double log2e = 1.4426950408889634;
    for (int64_t c = 0; c < g.C; ++c) {
      T* out = data.get() + c * stride;
      const T* attention = window.attention + c * K;
      const T most = *std::max_element(attention, attention + K);
      const T least = *std::min_element(attention, attention + K);
      for (int64_t i = 0; i < K; ++i) {
        std::copy_n(window.feature + (c * K + i) * K, K, out + i * K);
        out[K * K + i] = window.shift[c * K + i];
        out[K * K + K + i] = static_cast<T>((attention[i] - most) * log2e);
        out[K * K + 2 * K + i] = static_cast<T>((attention[i] - least) * log2e);
      }
    }
  }
  Channel<T> operator[](int64_t c) const {
    const T* p = data.get() + c * stride;
    return {p, p + K * K, p + K * K + K, p + K * K + 2 * K};
  }

 private:
  const int64_t K, stride;
  Buffer<T> data;
};

// Exponentials of a channel's attention, given the mean of the window.
template <typename T>
class Exponentials {
 public:
  RFA_INLINE inline Exponentials(const Channel<T>& channel, const Vec<T>& mean)
      : channel(channel), above(at::vec::clamp_min(mean, Vec<T>(T(0)))),
        below(at::vec::clamp_max(mean, Vec<T>(T(0)))) {}
  RFA_INLINE inline Vec<T> operator[](int64_t i) const {
    return exp2_nonpositive(at::vec::fmadd(
        Vec<T>(channel.above[i]), above, Vec<T>(channel.below[i]) * below));
  }

 private:
  const Channel<T>& channel;
  const Vec<T> above, below;
};

template <typename T, int KK>
RFA_INLINE inline Vec<T> mean_of(const Vec<T> (&p)[KK]) {
  Vec<T> sum = p[0];
  unroll<KK - 1>([&](auto i) RFA_INLINE { sum = sum + p[i + 1]; });
  return sum * Vec<T>(T(1) / T(KK));
}

template <typename T>
inline Vec<T> mean_of(const T* patch, int64_t pitch, int64_t K) {
  Vec<T> sum = Vec<T>::loadu(patch);
  for (int64_t i = 1; i < K; ++i) {
    sum = sum + Vec<T>::loadu(patch + i * pitch);
  }
  return sum * Vec<T>(T(1) / T(K));
}

// out (K, positions) = relu?(feature patch + shift) * softmax(attention * mean of patch).
template <typename T, int KK, bool relu>
void respond_fixed(const T* patch, int64_t pitch, int64_t vectors, const Channel<T>& channel,
                   T* out, int64_t out_pitch) {
  const Vec<T> zero(T(0));
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t q = v * Vec<T>::size();
    Vec<T> p[KK], u[KK];
    unroll<KK>([&](auto j) RFA_INLINE { p[j] = Vec<T>::loadu(patch + j * pitch + q); });
    const Exponentials<T> exponentials(channel, mean_of<T, KK>(p));
    Vec<T> sum = zero;
    unroll<KK>([&](auto i) RFA_INLINE {
      Vec<T> z(channel.shift[i]);
      unroll<KK>([&](auto j) RFA_INLINE {
        z = at::vec::fmadd(Vec<T>(channel.feature[i * KK + j]), p[j], z);
      });
      const Vec<T> e = exponentials[i];
      sum = sum + e;
      u[i] = (relu ? at::vec::clamp_min(z, zero) : z) * e;
    });
    const Vec<T> inverse = Vec<T>(T(1)) / sum;
    unroll<KK>([&](auto i) RFA_INLINE { (u[i] * inverse).store(out + i * out_pitch + q); });
  }
}

// The same for any K.
template <typename T>
void respond_any(const T* patch, int64_t pitch, int64_t vectors, const Channel<T>& channel,
                 int64_t K, bool relu, T* out, int64_t out_pitch) {
  mix<T>(patch, pitch, vectors, K, channel.feature, K, 1, false, channel.shift, out, out_pitch);
  const Vec<T> zero(T(0));
  for (int64_t q = 0; q < vectors * Vec<T>::size(); q += Vec<T>::size()) {
    const Exponentials<T> exponentials(channel, mean_of(patch + q, pitch, K));
    Vec<T> sum = zero;
    for (int64_t i = 0; i < K; ++i) {
      T* const at = out + i * out_pitch + q;
      const Vec<T> z = Vec<T>::loadu(at), e = exponentials[i];
      sum = sum + e;
      ((relu ? at::vec::clamp_min(z, zero) : z) * e).store(at);
    }
    const Vec<T> inverse = Vec<T>(T(1)) / sum;
    for (int64_t i = 0; i < K; ++i) {
      T* const at = out + i * out_pitch + q;
      (Vec<T>::loadu(at) * inverse).store(at);
    }
  }
}

template <typename T>
void respond(const T* patch, int64_t pitch, int64_t vectors, const Channel<T>& channel, int64_t K,
             bool relu, T* out, int64_t out_pitch) {
  if (K == 9) {
    auto* fixed = relu ? &respond_fixed<T, 9, true> : &respond_fixed<T, 9, false>;
    fixed(patch, pitch, vectors, channel, out, out_pitch);
  } else {
    respond_any(patch, pitch, vectors, channel, K, relu, out, out_pitch);
  }
}

// Reads dU from `grad`, and overwrites it with dF; writes u. Adds to the sums of the attention and
// shift gradients, and writes dA / K of each position to `means`.
template <typename T, int KK, bool relu>
void respond_backward_fixed(const T* patch, int64_t pitch, int64_t vectors,
                            const Channel<T>& channel, const T* attention, T* u, T* grad,
                            int64_t grad_pitch, T* means, double* d_attention, double* d_shift) {
  const Vec<T> zero(T(0));
  Vec<T> sum_attention[KK], sum_shift[KK];
  unroll<KK>([&](auto i) RFA_INLINE { sum_attention[i] = sum_shift[i] = zero; });
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t q = v * Vec<T>::size();
    Vec<T> s[KK], ds[KK];
    Vec<T> sum = zero, mean;
    {
      Vec<T> p[KK];
      unroll<KK>([&](auto j) RFA_INLINE { p[j] = Vec<T>::loadu(patch + j * pitch + q); });
      mean = mean_of<T, KK>(p);
      const Exponentials<T> exponentials(channel, mean);
      unroll<KK>([&](auto i) RFA_INLINE {
        s[i] = exponentials[i];
        sum = sum + s[i];
      });
      const Vec<T> inverse = Vec<T>(T(1)) / sum;
      unroll<KK>([&](auto i) RFA_INLINE {
        s[i] = s[i] * inverse;
        Vec<T> f(channel.shift[i]);
        unroll<KK>([&](auto j) RFA_INLINE {
          f = at::vec::fmadd(Vec<T>(channel.feature[i * KK + j]), p[j], f);
        });
        T* const at = grad + i * grad_pitch + q;
        const Vec<T> du = Vec<T>::loadu(at);
        Vec<T> df = du * s[i];
        if (relu) {
          df = Vec<T>::blendv(zero, df, f > zero);
          f = at::vec::clamp_min(f, zero);
        }
        df.store(at);
        (f * s[i]).store(u + i * grad_pitch + q);
        ds[i] = du * f;
        sum_shift[i] = sum_shift[i] + df;
      });
    }
    Vec<T> total = zero, d_mean = zero;
    unroll<KK>([&](auto i) RFA_INLINE { total = at::vec::fmadd(s[i], ds[i], total); });
    unroll<KK>([&](auto i) RFA_INLINE {
      const Vec<T> d_logit = s[i] * (ds[i] - total);
      d_mean = at::vec::fmadd(Vec<T>(attention[i]), d_logit, d_mean);
      sum_attention[i] = at::vec::fmadd(d_logit, mean, sum_attention[i]);
    });
    (d_mean * Vec<T>(T(1) / T(KK))).store(means + q);
  }
  unroll<KK>([&](auto i) RFA_INLINE {
    d_attention[i] += horizontal_sum<T>(sum_attention[i]);
    d_shift[i] += horizontal_sum<T>(sum_shift[i]);
  });
}

// The same for any K; `scratch` holds 3 K vectors.
template <typename T>
void respond_backward_any(const T* patch, int64_t pitch, int64_t vectors, int64_t K, bool relu,
                          const Channel<T>& channel, const T* attention, T* u, T* grad,
                          int64_t grad_pitch, T* means, double* d_attention, double* d_shift,
                          T* scratch) {
  constexpr int64_t size = Vec<T>::size();
  mix<T>(patch, pitch, vectors, K, channel.feature, K, 1, false, channel.shift, u, grad_pitch);
  const Vec<T> zero(T(0));
  T *const s = scratch, *const sums = s + K * size; // (K), (K, 2): sums are too many for registers
  std::fill(sums, sums + 2 * K * size, T(0));
  const auto add = [](T* at, const Vec<T>& value) RFA_INLINE {
    (Vec<T>::loadu(at) + value).store(at);
  };
  for (int64_t q = 0; q < vectors * size; q += size) {
    const Vec<T> mean = mean_of(patch + q, pitch, K);
    const Exponentials<T> exponentials(channel, mean);
    Vec<T> sum = zero, total = zero, d_mean = zero;
    for (int64_t i = 0; i < K; ++i) {
      T* const at = u + i * grad_pitch + q;
      const Vec<T> e = exponentials[i];
      Vec<T> f = Vec<T>::loadu(at);
      if (relu) {
        f = at::vec::clamp_min(f, zero);
        f.store(at);
      }
      e.store(s + i * size);
      sum = sum + e;
      total = at::vec::fmadd(e, Vec<T>::loadu(grad + i * grad_pitch + q) * f, total);
    }
    const Vec<T> inverse = Vec<T>(T(1)) / sum;
    total = total * inverse;
    for (int64_t i = 0; i < K; ++i) {
      T *const at = grad + i * grad_pitch + q, *const at_u = u + i * grad_pitch + q;
      const Vec<T> si = Vec<T>::loadu(s + i * size) * inverse;
      const Vec<T> f = Vec<T>::loadu(at_u), du = Vec<T>::loadu(at);
      const Vec<T> d_logit = si * (du * f - total);
      d_mean = at::vec::fmadd(Vec<T>(attention[i]), d_logit, d_mean);
      Vec<T> df = du * si;
      if (relu) {
        df = Vec<T>::blendv(zero, df, f > zero);
      }
      df.store(at);
      (f * si).store(at_u);
      add(sums + 2 * i * size, d_logit * mean);
      add(sums + (2 * i + 1) * size, df);
    }
    (d_mean * Vec<T>(T(1) / T(K))).store(means + q);
  }
  for (int64_t i = 0; i < K; ++i) {
    d_attention[i] += horizontal_sum<T>(Vec<T>::loadu(sums + 2 * i * size));
    d_shift[i] += horizontal_sum<T>(Vec<T>::loadu(sums + (2 * i + 1) * size));
  }
}

// Source of features weighted by softmax attention, for convolve.h.
template <typename T>
struct Attention {
  const Channels<T>& channels;
  const int64_t K;
  const bool relu;
  Channel<T> channel{};

  void enter(int64_t, const Tile&) {}
  void enter_channel(int64_t c) {
    channel = channels[c];
  }
  void write(const T* patch, int64_t pitch, int64_t, int64_t vectors, T* out, int64_t out_pitch) {
    respond(patch, pitch, vectors, channel, K, relu, out, out_pitch);
  }
};

// The corresponding source for convolve_backward.h.
template <typename T>
class AttentionBackward {
 public:
  AttentionBackward(const Geometry& g, const Channels<T>& channels, const Window<T>& window,
                    T* gradient, int64_t positions)
      : K(g.K()), channels(channels), window(window), gradient(gradient), means(positions),
        scratch(3 * K * Vec<T>::size()), sums(g.C * K) {}
  void enter(int64_t, const Tile&) {}
  void enter_slot(int64_t) {}
  void enter_channel(int64_t c) {
    this->c = c;
  }
  void backward(const T* patch, int64_t pitch, int64_t vectors, T* u, T* grad, int64_t grad_pitch,
                double* shift) {
    const T* const attention = window.attention + c * K;
    double* const sum = sums.get() + c * K;
    if (K == 9) {
      auto* fixed = window.relu ? &respond_backward_fixed<T, 9, true>
                                : &respond_backward_fixed<T, 9, false>;
      fixed(patch, pitch, vectors, channels[c], attention, u, grad, grad_pitch, means.get(), sum,
            shift);
    } else {
      respond_backward_any(patch, pitch, vectors, K, window.relu, channels[c], attention, u, grad,
                           grad_pitch, means.get(), sum, shift, scratch.get());
    }
  }
  const T* feature() const {
    return channels[c].feature;
  }
  const T* constant() const {
    return means.get();
  }
  void leave(int64_t c) {
    if (gradient) {
      std::copy(sums.get() + c * K, sums.get() + (c + 1) * K, gradient + c * K);
    }
  }

 private:
  const int64_t K;
  const Channels<T>& channels;
  const Window<T>& window;
  T* const gradient;
  Buffer<T> means, scratch;
  Buffer<double> sums;
  int64_t c = 0;
};

} // namespace

template <typename E>
void forward(const Geometry& g, const Window<Compute<E>>& window, const E* x, const E* weight,
             const E* bias, E* y) {
  using T = Compute<E>;
  const Channels<T> channels(g, window);
  convolve(g, x, weight, bias, y,
           [&](int64_t) { return Attention<T>{channels, g.K(), window.relu}; });
}

template <typename T>
int64_t weight_columns(int64_t outputs) {
  return ceil_div(outputs, 16) * 16; // whole cache lines of float32, and whole vectors of any kind
}

template <typename E>
void backward(const Geometry& g, const Window<Compute<E>>& window, const E* grad_y, const E* x,
              const E* weight, const Gradients<Compute<E>>& grads) {
  using T = Compute<E>;
  const Channels<T> channels(g, window);
  convolve_backward(g, grad_y, x, weight, grads, 0, [&](int64_t positions) {
    return AttentionBackward<T>(g, channels, window, grads.attention, positions);
  });
}

namespace {

// Subtracts the mean of n values from them, up to rounding, and returns it.
template <typename T>
double centre(T* values, int64_t n) {
  const T mean = sum_of(values, n) / static_cast<T>(n);
  for (int64_t q = 0; q < n; ++q) {
    values[q] -= mean;
  }
  // Add the mean that rounding left over: means of tiles are subtracted from one another.
  return mean + static_cast<double>(sum_of(values, n)) / static_cast<double>(n);
}

} // namespace

template <typename E>
void moments(const Geometry& g, const E* x, double* first, double* second) {
  using T = Compute<E>;
  const int64_t K = g.K(), plane = g.H * g.W;
  const auto tiles = split_map(g, 640, 1);
  at::parallel_for(0, g.C, 1, [&](int64_t begin, int64_t end) {
    Windows<E> windows(g, tiles);
    Buffer<double> means(K), products(K * K), difference(K);
    for (int64_t c = begin; c < end; ++c) {
      double* const mean = first + c * K;
      double* const scatter = second + c * K * K; // sums of squares about the mean, upper half
      std::fill(mean, mean + K, 0.0);
      std::fill(scatter, scatter + K * K, 0.0);
      double seen = 0;
      for (int64_t b = 0; b < g.B; ++b) {
        for (const auto& tile : tiles) {
          // Centre each position by its mean in this tile: in float32, the square of a large mean
          // would swamp the deviation, and positions that see mostly padding have other means.
          windows.load(tile, x + (b * g.C + c) * plane);
          const int64_t n = tile.positions();
          for (int64_t k = 0; k < K; ++k) {
            means.get()[k] = centre(windows.patches() + k * windows.pitch(), n);
          }
          std::fill(products.get(), products.get() + K * K, 0.0);
          multiply<T>(windows.patches(), windows.pitch(), windows.patches(), windows.pitch(),
                      ceil_div(n, Vec<T>::size()), K, products.get(), true);
          const double share = n / (seen + n);
          for (int64_t k = 0; k < K; ++k) {
            difference.get()[k] = means.get()[k] - mean[k];
            mean[k] += share * difference.get()[k];
          }
          for (int64_t i = 0; i < K; ++i) {
            const double factor = seen * share * difference.get()[i];
            for (int64_t j = i; j < K; ++j) {
              scatter[i * K + j] += products.get()[i * K + j] + factor * difference.get()[j];
            }
          }
          seen += n;
        }
      }
      for (int64_t i = 0; i < K; ++i) {
        for (int64_t j = i; j < K; ++j) {
          scatter[i * K + j] /= seen;
          scatter[j * K + i] = scatter[i * K + j];
        }
      }
    }
  });
}

template <typename E>
void moments_backward(const Geometry& g, const E* x, const Compute<E>* slope,
                      const Compute<E>* constant, Compute<E>* grad_x) {
  using T = Compute<E>;
  const int64_t K = g.K(), plane = g.H * g.W;
  const auto tiles = split_map(g, 640, 1);
  at::parallel_for(0, g.B * g.C, 1, [&](int64_t begin, int64_t end) {
    Windows<E> windows(g, tiles);
    Buffer<T> mixed(K * windows.pitch());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t c = i % g.C;
      for (const auto& tile : tiles) {
        windows.load(tile, x + i * plane);
        const int64_t vectors = ceil_div(tile.positions(), Vec<T>::size());
        mix<T>(windows.patches(), windows.pitch(), vectors, K, slope + c * K * K, K, 1, false,
               constant + c * K, mixed.get(), windows.pitch());
        windows.add(tile, mixed.get(), grad_x + i * plane);
      }
    }
  });
}

#define RFA_INSTANTIATE(E)                                                                       \
  template void forward<E>(                                                                      \
      const Geometry&, const Window<Compute<E>>&, const E*, const E*, const E*, E*);             \
  template void backward<E>(const Geometry&, const Window<Compute<E>>&, const E*, const E*,      \
                            const E*, const Gradients<Compute<E>>&);                             \
  template void moments<E>(const Geometry&, const E*, double*, double*);                         \
  template void moments_backward<E>(                                                             \
      const Geometry&, const E*, const Compute<E>*, const Compute<E>*, Compute<E>*);

RFA_INSTANTIATE(float)
RFA_INSTANTIATE(double)
RFA_INSTANTIATE(c10::BFloat16)
template int64_t weight_columns<float>(int64_t);
template int64_t weight_columns<double>(int64_t);

} // namespace rfa

