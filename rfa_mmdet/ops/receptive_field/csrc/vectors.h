// Short names for at::vec, and the vector functions that it lacks.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

// For lambdas: their captures stay in registers only if they are inlined.
#define RFA_INLINE __attribute__((always_inline))

namespace rfa {
namespace {

template <typename T>
using Vec = at::vec::Vectorized<T>;

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

template <typename T>
inline int64_t round_up(int64_t n) {
  return ceil_div(n, Vec<T>::size()) * Vec<T>::size();
}

// Calls f(0) ... f(N - 1) with compile-time constants, so that small arrays stay in registers.
template <typename F, int... I>
RFA_INLINE inline void unroll_over(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, typename F>
RFA_INLINE inline void unroll(F&& f) {
  unroll_over(f, std::make_integer_sequence<int, N>{});
}

// Memory aligned to a cache line. Pass zero = false if all of it is overwritten.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count, bool zero = true) {
    // One extra vector, because some loops read and write past the end by less than that.
    const size_t bytes = ((count + 16) * sizeof(T) + 63) / 64 * 64;
    data_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
    if (!data_) {
      throw std::bad_alloc();
    }
    if (zero) {
      std::memset(static_cast<void*>(data_.get()), 0, bytes);
    }
  }
  T* get() const {
    return data_.get();
  }

 private:
  struct Free {
    void operator()(T* p) const {
      std::free(p);
    }
  };
  std::unique_ptr<T, Free> data_;
};

template <typename T>
inline T horizontal_sum(const Vec<T>& v) {
  alignas(64) T lanes[Vec<T>::size()];
  v.store(lanes);
  for (int half = Vec<T>::size() / 2; half; half /= 2) {
    for (int i = 0; i < half; ++i) {
      lanes[i] += lanes[i + half];
    }
  }
  return lanes[0];
}
#if defined(CPU_CAPABILITY_AVX512)
template <>
inline float horizontal_sum(const Vec<float>& v) {
  return _mm512_reduce_add_ps(v);
}
#endif

// 2^y for y <= 0, to 2 units in the last place; below 2^-126, some number of that size or 0.
inline Vec<double> exp2_nonpositive(const Vec<double>& y) {
  return y.exp2();
}
inline Vec<float> exp2_nonpositive(const Vec<float>& y) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512 n = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec<float> f = _mm512_sub_ps(y, n);
#else
  const Vec<float> z = at::vec::clamp_min(y, Vec<float>(-126.f));
  const Vec<float> n = z.round();
  const Vec<float> f = z - n;
#endif
  // The polynomial nearest to 2^f over [-1/2, 1/2] that is 1 at 0, relative error below 1e-7.
  Vec<float> p(1.32647e-3f);
  p = at::vec::fmadd(p, f, Vec<float>(9.67151e-3f));
  p = at::vec::fmadd(p, f, Vec<float>(5.550734e-2f));
  p = at::vec::fmadd(p, f, Vec<float>(2.4022242e-1f));
  p = at::vec::fmadd(p, f, Vec<float>(6.9314698e-1f));
  p = at::vec::fmadd(p, f, Vec<float>(1.f));
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_scalef_ps(p, n);
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return p * Vec<float>(_mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
#else
  alignas(64) float lanes[Vec<float>::size()];
  n.store(lanes);
  for (auto& lane : lanes) {
    lane = std::ldexp(1.f, static_cast<int>(lane));
  }
  return p * Vec<float>::loadu(lanes);
#endif
}

} // namespace
} // namespace rfa
