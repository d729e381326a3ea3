// Forward, backward, moments and the correction of the input gradient.
//
// The backward pass gives each thread channels of its own: no sum crosses threads, so that results
// do not depend on their number, and what each tile of grad_y needs is packed once.

#include "kernels.h"

#include "convolve.h"

namespace rfa {
namespace {

// The parameters of one channel as the loops want them.
template <typename T>
struct Channel {
  const T* feature; // (K, K), times scale
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
        const T scale = window.scale[c * K + i];
        for (int64_t j = 0; j < K; ++j) {
          out[i * K + j] = scale * window.feature[(c * K + i) * K + j];
        }
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

template <typename T, int KK>
RFA_INLINE inline Vec<T> mean_of(const Vec<T> (&p)[KK]) {
  Vec<T> sum = p[0];
  unroll<KK - 1>([&](auto i) RFA_INLINE { sum = sum + p[i + 1]; });
  return sum * Vec<T>(T(1) / T(KK));
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
    const Vec<T> mean = mean_of<T, KK>(p);
    const Vec<T> above = at::vec::clamp_min(mean, zero), below = at::vec::clamp_max(mean, zero);
    Vec<T> sum = zero;
    unroll<KK>([&](auto i) RFA_INLINE {
      Vec<T> z(channel.shift[i]);
      unroll<KK>([&](auto j) RFA_INLINE {
        z = at::vec::fmadd(Vec<T>(channel.feature[i * KK + j]), p[j], z);
      });
      const Vec<T> e = exp2_nonpositive(at::vec::fmadd(
          Vec<T>(channel.above[i]), above, Vec<T>(channel.below[i]) * below));
      sum = sum + e;
      u[i] = (relu ? at::vec::clamp_min(z, zero) : z) * e;
    });
    const Vec<T> inverse = Vec<T>(T(1)) / sum;
    unroll<KK>([&](auto i) RFA_INLINE { (u[i] * inverse).store(out + i * out_pitch + q); });
  }
}

// Writes the response z (after the activation) and the attention s of position i, any K.
template <typename T>
void respond_any(const T* patch, int64_t pitch, int64_t vectors, const Channel<T>& channel,
                 int64_t K, bool relu, T* f, int64_t f_pitch, T* s, int64_t s_pitch, T* means) {
  const Vec<T> zero(T(0));
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t q = v * Vec<T>::size();
    Vec<T> mean = zero;
    for (int64_t j = 0; j < K; ++j) {
      mean = mean + Vec<T>::loadu(patch + j * pitch + q);
    }
    mean = mean * Vec<T>(T(1) / T(K));
    mean.store(means + q);
    const Vec<T> above = at::vec::clamp_min(mean, zero), below = at::vec::clamp_max(mean, zero);
    Vec<T> sum = zero;
    for (int64_t i = 0; i < K; ++i) {
      Vec<T> z(channel.shift[i]);
      for (int64_t j = 0; j < K; ++j) {
        const Vec<T> p = Vec<T>::loadu(patch + j * pitch + q);
        z = at::vec::fmadd(Vec<T>(channel.feature[i * K + j]), p, z);
      }
      (relu ? at::vec::clamp_min(z, zero) : z).store(f + i * f_pitch + q);
      const Vec<T> e = exp2_nonpositive(at::vec::fmadd(
          Vec<T>(channel.above[i]), above, Vec<T>(channel.below[i]) * below));
      e.store(s + i * s_pitch + q);
      sum = sum + e;
    }
    const Vec<T> inverse = Vec<T>(T(1)) / sum;
    for (int64_t i = 0; i < K; ++i) {
      (Vec<T>::loadu(s + i * s_pitch + q) * inverse).store(s + i * s_pitch + q);
    }
  }
}

template <typename T>
void respond(const T* patch, int64_t pitch, int64_t vectors, const Channel<T>& channel, int64_t K,
             bool relu, T* out, int64_t out_pitch, T* scratch) {
  if (K == 9) {
    auto* fixed = relu ? &respond_fixed<T, 9, true> : &respond_fixed<T, 9, false>;
    fixed(patch, pitch, vectors, channel, out, out_pitch);
    return;
  }
  const int64_t size = vectors * Vec<T>::size();
  T* s = scratch + size; // after the means
  respond_any(patch, pitch, vectors, channel, K, relu, out, out_pitch, s, size, scratch);
  for (int64_t i = 0; i < K; ++i) {
    for (int64_t q = 0; q < size; ++q) {
      out[i * out_pitch + q] *= s[i * size + q];
    }
  }
}

// As pack_rows, for the transposed weight: [group][block][block of rows of it][output][row].
template <typename E>
void pack_columns(const Geometry& g, int64_t block, const E* weight, Compute<E>* out) {
  const int64_t depth = g.C / g.groups * g.K(), rows = g.O / g.groups;
  const int64_t blocks = ceil_div(depth, block);
  at::parallel_for(0, g.groups * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / blocks, start = i % blocks * block;
      const int64_t size = std::min(block, depth - start);
      const E* from = weight + group * rows * depth + start;
      Compute<E>* to = out + group * rows * depth + start * rows;
      for (int64_t k = 0; k < size; k += kRows) {
        const int64_t count = std::min<int64_t>(kRows, size - k);
        for (int64_t o = 0; o < rows; ++o) {
          for (int64_t r = 0; r < count; ++r) {
            to[k * rows + o * count + r] = static_cast<Compute<E>>(from[o * depth + k + r]);
          }
        }
      }
    }
  });
}

} // namespace

