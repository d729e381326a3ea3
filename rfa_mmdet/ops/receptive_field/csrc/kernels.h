// CPU kernels of RFAConv (kernels.cpp), and of RFCBAMConv and RFCAConv (gated.cpp), on raw
// pointers. Compiled once per CPU capability.
#pragma once

#include <cstdint>

namespace rfa {

// Sizes of one call. A window has K = kh * kw positions; the output size is (h, w).
struct Geometry {
  int64_t B, C, H, W, O, groups;
  int64_t kh, kw, sh, sw, ph, pw, dh, dw;
  int64_t h, w;
  int64_t K() const {
    return kh * kw;
  }
};

// The type to compute in for E: float for bfloat16 and float, double for double.
template <typename E>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <typename E>
using Compute = typename ComputeType<E>::type;

// Parameters of the windows, contiguous: attention and shift (C, K), feature (C, K, K).
template <typename T>
struct Window {
  const T* attention;
  const T* feature;
  const T* shift;
  bool relu;
};

// x (B, C, H, W), weight (O, C / groups, K), bias (O) or null, y (B, O, h, w).
template <typename E>
void forward(const Geometry& geometry, const Window<Compute<E>>& window, const E* x,
             const E* weight, const E* bias, E* y);

// Outputs of backward passes, in the compute type; null if not needed.
template <typename T>
struct Gradients {
  T* x; // (B, C, H, W), zero on entry
  T* attention; // (C, K), only for RFAConv
  T* shift; // (C, K); null if products, (C, K, K), is null
  T* products;
  T* weight; // (C * K, weight_stride), transposed in each group; zero on entry
  int64_t weight_stride; // at least weight_columns(O / groups)
};

// O / groups, rounded up to whole vectors and cache lines.
template <typename T>
int64_t weight_columns(int64_t outputs);

template <typename E>
void backward(const Geometry& geometry, const Window<Compute<E>>& window, const E* grad_y,
              const E* x, const E* weight, const Gradients<Compute<E>>& gradients);

// first (C, K): mean of each patch value; second (C, K, K): their covariance. In double.
template <typename E>
void moments(const Geometry& geometry, const E* x, double* first, double* second);

// grad_x += fold(constant + slope patch); slope (C, K, K) is symmetric, constant (C, K).
template <typename E>
void moments_backward(const Geometry& geometry, const E* x, const Compute<E>* slope,
                      const Compute<E>* constant, Compute<E>* grad_x);

// Features of the windows, act(feature window + shift): feature (C, K, K), shift (C, K).
template <typename T>
struct Response {
  const T* feature;
  const T* shift;
  bool relu;
};

// pooled (B, 2, K, h, w): maximum and mean of the features over the channels. largest (B, K, h, w),
// unless null: the first channel with the maximum.
template <typename E>
void pool_channels(const Geometry& geometry, const Response<Compute<E>>& response, const E* x,
                   Compute<E>* pooled, Compute<E>* largest);

// grad (B, 2, K, h, w): gradient of pooled. Writes only x, shift and products of `gradients`.
template <typename E>
void pool_channels_backward(const Geometry& geometry, const Response<Compute<E>>& response,
                            const E* x, const Compute<E>* grad, const Compute<E>* largest,
                            const Gradients<Compute<E>>& gradients);

// Row means, (B, C, kh, h), and column means, (B, C, kw, w), of the windows laid out side by side.
template <typename E>
void pool_coordinates(const Geometry& geometry, const Response<Compute<E>>& response, const E* x,
                      Compute<E>* rows, Compute<E>* columns);

// Writes only x, shift and products of `gradients`.
template <typename E>
void pool_coordinates_backward(const Geometry& geometry, const Response<Compute<E>>& response,
                               const E* x, const Compute<E>* grad_rows,
                               const Compute<E>* grad_columns,
                               const Gradients<Compute<E>>& gradients);

// Two gates that multiply the features: for channels (B, C) and positions (B, K, h, w), or, if
// `of_coordinates`, for rows (B, C, kh, h) and columns (B, C, kw, w).
template <typename T>
struct Gates {
  const T* first;
  const T* second;
  bool of_coordinates;
};

// Like forward, with gates instead of attention.
template <typename E>
void forward_gated(const Geometry& geometry, const Response<Compute<E>>& response,
                   const Gates<Compute<E>>& gates, const E* x, const E* weight, const E* bias,
                   E* y);

// Like backward. grad_first and grad_second are the gradients of the gates, zero on entry.
template <typename E>
void backward_gated(const Geometry& geometry, const Response<Compute<E>>& response,
                    const Gates<Compute<E>>& gates, const E* grad_y, const E* x, const E* weight,
                    const Gradients<Compute<E>>& gradients, Compute<E>* grad_first,
                    Compute<E>* grad_second);

} // namespace rfa
