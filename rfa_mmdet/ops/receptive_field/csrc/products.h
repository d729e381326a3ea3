// Small matrix products over the positions of a tile.
#pragma once

#include "gemm.h"
#include "vectors.h"

namespace rfa {
namespace {

// out = or += matrix * in, both (K, positions); `row` and `column` are the strides of the matrix.
// `start` (K): initial value of each row if not accumulating; null means zero.
template <typename T>
void mix(const T* in, int64_t in_pitch, int64_t vectors, int64_t K, const T* matrix, int64_t row,
         int64_t column, bool accumulate, const T* start, T* out, int64_t out_pitch) {
  const Panels<T> panels(vectors * Vec<T>::size());
  const int64_t rows = ceil_div(K, ceil_div(K, kRows)); // per block, as even as possible
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int64_t q = panels.start(panel);
    for (int64_t i = 0; i < K; i += rows) {
      row_block<T, kRows>(panels.vectors_of(panel), std::min(rows, K - i), K, matrix + i * row,
                          row, column, in + q, in_pitch, out + i * out_pitch + q, out_pitch,
                          panels.width_of(panel), accumulate, start ? start + i : nullptr);
    }
  }
}

// sums[i * stride + j] += sum over positions of a[i] * b[j], for i >= skip_i and j >= skip_j.
template <typename T, int I, int J>
void multiply_block(const T* a, int64_t a_pitch, const T* b, int64_t b_pitch, int64_t vectors,
                    double* sums, int64_t stride, int64_t skip_i, int64_t skip_j) {
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
    unroll<J>([&](auto j) RFA_INLINE {
      if (i >= skip_i && j >= skip_j) {
        sums[i * stride + j] += horizontal_sum<T>(sum[i][j]);
      }
    });
  });
}

// All blocks of I x J; the last ones overlap their neighbours to stay inside the matrix.
template <typename T, int I, int J>
void multiply_blocks(const T* a, int64_t a_pitch, const T* b, int64_t b_pitch, int64_t vectors,
                     int64_t K, double* sums, bool symmetric) {
  for (int64_t i = 0; i < K; i += I) {
    const int64_t at_i = std::min(i, K - I);
    for (int64_t j = symmetric ? at_i / J * J : 0; j < K; j += J) {
      const int64_t at_j = std::min(j, K - J);
      multiply_block<T, I, J>(a + at_i * a_pitch, a_pitch, b + at_j * b_pitch, b_pitch, vectors,
                              sums + at_i * K + at_j, K, i - at_i, j - at_j);
    }
  }
}

// sums (K, K) += a b', with a and b (K, positions). If symmetric, fills at least the upper
// triangle.
template <typename T>
void multiply(const T* a, int64_t a_pitch, const T* b, int64_t b_pitch, int64_t vectors, int64_t K,
              double* sums, bool symmetric) {
#if defined(CPU_CAPABILITY_AVX512)
  constexpr int side = 5; // 25 accumulators rather than 9
#else
  constexpr int side = 3;
#endif
  auto* blocks = K < side ? &multiply_blocks<T, 1, 1> : &multiply_blocks<T, side, side>;
  if (K == 9) {
    blocks = side == 3 || symmetric ? &multiply_blocks<T, 3, 3> : &multiply_blocks<T, 3, 9>;
  }
  blocks(a, a_pitch, b, b_pitch, vectors, K, sums, symmetric);
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