namespace {

// Weighs by the softmax attention.
template <typename T>
struct Attention {
  const Channels<T>& channels;
  const int64_t K;
  const bool relu;
  Buffer<T> scratch;
  Channel<T> channel{};

  Attention(const Channels<T>& channels, int64_t K, bool relu, int64_t positions)
      : channels(channels), K(K), relu(relu), scratch(K == 9 ? 0 : (K + 1) * positions) {}
  void enter(int64_t, const Tile&) {}
  void enter_channel(int64_t c) {
    channel = channels[c];
  }
  void write(const T* patch, int64_t pitch, int64_t, int64_t vectors, T* out, int64_t out_pitch) {
    respond(patch, pitch, vectors, channel, K, relu, out, out_pitch, scratch.get());
  }
};

} // namespace

template <typename E>
void forward(const Geometry& g, const Window<Compute<E>>& window, const E* x, const E* weight,
             const E* bias, E* y) {
  using T = Compute<E>;
  const Channels<T> channels(g, window);
  convolve(g, x, weight, bias, y, [&](int64_t positions) {
    return Attention<T>(channels, g.K(), window.relu, positions);
  });
}

namespace {

// From dU in `grad` and the patches: u, and dF in place of dU; the sums of the attention and shift
// gradients are added to. `means` gets dA / K for each position.
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
      const Vec<T> above = at::vec::clamp_min(mean, zero), below = at::vec::clamp_max(mean, zero);
      unroll<KK>([&](auto i) RFA_INLINE {
        s[i] = exp2_nonpositive(at::vec::fmadd(
            Vec<T>(channel.above[i]), above, Vec<T>(channel.below[i]) * below));
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

template <typename T>
void respond_backward_any(const T* patch, int64_t pitch, int64_t vectors, int64_t K, bool relu,
                          const Channel<T>& channel, const T* attention, T* u, T* grad,
                          int64_t grad_pitch, T* means, double* d_attention, double* d_shift,
                          T* s) {
  const Vec<T> zero(T(0));
  const int64_t size = vectors * Vec<T>::size();
  T* values = s + K * size;
  respond_any(patch, pitch, vectors, channel, K, relu, u, grad_pitch, s, size, values);
  // Sums over positions go through memory, (K, 2) vectors of them.
  T* sums = values + size;
  std::fill(sums, sums + 2 * K * Vec<T>::size(), T(0));
  const auto add = [&](int64_t i, const Vec<T>& value) {
    T* at = sums + i * Vec<T>::size();
    (Vec<T>::loadu(at) + value).store(at);
  };
  for (int64_t q = 0; q < size; q += Vec<T>::size()) {
    Vec<T> total = zero, d_mean = zero;
    for (int64_t i = 0; i < K; ++i) {
      const Vec<T> f = Vec<T>::loadu(u + i * grad_pitch + q), si = Vec<T>::loadu(s + i * size + q);
      const Vec<T> du = Vec<T>::loadu(grad + i * grad_pitch + q);
      total = at::vec::fmadd(si, du * f, total);
    }
    const Vec<T> mean = Vec<T>::loadu(values + q);
    for (int64_t i = 0; i < K; ++i) {
      const Vec<T> f = Vec<T>::loadu(u + i * grad_pitch + q), si = Vec<T>::loadu(s + i * size + q);
      const Vec<T> du = Vec<T>::loadu(grad + i * grad_pitch + q);
      const Vec<T> d_logit = si * (du * f - total);
      d_mean = at::vec::fmadd(Vec<T>(attention[i]), d_logit, d_mean);
      Vec<T> df = du * si;
      if (relu) {
        df = Vec<T>::blendv(zero, df, f > zero);
      }
      df.store(grad + i * grad_pitch + q);
      (f * si).store(u + i * grad_pitch + q);
      add(2 * i, d_logit * mean);
      add(2 * i + 1, df);
    }
    (d_mean * Vec<T>(T(1) / T(K))).store(means + q);
  }
  for (int64_t i = 0; i < K; ++i) {
    const T* at = sums + 2 * i * Vec<T>::size();
    d_attention[i] += horizontal_sum<T>(Vec<T>::loadu(at));
    d_shift[i] += horizontal_sum<T>(Vec<T>::loadu(at + Vec<T>::size()));
  }
}

// out[j] = add + sum_i matrix[i * K + j] * in[i], all (K, positions); out may not be in.
template <typename T, int KK>
void mix_fixed(const T* in, int64_t in_pitch, int64_t vectors, const T* matrix, const T* add,
               T* out, int64_t out_pitch) {
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t q = v * Vec<T>::size();
    Vec<T> sum[KK];
    const Vec<T> start = Vec<T>::loadu(add + q);
    unroll<KK>([&](auto j) RFA_INLINE { sum[j] = start; });
    unroll<KK>([&](auto i) RFA_INLINE {
      const Vec<T> value = Vec<T>::loadu(in + i * in_pitch + q);
      unroll<KK>([&](auto j) RFA_INLINE {
        sum[j] = at::vec::fmadd(Vec<T>(matrix[i * KK + j]), value, sum[j]);
      });
    });
    unroll<KK>([&](auto j) RFA_INLINE { sum[j].store(out + j * out_pitch + q); });
  }
}

template <typename T>
void mix(const T* in, int64_t in_pitch, int64_t vectors, int64_t K, const T* matrix, const T* add,
         T* out, int64_t out_pitch) {
  if (K == 9) {
    mix_fixed<T, 9>(in, in_pitch, vectors, matrix, add, out, out_pitch);
    return;
  }
  for (int64_t q = 0; q < vectors * Vec<T>::size(); q += Vec<T>::size()) {
    for (int64_t j = 0; j < K; ++j) {
      Vec<T> sum = Vec<T>::loadu(add + q);
      for (int64_t i = 0; i < K; ++i) {
        sum = at::vec::fmadd(
            Vec<T>(matrix[i * K + j]), Vec<T>::loadu(in + i * in_pitch + q), sum);
      }
      sum.store(out + j * out_pitch + q);
    }
  }
}

// sums[(i0 + i) * stride + j0 + j] += sum over positions of a[i0 + i] * b[j0 + j]
template <typename T, int I, int J>
void multiply_block(const T* a, int64_t a_pitch, const T* b, int64_t b_pitch, int64_t vectors,
                    double* sums, int64_t stride) {
  Vec<T> sum[I][J];
  unroll<I>([&](auto i) RFA_INLINE {
    unroll<J>([&](auto j) RFA_INLINE { sum[i][j] = Vec<T>(T(0)); });
  });
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t q = v * Vec<T>::size();
    Vec<T> left[I];
    unroll<I>([&](auto i) RFA_INLINE { left[i] = Vec<T>::loadu(a + i * a_pitch + q); });
    unroll<J>([&](auto j) RFA_INLINE {
      const Vec<T> right = Vec<T>::loadu(b + j * b_pitch + q);
      unroll<I>([&](auto i) RFA_INLINE {
        sum[i][j] = at::vec::fmadd(left[i], right, sum[i][j]);
      });
    });
  }
  unroll<I>([&](auto i) RFA_INLINE {
    unroll<J>([&](auto j) RFA_INLINE { sums[i * stride + j] += horizontal_sum<T>(sum[i][j]); });
  });
}

// sums (K, K) += a b', of (K, positions) each; of a symmetric result the upper blocks only.
template <typename T>
void multiply(const T* a, int64_t a_pitch, const T* b, int64_t b_pitch, int64_t vectors, int64_t K,
              double* sums, bool symmetric) {
  if (K == 9) {
#if defined(CPU_CAPABILITY_AVX512)
    constexpr int J = 9; // 27 accumulators; 9 elsewhere
#else
    constexpr int J = 3;
#endif
    for (int i = 0; i < 9; i += 3) {
      const T* left = a + i * a_pitch;
      int j = 0;
      if (symmetric && i == 3) {
        multiply_block<T, 3, 6>(left, a_pitch, b + 3 * b_pitch, b_pitch, vectors,
                                sums + i * 9 + 3, 9);
        continue;
      }
      if (symmetric && i == 6) {
        multiply_block<T, 3, 3>(left, a_pitch, b + 6 * b_pitch, b_pitch, vectors,
                                sums + i * 9 + 6, 9);
        continue;
      }
      for (; j < 9; j += J) {
        multiply_block<T, 3, J>(left, a_pitch, b + j * b_pitch, b_pitch, vectors,
                                sums + i * 9 + j, 9);
      }
    }
    return;
  }
  for (int64_t i = 0; i < K; ++i) {
    for (int64_t j = symmetric ? i : 0; j < K; ++j) {
      multiply_block<T, 1, 1>(
          a + i * a_pitch, a_pitch, b + j * b_pitch, b_pitch, vectors, sums + i * K + j, K);
    }
  }
}

// grad_y's rows of a tile, (outputs, positions), as panels along positions and along outputs.
template <typename E>
void pack_gradient(const E* from, int64_t row_stride, int64_t outputs,
                   const Panels<Compute<E>>& positions, Compute<E>* along,
                   const Panels<Compute<E>>* across, Compute<E>* transposed) {
  using T = Compute<E>;
  for (int64_t panel = 0; panel < positions.count; ++panel) {
    const int64_t width = positions.width_of(panel), start = positions.start(panel);
    const int64_t real = std::min(width, positions.columns - start);
    T* to = along + start * outputs;
    for (int64_t o = 0; o < outputs; ++o, to += width) {
      const E* row = from + o * row_stride + start;
      for (int64_t q = 0; q < real; ++q) {
        to[q] = static_cast<T>(row[q]);
      }
      std::fill(to + real, to + width, T(0));
    }
  }
  if (!across) {
    return;
  }
  for (int64_t panel = 0; panel < across->count; ++panel) {
    const int64_t width = across->width_of(panel), start = across->start(panel);
    T* to = transposed + start * positions.columns;
    constexpr int64_t step = 16;
    for (int64_t q = 0; q < positions.columns; q += step) {
      const int64_t many = std::min(step, positions.columns - q);
      for (int64_t o = 0; o < width; ++o) {
        if (start + o < outputs) {
          const E* row = from + (start + o) * row_stride + q;
          for (int64_t i = 0; i < many; ++i) {
            to[(q + i) * width + o] = static_cast<T>(row[i]);
          }
        } else {
          for (int64_t i = 0; i < many; ++i) {
            to[(q + i) * width + o] = T(0);
          }
        }
      }
    }
  }
}

} // namespace

