// bfloat16 matrix products with the processor's instructions for them, through PyTorch's oneDNN
// (brgemm). Torch 2.1 has none; later versions define a macro.
//
// A is stored by rows, B by pairs of rows, [depth / 2][column]; sums are float32. All rows start on
// a cache line, and A and B are zero-padded to whole lines of depth; otherwise the products take
// five times as long. Rows of C are whole vectors.
#pragma once

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <exception>

#include "vectors.h"

namespace rfa {
namespace {

using Half = c10::BFloat16;
using Pair = uint32_t; // the bits of two, the first in the lower half
constexpr int64_t kLine = 32; // values per cache line

inline int64_t whole_lines(int64_t n) {
  return ceil_div(n, kLine) * kLine;
}

// C (rows x columns) = or += A B; may write up to 15 more columns.
inline void multiply_halves(int64_t rows, int64_t columns, int64_t depth, const Half* a,
                            int64_t lda, const Pair* b, int64_t ldb, float* c, int64_t ldc,
                            bool accumulate) {
#ifdef CPUBLAS_BRGEMM_BF16BF16F32
  constexpr int64_t most = 64; // oneDNN compiles a kernel for each number of columns
  for (int64_t q = 0; q < columns; q += most) {
    at::native::cpublas::brgemm(rows, std::min(most, ceil_div(columns - q, 16) * 16), depth, lda,
                                ldb, ldc, accumulate, a, reinterpret_cast<const Half*>(b + q),
                                c + q);
  }
#endif
}

// Each thread that multiplies holds one: it resets the registers that oneDNN configures.
struct HalvesScope {
  ~HalvesScope() {
#ifdef CPUBLAS_BRGEMM_BF16BF16F32
    at::native::cpublas::brgemm_release();
#endif
  }
};

// Whether this processor and library support these products.
inline bool can_multiply_halves() {
#ifdef CPUBLAS_BRGEMM_BF16BF16F32
  static const auto works = [] { // oneDNN throws if the processor lacks the instructions
    try {
      const Buffer<Half> a(kLine);
      const Buffer<Pair> b(kLine / 2 * 16);
      const Buffer<float> c(16);
      const HalvesScope scope;
      multiply_halves(1, 16, kLine, a.get(), kLine, b.get(), 16, c.get(), 16, false);
      return true;
    } catch (const std::exception&) {
      return false;
    }
  };
  if (!at::globalContext().userEnabledMkldnn()) { // torch.backends.mkldnn
    return false;
  }
  static const bool found = works();
  return found;
#else
  return false;
#endif
}

// The bits of a float whose upper half is the nearest bfloat16. NaN stays NaN.
inline uint32_t rounded_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return value == value ? bits + 0x8000 : bits | 0x400000;
}

inline void store_halves(const float* in, int64_t n, Half* out) {
  for (int64_t q = 0; q < n; ++q) {
    out[q].x = rounded_bits(in[q]) >> 16;
  }
}

// Writes rows `first` to `first + rows` of a matrix of pairs. A pair's first row clears its second.
inline void store_pairs(const float* in, int64_t in_pitch, int64_t first, int64_t rows,
                        int64_t columns, Pair* out, int64_t out_pitch) {
  for (int64_t row = first; row < first + rows; in += in_pitch) {
    Pair* const to = out + row / 2 * out_pitch;
    if (row % 2) { // the pair's first is already there
      for (int64_t q = 0; q < columns; ++q) {
        to[q] |= rounded_bits(in[q]) & 0xffff0000;
      }
      row += 1;
    } else if (row + 1 == first + rows) {
      for (int64_t q = 0; q < columns; ++q) {
        to[q] = rounded_bits(in[q]) >> 16;
      }
      row += 1;
    } else {
      const float* const below = in + in_pitch;
      for (int64_t q = 0; q < columns; ++q) {
        to[q] = rounded_bits(in[q]) >> 16 | (rounded_bits(below[q]) & 0xffff0000);
      }
      row += 2;
      in += in_pitch;
    }
  }
}

} // namespace
} // namespace rfa
