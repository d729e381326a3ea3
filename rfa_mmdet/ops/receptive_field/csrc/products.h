// Small matrix products over the positions of a tile.
#pragma once

#include "vectors.h"

namespace rfa {
namespace {

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

// The sum of a[q] * b[q].
template <typename T>
T dot(const T* a, const T* b, int64_t n) {
  Vec<T> sum(T(0));
  int64_t q = 0;
  for (; q + Vec<T>::size() <= n; q += Vec<T>::size()) {
    sum = at::vec::fmadd(Vec<T>::loadu(a + q), Vec<T>::loadu(b + q), sum);
  }
  T total = horizontal_sum<T>(sum);
  for (; q < n; ++q) {
    total += a[q] * b[q];
  }
  return total;
}

} // namespace
} // namespace rfa