template <typename T>
int64_t weight_columns(int64_t outputs) {
  return Panels<T>(outputs).padded();
}

template <typename E>
void backward(const Geometry& g, const Window<Compute<E>>& window, const E* grad_y, const E* x,
              const E* weight, const Gradients<Compute<E>>& grads) {
  using T = Compute<E>;
  const int64_t K = g.K(), in_group = g.C / g.groups, outputs = g.O / g.groups;
  const int64_t area = g.h * g.w, size = sizeof(T);
  const int64_t wanted = std::clamp<int64_t>(2 * kOutputBytes / (2 * outputs * size), 96, 640);
  const auto tiles = split_map(g, wanted, 1);
  const int64_t positions = largest_tile<T>(tiles);
  const int64_t block =
      channel_block<T>(g, wanted, kBufferBytes, at::get_num_threads());
  const int64_t blocks = ceil_div(in_group, block); // a group
  const Channels<T> channels(g, window);
  Buffer<T> packed(g.O * in_group * K);
  pack_columns(g, block * K, weight, packed.get());
  const Panels<T> across(outputs);

  at::parallel_for(0, g.groups * blocks, 1, [&](int64_t begin, int64_t end) {
    Windows<E> windows(g, tiles);
    Buffer<T> along(outputs * positions), transposed(across.padded() * positions);
    Buffer<T> u(block * K * positions), grad(block * K * positions);
    Buffer<T> means(positions), mixed(K * windows.pitch());
    Buffer<T> scratch(K == 9 ? 0 : (K + 1) * positions + 2 * K * Vec<T>::size());
    const int64_t per_channel = 2 * K + K * K;
    Buffer<double> sums((end - begin) * block * per_channel);
    for (int64_t b = 0; b < g.B; ++b) {
      for (const auto& tile : tiles) {
        const Panels<T> panels(tile.positions());
        int64_t packed_group = -1;
        for (int64_t task = begin; task < end; ++task) {
          const int64_t group = task / blocks, first = task % blocks * block;
          const int64_t count = std::min(block, in_group - first);
          if (group != packed_group) {
            const E* from = grad_y + (b * g.O + group * outputs) * area + tile.start(g);
            pack_gradient<E>(from, area, outputs, panels, along.get(),
                             grads.weight ? &across : nullptr, transposed.get());
            packed_group = group;
          }
          const T* a = packed.get() + (group * in_group + first) * K * outputs;
          gemm<T>(count * K, outputs, {a, 0}, along.get(), panels, grad.get(), positions, false,
                  nullptr, true);
          for (int64_t i = 0; i < count; ++i) {
            const int64_t c = group * in_group + first + i;
            const int64_t plane = (b * g.C + c) * g.H * g.W;
            windows.load(tile, x + plane);
            const T* patch = windows.patches();
            const T* attention = window.attention + c * K;
            const Channel<T> channel = channels[c];
            T* const uc = u.get() + i * K * positions;
            T* const gc = grad.get() + i * K * positions;
            double* const sum = sums.get() + ((task - begin) * block + i) * per_channel;
            if (K == 9) {
              auto* fixed = window.relu ? &respond_backward_fixed<T, 9, true>
                                        : &respond_backward_fixed<T, 9, false>;
              fixed(patch, windows.pitch(), panels.vectors, channel, attention, uc, gc, positions,
                    means.get(), sum, sum + K);
            } else {
              respond_backward_any(patch, windows.pitch(), panels.vectors, K, window.relu, channel,
                                   attention, uc, gc, positions, means.get(), sum, sum + K,
                                   scratch.get());
            }
            if (grads.products) {
              multiply(gc, positions, patch, windows.pitch(), panels.vectors, K, sum + 2 * K,
                       false);
            }
            if (grads.x) {
              mix(gc, positions, panels.vectors, K, channel.feature, means.get(), mixed.get(),
                  windows.pitch());
              windows.add(tile, mixed.get(), grads.x + plane);
            }
          }
          if (grads.weight) {
            T* out = grads.weight + (group * in_group + first) * K * grads.weight_stride;
            gemm<T>(count * K, tile.positions(), {u.get(), positions}, transposed.get(), across,
                    out, grads.weight_stride, true, nullptr, true);
          }
        }
      }
    }
    for (int64_t task = begin; grads.products && task < end; ++task) {
      const int64_t group = task / blocks, first = task % blocks * block;
      for (int64_t i = 0; i < std::min(block, in_group - first); ++i) {
        const int64_t c = group * in_group + first + i;
        const double* sum = sums.get() + ((task - begin) * block + i) * per_channel;
        std::copy(sum, sum + K, grads.attention + c * K);
        std::copy(sum + K, sum + 2 * K, grads.shift + c * K);
        std::copy(sum + 2 * K, sum + per_channel, grads.products + c * K * K);
      }
    }
  });
}

