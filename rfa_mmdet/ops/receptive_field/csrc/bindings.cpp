// CPU kernels for the operators of torch.ops.rfa_mmdet. ../schema.py defines and documents them.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>
#include <torch/version.h>

#include <array>
#include <optional>

#include "kernels.h"

namespace {

using at::IntArrayRef;
using at::Tensor;
using rfa::Compute;
using rfa::Geometry;
using rfa::Gradients;

#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 3
using c10::optional; // in torch 2.1 a different class, the only one that schemas accept
#else
using std::optional;
#endif

// Within these limits, no size below overflows, and no kernel's buffers outgrow memory.
// layers/arguments.py has the first two as well.
constexpr int64_t kLargest = 1 << 20; // kernel size, stride, padding, dilation
constexpr int64_t kPositions = 1 << 15; // per window
constexpr int64_t kWindows = (int64_t{1} << 31) - 1; // per map

// Arguments are checked, then converted: kernels take contiguous memory, with parameters and sums
// in the compute type. Gradients have the dtype of their input.

Geometry geometry_of(const Tensor& x, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
                     IntArrayRef dilation, int64_t outputs = 0, int64_t groups = 1) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble ||
                       x.scalar_type() == at::kBFloat16,
                   "x: must be float32, float64 or bfloat16, not ", x.scalar_type());
  TORCH_CHECK_VALUE(x.dim() == 4, "x: must be (B, C, H, W), not ", x.sizes());
  TORCH_CHECK_VALUE(x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0, "x of shape ", x.sizes(),
                    ": only the batch may be empty");
  const auto check_pair = [](const char* name, IntArrayRef pair, int64_t least) {
    TORCH_CHECK_VALUE(pair.size() == 2, name, "=", pair, ": must be a pair");
    for (const int64_t value : pair) {
      TORCH_CHECK_VALUE(value >= least && value <= kLargest, name, "=", pair, ": must be at least ",
                        least, " and at most ", kLargest);
    }
  };
  check_pair("kernel_size", kernel, 1);
  check_pair("stride", stride, 1);
  check_pair("padding", padding, 0);
  check_pair("dilation", dilation, 1);
  TORCH_CHECK_VALUE(kernel[0] * kernel[1] <= kPositions, "kernel_size=", kernel,
                    ": must have at most ", kPositions, " positions");
  Geometry g{x.size(0), x.size(1), x.size(2), x.size(3), outputs, groups,
             kernel[0], kernel[1], stride[0], stride[1], padding[0], padding[1],
             dilation[0], dilation[1], 0, 0};
  const int64_t high = g.H + 2 * g.ph - g.dh * (g.kh - 1) - 1;
  const int64_t wide = g.W + 2 * g.pw - g.dw * (g.kw - 1) - 1;
  TORCH_CHECK_VALUE(high >= 0 && wide >= 0, "x of shape ", x.sizes(), " with padding=", padding,
                    " is smaller than the window: kernel_size=", kernel, ", dilation=", dilation);
  g.h = high / g.sh + 1;
  g.w = wide / g.sw + 1;
  TORCH_CHECK_VALUE(g.h <= kWindows / g.w, "x of shape ", x.sizes(), " with padding=", padding,
                    " has ", g.h, " x ", g.w, " windows; at most ", kWindows, " are supported");
  // A single window needs no stride, and buffers grow with the stride.
  g.sh = g.h == 1 ? 1 : g.sh;
  g.sw = g.w == 1 ? 1 : g.sw;
  return g;
}

void check_size(const char* name, const Tensor& t, IntArrayRef size) {
  TORCH_CHECK_VALUE(t.sizes() == size, name, ": must have the shape ", size, ", not ", t.sizes());
}

