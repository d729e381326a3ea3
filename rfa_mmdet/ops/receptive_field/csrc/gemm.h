// A small matrix product over packed panels, on one thread.
//
// C (rows x columns) = or += A (rows x depth) B (depth x columns). B comes in panels of a few
// vectors of columns, [panel][depth][panel width]. Callers produce it in this layout, which saves
// the copy that a library would make. The inner loop reads memory sequentially, with accumulators
// in registers and one panel of B in the L1 cache.
#pragma once

#include <algorithm>

#include "vectors.h"

namespace rfa {
namespace {

// kRows x kVectors registers accumulate, kVectors hold B, and one holds A.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kRows = 8;
#else
constexpr int kRows = 4;
#endif
constexpr int kVectors = 3;

// Split of columns into `count` panels of `width` vectors; the last one has `last`.
template <typename T>
struct Panels {
  int64_t columns, vectors, count, width, last;

  explicit Panels(int64_t columns)
      : columns(columns), vectors(ceil_div(columns, Vec<T>::size())) {
    count = ceil_div(vectors, kVectors);
    width = ceil_div(vectors, count);
    count = ceil_div(vectors, width);
    last = vectors - (count - 1) * width;
  }
  int64_t vectors_of(int64_t panel) const {
    return panel + 1 < count ? width : last;
  }
  int64_t width_of(int64_t panel) const {
    return vectors_of(panel) * Vec<T>::size();
  }
  int64_t start(int64_t panel) const { // first column
    return panel * width * Vec<T>::size();
  }
  int64_t padded() const {
    return vectors * Vec<T>::size();
  }
};

// A, either packed, [rows / kRows][depth][kRows], or row-major.
template <typename T>
struct Left {
  const T* data;
  int64_t row_stride; // 0: packed
};

template <typename T, int R, int N>
void micro_kernel(int64_t depth, const T* a, int64_t a_row, int64_t a_step, const T* b,
                  int64_t b_step, T* c, int64_t ldc, int64_t columns, bool accumulate,
                  const T* init) {
  constexpr int64_t size = Vec<T>::size();
  Vec<T> sum[R][N];
  unroll<R>([&](auto r) RFA_INLINE {
    unroll<N>([&](auto n) RFA_INLINE { sum[r][n] = init ? Vec<T>(init[r]) : Vec<T>(T(0)); });
  });
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> right[N];
    unroll<N>([&](auto n) RFA_INLINE { right[n] = Vec<T>::loadu(b + n * size); });
    unroll<R>([&](auto r) RFA_INLINE {
      const Vec<T> left(a[r * a_row]);
      unroll<N>([&](auto n) RFA_INLINE { sum[r][n] = at::vec::fmadd(left, right[n], sum[r][n]); });
    });
    a += a_step;
    b += b_step;
  }
  const bool whole = columns == N * size;
  const int64_t tail = columns - (N - 1) * size;
  unroll<R>([&](auto r) RFA_INLINE {
    unroll<N>([&](auto n) RFA_INLINE {
      T* out = c + r * ldc + n * size;
      if (n < N - 1 || whole) {
        if (accumulate) {
          sum[r][n] = sum[r][n] + Vec<T>::loadu(out);
        }
        sum[r][n].store(out);
      } else {
        if (accumulate) {
          sum[r][n] = sum[r][n] + Vec<T>::loadu(out, tail);
        }
        sum[r][n].store(out, tail);
      }
    });
  });
}

template <typename T, int R>
void row_block(int64_t vectors, int64_t rows, int64_t depth, const T* a, int64_t a_row,
               int64_t a_step, const T* b, int64_t b_step, T* c, int64_t ldc, int64_t columns,
               bool accumulate, const T* init) {
  if (rows == R) {
    static_assert(kVectors == 3);
    auto* kernel = vectors == 3 ? &micro_kernel<T, R, 3>
        : vectors == 2          ? &micro_kernel<T, R, 2>
                                : &micro_kernel<T, R, 1>;
    kernel(depth, a, a_row, a_step, b, b_step, c, ldc, columns, accumulate, init);
    return;
  }
  if constexpr (R > 1) {
    row_block<T, R - 1>(
        vectors, rows, depth, a, a_row, a_step, b, b_step, c, ldc, columns, accumulate, init);
  }
}

// `init` (rows): initial value of each row if not accumulating; null means zero.
// Writes columns past panels.columns only if `pad`.
template <typename T>
void gemm(int64_t rows, int64_t depth, const Left<T>& left, const T* b, const Panels<T>& panels,
          T* c, int64_t ldc, bool accumulate, const T* init, bool pad) {
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int64_t start = panels.start(panel), width = panels.width_of(panel);
    const int64_t columns = pad ? width : std::min(width, panels.columns - start);
    for (int64_t row = 0; row < rows; row += kRows) {
      const int64_t count = std::min<int64_t>(kRows, rows - row);
      const bool packed = left.row_stride == 0;
      const T* a = left.data + row * (packed ? depth : left.row_stride);
      row_block<T, kRows>(panels.vectors_of(panel), count, depth, a,
                          packed ? 1 : left.row_stride, packed ? count : 1, b + start * depth,
                          width, c + row * ldc + start, ldc, columns, accumulate,
                          init ? init + row : nullptr);
    }
  }
}

} // namespace
} // namespace rfa