namespace {

template <typename T>
T sum_of(const T* values, int64_t n) {
  const int64_t whole = n - n % Vec<T>::size();
  Vec<T> sum(T(0));
  for (int64_t q = 0; q < whole; q += Vec<T>::size()) {
    sum = sum + Vec<T>::loadu(values + q);
  }
  T total = horizontal_sum<T>(sum);
  for (int64_t q = whole; q < n; ++q) {
    total += values[q];
  }
  return total;
}

// Subtracts the mean of n values from them, up to rounding, and returns it.
template <typename T>
double centre(T* values, int64_t n) {
  const T mean = sum_of(values, n) / static_cast<T>(n);
  for (int64_t q = 0; q < n; ++q) {
    values[q] -= mean;
  }
  // What rounding left over matters where means of tiles are compared.
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
          // About the tile's own means, position by position: squares of a mean far above the
          // deviation would leave nothing of it in float32, and positions that see mostly padding
          // have other means than the rest.
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
void correct_input_gradient(const Geometry& g, const E* x, const Compute<E>* Q,
                            const Compute<E>* constant, Compute<E>* grad_x) {
  using T = Compute<E>;
  const int64_t K = g.K(), plane = g.H * g.W;
  const auto tiles = split_map(g, 640, 1);
  at::parallel_for(0, g.B * g.C, 1, [&](int64_t begin, int64_t end) {
    Windows<E> windows(g, tiles);
    Buffer<T> mixed(K * windows.pitch()), none(windows.pitch()), matrix(K * K);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t c = i % g.C;
      for (int64_t k = 0; k < K * K; ++k) {
        matrix.get()[k] = -Q[c * K * K + k]; // symmetric
      }
      for (const auto& tile : tiles) {
        windows.load(tile, x + i * plane);
        const int64_t vectors = ceil_div(tile.positions(), Vec<T>::size());
        mix<T>(windows.patches(), windows.pitch(), vectors, K, matrix.get(), none.get(),
               mixed.get(), windows.pitch());
        for (int64_t k = 0; k < K; ++k) {
          T* const row = mixed.get() + k * windows.pitch();
          const T value = constant[c * K + k];
          for (int64_t q = 0; q < vectors * Vec<T>::size(); ++q) {
            row[q] -= value;
          }
        }
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
  template void correct_input_gradient<E>(                                                       \
      const Geometry&, const E*, const Compute<E>*, const Compute<E>*, Compute<E>*);

RFA_INSTANTIATE(float)
RFA_INSTANTIATE(double)
RFA_INSTANTIATE(c10::BFloat16)
template int64_t weight_columns<float>(int64_t);
template int64_t weight_columns<double>(int64_t);

} // namespace rfa