at::ScalarType compute_type(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

at::TensorOptions compute_options(const Tensor& x) {
  return x.options().dtype(compute_type(x));
}

Tensor converted(const Tensor& t, const Tensor& x) {
  return t.to(compute_type(x)).contiguous();
}

Tensor none(const Tensor& like) {
  return at::empty({0}, like.options());
}

// Does nothing for an empty batch, which a rank may have.
template <typename F>
void dispatch(const Tensor& x, F&& f) {
  if (x.numel() == 0) {
    return;
  }
  switch (x.scalar_type()) {
    case at::kFloat:
      return f(float());
    case at::kDouble:
      return f(double());
    default: // geometry_of rejects all others
      return f(at::BFloat16());
  }
}

// Parameters of features; own the memory that the views point to.
struct Features {
  Tensor feature, shift;
  bool relu;

  Features(const Geometry& g, const Tensor& x, const Tensor& feature_, const Tensor& shift_,
           bool relu_)
      : relu(relu_) {
    check_size("feature", feature_, {g.C * g.K(), 1, g.kh, g.kw});
    check_size("shift", shift_, {g.C * g.K()});
    feature = converted(feature_, x);
    shift = converted(shift_, x);
  }
  template <typename T>
  rfa::Response<T> view() const {
    return {feature.const_data_ptr<T>(), shift.const_data_ptr<T>(), relu};
  }
};

struct AttendedFeatures : Features {
  Tensor attention;

  AttendedFeatures(const Geometry& g, const Tensor& x, const Tensor& attention_,
                   const Tensor& feature_, const Tensor& shift_, bool relu_)
      : Features(g, x, feature_, shift_, relu_) {
    check_size("attention", attention_, {g.C * g.K(), 1, 1, 1});
    attention = converted(attention_, x);
  }
  template <typename T>
  rfa::Window<T> view() const {
    return {attention.const_data_ptr<T>(), feature.const_data_ptr<T>(),
            shift.const_data_ptr<T>(), relu};
  }
};

struct GatePair {
  Tensor first, second;

  GatePair(const Geometry& g, const Tensor& x, const Tensor& first_, const Tensor& second_) {
    if (first_.dim() == 4) {
      check_size("first", first_, {g.B, g.C, g.kh, g.h});
      check_size("second", second_, {g.B, g.C, g.kw, g.w});
    } else {
      check_size("first", first_, {g.B, g.C});
      check_size("second", second_, {g.B, g.K(), g.h, g.w});
    }
    first = converted(first_, x);
    second = converted(second_, x);
  }
  template <typename T>
  rfa::Gates<T> view() const {
    return {first.const_data_ptr<T>(), second.const_data_ptr<T>(), first.dim() == 4};
  }
};

// Weight and bias of the convolution of the features.
struct Convolution {
  Tensor weight, bias;

  Convolution(const Geometry& g, const Tensor& x, const Tensor& weight_,
              const optional<Tensor>& bias_ = {}) {
    TORCH_CHECK_VALUE(g.O > 0, "weight of shape ", weight_.sizes(), ": has no outputs");
    TORCH_CHECK_VALUE(g.groups > 0 && g.C % g.groups == 0 && g.O % g.groups == 0, "groups=",
                      g.groups, ": must divide the channels ", g.C, " and ", g.O);
    check_size("weight", weight_, {g.O, g.C / g.groups, g.kh, g.kw});
    TORCH_CHECK_TYPE(weight_.scalar_type() == x.scalar_type(), "weight: must be ",
                     x.scalar_type(), " as x is, not ", weight_.scalar_type());
    weight = weight_.contiguous();
    if (bias_) {
      check_size("bias", *bias_, {g.O});
      bias = bias_->to(x.scalar_type()).contiguous();
    }
  }
  template <typename E>
  const E* bias_data() const {
    return bias.defined() ? bias.const_data_ptr<E>() : nullptr;
  }
};

// Outputs of a backward pass; empty if not needed.
struct Results {
  const Geometry& g;
  const Tensor& x_like;
  Tensor x, attention, feature, shift, weight;
  int64_t columns = 0;

  Results(const Geometry& g, const Tensor& x_like) : g(g), x_like(x_like) {
    for (Tensor* t : {&x, &attention, &feature, &shift, &weight}) {
      *t = at::empty({0}, compute_options(x_like)); // separate, because results may not alias
    }
  }
  Results& want_features(bool need_x, bool need_features, bool need_attention = false) {
    const auto options = compute_options(x_like);
    if (need_x) {
      x = at::zeros(x_like.sizes(), options);
    }
    if (need_features) {
      shift = at::zeros({g.C * g.K()}, options);
      feature = at::zeros({g.C * g.K(), 1, g.kh, g.kw}, options);
    }
    if (need_attention) {
      attention = at::zeros({g.C * g.K(), 1, 1, 1}, options);
    }
    return *this;
  }
  // Allocates the weight's gradient, transposed and padded as kernels write it.
  Results& want_weight(bool needed) {
    const int64_t outputs = g.O / g.groups;
    columns = x_like.scalar_type() == at::kDouble ? rfa::weight_columns<double>(outputs)
                                                  : rfa::weight_columns<float>(outputs);
    if (needed) {
      weight = at::zeros({g.groups, g.C / g.groups * g.K(), columns}, compute_options(x_like));
    }
    return *this;
  }
  template <typename T>
  Gradients<T> view() const {
    const auto pointer = [](const Tensor& t) { return t.numel() ? t.data_ptr<T>() : nullptr; };
    return {pointer(x), pointer(attention), pointer(shift), pointer(feature), pointer(weight),
            columns};
  }
  // Transposes the weight's gradient back, by squares that stay in cache, unlike torch's copy.
  Tensor weight_gradient() const {
    if (!weight.numel()) {
      return none(x_like);
    }
    const int64_t outputs = g.O / g.groups, rows = g.C / g.groups * g.K(), side = 16;
    const int64_t strips = (outputs + side - 1) / side;
    const std::array<int64_t, 4> shape{g.O, g.C / g.groups, g.kh, g.kw};
    if (!x_like.numel()) { // dispatch does nothing
      return at::zeros(shape, x_like.options());
    }
    Tensor result = at::empty(shape, x_like.options());
    dispatch(x_like, [&](auto e) {
      using E = decltype(e);
      const auto* from = weight.const_data_ptr<Compute<E>>();
      E* const to = result.data_ptr<E>();
      at::parallel_for(0, g.groups * strips, 1, [&](int64_t begin, int64_t end) {
        for (int64_t strip = begin; strip < end; ++strip) {
          const int64_t group = strip / strips, first = strip % strips * side;
          const int64_t last = std::min(first + side, outputs);
          for (int64_t row = 0; row < rows; row += side) {
            for (int64_t o = first; o < last; ++o) {
              for (int64_t r = row; r < std::min(row + side, rows); ++r) {
                to[(group * outputs + o) * rows + r] =
                    static_cast<E>(from[(group * rows + r) * columns + o]);
              }
            }
          }
        }
      });
    });
    return result;
  }
};

std::tuple<Tensor, Tensor> window_moments(const Tensor& x_, IntArrayRef kernel, IntArrayRef stride,
                                          IntArrayRef padding, IntArrayRef dilation) {
  const Geometry g = geometry_of(x_, kernel, stride, padding, dilation);
  const Tensor x = x_.contiguous();
  const auto options = x.options().dtype(at::kDouble);
  Tensor mean = at::zeros({g.C, g.K()}, options);
  Tensor covariance = at::zeros({g.C, g.K(), g.K()}, options);
  dispatch(x, [&](auto e) {
    using E = decltype(e);
    rfa::moments<E>(
        g, x.const_data_ptr<E>(), mean.data_ptr<double>(), covariance.data_ptr<double>());
  });
  return {mean.to(compute_type(x)), covariance.to(compute_type(x))};
}

Tensor window_moments_backward(const Tensor& x_, const Tensor& slope_, const Tensor& constant_,
                               const optional<Tensor>& grad, IntArrayRef kernel,
                               IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation) {
  const Geometry g = geometry_of(x_, kernel, stride, padding, dilation);
  check_size("slope", slope_, {g.C, g.K(), g.K()});
  check_size("constant", constant_, {g.C, g.K()});
  const Tensor x = x_.contiguous();
  const Tensor slope = converted(slope_, x), constant = converted(constant_, x);
  Tensor grad_x = grad ? at::empty(x.sizes(), compute_options(x)).copy_(*grad)
                       : at::zeros(x.sizes(), compute_options(x));
  dispatch(x, [&](auto e) {
    using E = decltype(e);
    using T = Compute<E>;
    rfa::moments_backward<E>(g, x.const_data_ptr<E>(), slope.const_data_ptr<T>(),
                             constant.const_data_ptr<T>(), grad_x.data_ptr<T>());
  });
  return grad_x.to(x.scalar_type());
}

Tensor rfa_conv(const Tensor& x_, const Tensor& attention, const Tensor& feature,
                const Tensor& shift, bool relu, const Tensor& weight, const optional<Tensor>& bias,
                IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                int64_t groups) {
  const Geometry g = geometry_of(x_, kernel, stride, padding, dilation, weight.size(0), groups);
  const Tensor x = x_.contiguous();
  const Convolution conv(g, x, weight, bias);
  const AttendedFeatures features(g, x, attention, feature, shift, relu);
  Tensor y = at::empty({g.B, g.O, g.h, g.w}, x.options());
  dispatch(x, [&](auto e) {
    using E = decltype(e);
    rfa::forward<E>(g, features.view<Compute<E>>(), x.const_data_ptr<E>(),
                    conv.weight.const_data_ptr<E>(), conv.bias_data<E>(), y.data_ptr<E>());
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rfa_conv_backward(
    const Tensor& grad_y_, const Tensor& x_, const Tensor& attention, const Tensor& feature,
    const Tensor& shift, bool relu, const Tensor& weight, std::array<bool, 4> needs,
    IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
    int64_t groups) {
  const Geometry g = geometry_of(x_, kernel, stride, padding, dilation, weight.size(0), groups);
  check_size("grad_y", grad_y_, {g.B, g.O, g.h, g.w});
  const Tensor x = x_.contiguous(), grad_y = grad_y_.to(x.scalar_type()).contiguous();
  const Convolution conv(g, x, weight);
  const AttendedFeatures features(g, x, attention, feature, shift, relu);
  Results found(g, x);
  found.want_features(needs[0], needs[1], needs[1]).want_weight(needs[2]);
  dispatch(x, [&](auto e) {
    using E = decltype(e);
    using T = Compute<E>;
    rfa::backward<E>(g, features.view<T>(), grad_y.const_data_ptr<E>(), x.const_data_ptr<E>(),
                     conv.weight.const_data_ptr<E>(), found.view<T>());
  });
  return {found.x.to(x.scalar_type()), found.attention.to(attention.scalar_type()),
          found.feature.to(feature.scalar_type()), found.shift.to(shift.scalar_type()),
          found.weight_gradient(), needs[3] ? grad_y.sum({0, 2, 3}) : none(x)};
}

std::tuple<Tensor, Tensor> pool_channels(const Tensor& x_, const Tensor& feature,
                                         const Tensor& shift, bool relu, bool indexed,
                                         IntArrayRef kernel, IntArrayRef stride,
                                         IntArrayRef padding, IntArrayRef dilation) {
  const Geometry g = geometry_of(x_, kernel, stride, padding, dilation);
  const Tensor x = x_.contiguous();
  const Features features(g, x, feature, shift, relu);
  const auto options = compute_options(x);
  Tensor pooled = at::empty({g.B, 2, g.K(), g.h, g.w}, options);
  Tensor largest = indexed ? at::empty({g.B, g.K(), g.h, g.w}, options) : at::empty({0}, options);
  dispatch(x, [&](auto e) {
    using E = decltype(e);
    using T = Compute<E>;
    rfa::pool_channels<E>(g, features.view<T>(), x.const_data_ptr<E>(), pooled.data_ptr<T>(),
                          indexed ? largest.data_ptr<T>() : nullptr);
  });
  return {pooled, largest};
}

std::tuple<Tensor, Tensor, Tensor> pool_channels_backward(
    const Tensor& grad_, const Tensor& x_, const Tensor& feature, const Tensor& shift, bool relu,
    const Tensor& largest_, std::array<bool, 2> needs, IntArrayRef kernel, IntArrayRef stride,
    IntArrayRef padding, IntArrayRef dilation) {
  const Geometry g = geometry_of(x_, kernel, stride, padding, dilation);
  check_size("grad", grad_, {g.B, 2, g.K(), g.h, g.w});
  check_size("largest", largest_, {g.B, g.K(), g.h, g.w});
  const Tensor x = x_.contiguous();
  const Tensor grad = converted(grad_, x), largest = converted(largest_, x);
  const Features features(g, x, feature, shift, relu);
  Results found(g, x);
  found.want_features(needs[0], needs[1]);
  dispatch(x, [&](auto e) {
    using E = decltype(e);
    using T = Compute<E>;
    rfa::pool_channels_backward<E>(g, features.view<T>(), x.const_data_ptr<E>(),
                                   grad.const_data_ptr<T>(), largest.const_data_ptr<T>(),
                                   found.view<T>());
  });
  return {found.x.to(x.scalar_type()), found.feature.to(feature.scalar_type()),
          found.shift.to(shift.scalar_type())};
}

std::tuple<Tensor, Tensor> pool_coordinates(const Tensor& x_, const Tensor& feature,
                                            const Tensor& shift, bool relu, IntArrayRef kernel,
                                            IntArrayRef stride, IntArrayRef padding,
                                            IntArrayRef dilation) {
  const Geometry g = geometry_of(x_, kernel, stride, padding, dilation);
  const Tensor x = x_.contiguous();
  const Features features(g, x, feature, shift, relu);
  const auto options = compute_options(x);
  Tensor rows = at::empty({g.B, g.C, g.kh, g.h}, options);
  Tensor columns = at::empty({g.B, g.C, g.kw, g.w}, options);
  dispatch(x, [&](auto e) {
    using E = decltype(e);
    using T = Compute<E>;
    rfa::pool_coordinates<E>(g, features.view<T>(), x.const_data_ptr<E>(), rows.data_ptr<T>(),
                             columns.data_ptr<T>());
  });
  return {rows, columns};
}

std::tuple<Tensor, Tensor, Tensor> pool_coordinates_backward(
    const Tensor& grad_rows_, const Tensor& grad_columns_, const Tensor& x_, const Tensor& feature,
    const Tensor& shift, bool relu, std::array<bool, 2> needs, IntArrayRef kernel,
    IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation) {
  const Geometry g = geometry_of(x_, kernel, stride, padding, dilation);
  check_size("grad_rows", grad_rows_, {g.B, g.C, g.kh, g.h});
  check_size("grad_columns", grad_columns_, {g.B, g.C, g.kw, g.w});
  const Tensor x = x_.contiguous();
  const Tensor grad_rows = converted(grad_rows_, x), grad_columns = converted(grad_columns_, x);
  const Features features(g, x, feature, shift, relu);
  Results found(g, x);
  found.want_features(needs[0], needs[1]);
  dispatch(x, [&](auto e) {
    using E = decltype(e);
    using T = Compute<E>;
    rfa::pool_coordinates_backward<E>(g, features.view<T>(), x.const_data_ptr<E>(),
                                      grad_rows.const_data_ptr<T>(),
                                      grad_columns.const_data_ptr<T>(), found.view<T>());
  });
  return {found.x.to(x.scalar_type()), found.feature.to(feature.scalar_type()),
          found.shift.to(shift.scalar_type())};
}

Tensor gated_conv(const Tensor& x_, const Tensor& feature, const Tensor& shift, bool relu,
                  const Tensor& first, const Tensor& second, const Tensor& weight,
                  const optional<Tensor>& bias, IntArrayRef kernel, IntArrayRef stride,
                  IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  const Geometry g = geometry_of(x_, kernel, stride, padding, dilation, weight.size(0), groups);
  const Tensor x = x_.contiguous();
  const Convolution conv(g, x, weight, bias);
  const GatePair gates(g, x, first, second);
  const Features features(g, x, feature, shift, relu);
  Tensor y = at::empty({g.B, g.O, g.h, g.w}, x.options());
  dispatch(x, [&](auto e) {
    using E = decltype(e);
    using T = Compute<E>;
    rfa::forward_gated<E>(g, features.view<T>(), gates.view<T>(), x.const_data_ptr<E>(),
                          conv.weight.const_data_ptr<E>(), conv.bias_data<E>(), y.data_ptr<E>());
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_conv_backward(
    const Tensor& grad_y_, const Tensor& x_, const Tensor& feature, const Tensor& shift, bool relu,
    const Tensor& first, const Tensor& second, const Tensor& weight, std::array<bool, 4> needs,
    IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
    int64_t groups) {
  const Geometry g = geometry_of(x_, kernel, stride, padding, dilation, weight.size(0), groups);
  check_size("grad_y", grad_y_, {g.B, g.O, g.h, g.w});
  const Tensor x = x_.contiguous(), grad_y = grad_y_.to(x.scalar_type()).contiguous();
  const Convolution conv(g, x, weight);
  const GatePair gates(g, x, first, second);
  const Features features(g, x, feature, shift, relu);
  Results found(g, x);
  found.want_features(needs[0], needs[1]).want_weight(needs[2]);
  Tensor of_first = at::zeros_like(gates.first), of_second = at::zeros_like(gates.second);
  dispatch(x, [&](auto e) {
    using E = decltype(e);
    using T = Compute<E>;
    rfa::backward_gated<E>(g, features.view<T>(), gates.view<T>(), grad_y.const_data_ptr<E>(),
                           x.const_data_ptr<E>(), conv.weight.const_data_ptr<E>(),
                           found.view<T>(), of_first.data_ptr<T>(), of_second.data_ptr<T>());
  });
  return {found.x.to(x.scalar_type()), found.feature.to(feature.scalar_type()),
          found.shift.to(shift.scalar_type()), of_first.to(first.scalar_type()),
          of_second.to(second.scalar_type()), found.weight_gradient(),
          needs[3] ? grad_y.sum({0, 2, 3}) : none(x)};
}

} // namespace

TORCH_LIBRARY_IMPL(rfa_mmdet, CPU, m) {
  m.impl("window_moments", &window_moments);
  m.impl("window_moments_backward", &window_moments_backward);
  m.impl("rfa_conv", &rfa_conv);
  m.impl("rfa_conv_backward", &rfa_conv_backward);
  m.impl("pool_channels", &pool_channels);
  m.impl("pool_channels_backward", &pool_channels_backward);
  m.impl("pool_coordinates", &pool_coordinates);
  m.impl("pool_coordinates_backward", &pool_coordinates_backward);
  m.impl("gated_conv", &gated_conv);
  m.impl("gated_conv_backward", &gated_conv_backward);
}
