// The kernels as operators on tensors, rfa_mmdet_cpu::forward and its like. Shapes, and what each
// computes, stand in ../cpu.py.

#include <ATen/ATen.h>
#include <torch/library.h>

#include <array>

#include "kernels.h"

namespace {

using at::IntArrayRef;
using at::Tensor;
using rfa::Compute;
using rfa::Geometry;

Geometry geometry_of(const Tensor& x, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
                     IntArrayRef dilation, int64_t outputs = 0, int64_t groups = 1) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble ||
                       x.scalar_type() == at::kBFloat16,
                   "x: must be float32, float64 or bfloat16, not ", x.scalar_type());
  TORCH_CHECK_VALUE(x.dim() == 4, "x: must be (B, C, H, W), not ", x.sizes());
  TORCH_CHECK_VALUE(x.numel() > 0, "x of shape ", x.sizes(), ": must not be empty");
  for (const auto& pair : {kernel, stride, padding, dilation}) {
    TORCH_CHECK_VALUE(pair.size() == 2, "kernel_size, stride, padding and dilation: must be pairs");
  }
  TORCH_CHECK_VALUE(kernel[0] > 0 && kernel[1] > 0 && stride[0] > 0 && stride[1] > 0 &&
                        dilation[0] > 0 && dilation[1] > 0,
                    "kernel_size=", kernel, ", stride=", stride, ", dilation=", dilation,
                    ": must be at least 1");
  TORCH_CHECK_VALUE(padding[0] >= 0 && padding[1] >= 0, "padding=", padding,
                    ": must be at least 0");
  Geometry g{x.size(0), x.size(1), x.size(2), x.size(3), outputs, groups,
             kernel[0], kernel[1], stride[0], stride[1], padding[0], padding[1],
             dilation[0], dilation[1], 0, 0};
  const int64_t high = g.H + 2 * g.ph - g.dh * (g.kh - 1) - 1;
  const int64_t wide = g.W + 2 * g.pw - g.dw * (g.kw - 1) - 1;
  TORCH_CHECK_VALUE(high >= 0 && wide >= 0, "x of shape ", x.sizes(), " with padding=", padding,
                    " is smaller than the window: kernel_size=", kernel, ", dilation=", dilation);
  g.h = high / g.sh + 1;
  g.w = wide / g.sw + 1;
  return g;
}

void check_size(const char* name, const Tensor& t, IntArrayRef size) {
  TORCH_CHECK_VALUE(t.sizes() == size, name, ": must have the shape ", size, ", not ", t.sizes());
}

at::ScalarType compute_type(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

template <typename F>
void dispatch(const Tensor& x, F&& f) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return f(float());
    case at::kDouble:
      return f(double());
    default: // geometry_of lets no other pass
      return f(at::BFloat16());
  }
}

// Parameters as the kernels want them; they hold the memory that `view` points to.
struct Parameters {
  Tensor attention, feature, scale, shift;
  bool relu;

  Parameters(const Geometry& g, const Tensor& x, const Tensor& attention_,
             const std::optional<Tensor>& feature_, const Tensor& scale_, const Tensor& shift_,
             bool relu_)
      : relu(relu_) {
    const auto type = compute_type(x);
    const int64_t K = g.K();
    check_size("attention", attention_, {g.C, K});
    check_size("scale", scale_, {g.C, K});
    check_size("shift", shift_, {g.C, K});
    attention = attention_.to(type).contiguous();
    scale = scale_.to(type).contiguous();
    shift = shift_.to(type).contiguous();
    if (feature_) {
      check_size("feature", *feature_, {g.C, K, K});
      feature = feature_->to(type).contiguous();
    } else {
      feature = at::eye(K, scale.options()).expand({g.C, K, K}).contiguous();
    }
  }
  template <typename T>
  rfa::Window<T> view() const {
    return {attention.const_data_ptr<T>(), feature.const_data_ptr<T>(), scale.const_data_ptr<T>(),
            shift.const_data_ptr<T>(), relu};
  }
};

void check_weight(const Geometry& g, const Tensor& x, const Tensor& weight, int64_t groups) {
  TORCH_CHECK_VALUE(groups > 0 && g.C % groups == 0 && g.O % groups == 0, "groups=", groups,
                    ": must divide the channels ", g.C, " and ", g.O);
  check_size("weight", weight, {g.O, g.C / groups, g.K()});
  TORCH_CHECK_TYPE(weight.scalar_type() == x.scalar_type(), "weight: must be ", x.scalar_type(),
                   " as x is, not ", weight.scalar_type());
}

// The gradient of the weight as the kernels write it, transposed and padded, and as it is given.
struct WeightGradient {
  int64_t columns;
  Tensor transposed; // empty: not wanted

  WeightGradient(const Geometry& g, const Tensor& x, bool wanted) {
    const int64_t outputs = g.O / g.groups;
    columns = x.scalar_type() == at::kDouble ? rfa::weight_columns<double>(outputs)
                                             : rfa::weight_columns<float>(outputs);
    const auto options = x.options().dtype(compute_type(x));
    transposed = wanted ? at::zeros({g.groups, g.C / g.groups * g.K(), columns}, options)
                        : at::empty({0}, options);
  }
  template <typename T>
  T* pointer() const {
    return transposed.numel() ? transposed.data_ptr<T>() : nullptr;
  }
  Tensor finish(const Geometry& g, const Tensor& x) const {
    if (!transposed.numel()) {
      return transposed;
    }
    return transposed.narrow(2, 0, g.O / g.groups)
        .transpose(1, 2)
        .to(x.scalar_type())
        .reshape({g.O, g.C / g.groups, g.K()})
        .contiguous();
  }
};

std::tuple<Tensor, Tensor> moments(const Tensor& x_, IntArrayRef kernel, IntArrayRef stride,
                                   IntArrayRef padding, IntArrayRef dilation) {
  const Geometry g = geometry_of(x_, kernel, stride, padding, dilation);
  const Tensor x = x_.contiguous();
  const auto options = x.options().dtype(at::kDouble);
  Tensor first = at::empty({g.C, g.K()}, options), second = at::empty({g.C, g.K(), g.K()}, options);
  dispatch(x, [&](auto e) {
    using E = decltype(e);
    rfa::moments<E>(g, x.const_data_ptr<E>(), first.data_ptr<double>(), second.data_ptr<double>());
  });
  return {first.to(compute_type(x)), second.to(compute_type(x))};
}

Tensor forward(const Tensor& x_, const Tensor& attention, const std::optional<Tensor>& feature,
               const Tensor& scale, const Tensor& shift, bool relu, const Tensor& weight_,
               const std::optional<Tensor>& bias_, IntArrayRef kernel, IntArrayRef stride,
               IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  const Geometry g =
      geometry_of(x_, kernel, stride, padding, dilation, weight_.size(0), groups);
  check_weight(g, x_, weight_, groups);
  const Tensor x = x_.contiguous(), weight = weight_.contiguous();
  const Parameters parameters(g, x, attention, feature, scale, shift, relu);
  Tensor bias;
  if (bias_) {
    check_size("bias", *bias_, {g.O});
    bias = bias_->to(x.scalar_type()).contiguous();
  }
  Tensor y = at::empty({g.B, g.O, g.h, g.w}, x.options());
  dispatch(x, [&](auto e) {
    using E = decltype(e);
    rfa::forward<E>(g, parameters.view<Compute<E>>(), x.const_data_ptr<E>(),
                    weight.const_data_ptr<E>(), bias_ ? bias.const_data_ptr<E>() : nullptr,
                    y.data_ptr<E>());
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_y_, const Tensor& x_, const Tensor& attention,
    const std::optional<Tensor>& feature, const Tensor& scale, const Tensor& shift, bool relu,
    const Tensor& weight_, std::array<bool, 4> needs, IntArrayRef kernel, IntArrayRef stride,
    IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  const Geometry g =
      geometry_of(x_, kernel, stride, padding, dilation, weight_.size(0), groups);
  check_weight(g, x_, weight_, groups);
  check_size("grad_y", grad_y_, {g.B, g.O, g.h, g.w});
  const Tensor x = x_.contiguous(), weight = weight_.contiguous();
  const Tensor grad_y = grad_y_.to(x.scalar_type()).contiguous();
  const Parameters parameters(g, x, attention, feature, scale, shift, relu);
  const auto options = x.options().dtype(compute_type(x));
  const Tensor none = at::empty({0}, options);
  Tensor dx = needs[0] ? at::zeros(x.sizes(), options) : none;
  Tensor d_attention = needs[1] ? at::empty({g.C, g.K()}, options) : none;
  Tensor d_shift = needs[1] ? at::empty({g.C, g.K()}, options) : none;
  Tensor products = needs[1] ? at::empty({g.C, g.K(), g.K()}, options) : none;
  const WeightGradient of_weight(g, x, needs[2]);
  dispatch(x, [&](auto e) {
    using E = decltype(e);
    using T = Compute<E>;
    const auto pointer = [](const Tensor& t, bool wanted) {
      return wanted ? t.data_ptr<T>() : nullptr;
    };
    const rfa::Gradients<T> gradients{pointer(dx, needs[0]), pointer(d_attention, needs[1]),
                                      pointer(d_shift, needs[1]), pointer(products, needs[1]),
                                      of_weight.pointer<T>(), of_weight.columns};
    rfa::backward<E>(g, parameters.view<T>(), grad_y.const_data_ptr<E>(), x.const_data_ptr<E>(),
                     weight.const_data_ptr<E>(), gradients);
  });
  const Tensor d_weight = of_weight.finish(g, x);
  Tensor d_bias = needs[3] ? grad_y.sum({0, 2, 3}) : none;
  return {dx, d_attention, d_shift, products, d_weight, d_bias};
}

void correct_input_gradient(Tensor& grad_x, const Tensor& x_, const Tensor& Q_,
                            const Tensor& constant_, IntArrayRef kernel, IntArrayRef stride,
                            IntArrayRef padding, IntArrayRef dilation) {
  const Geometry g = geometry_of(x_, kernel, stride, padding, dilation);
  check_size("grad_x", grad_x, x_.sizes());
  check_size("Q", Q_, {g.C, g.K(), g.K()});
  check_size("constant", constant_, {g.C, g.K()});
  const auto type = compute_type(x_);
  TORCH_CHECK_VALUE(grad_x.is_contiguous() && grad_x.scalar_type() == type,
                    "grad_x: must be a contiguous ", type);
  const Tensor x = x_.contiguous(), Q = Q_.to(type).contiguous();
  const Tensor constant = constant_.to(type).contiguous();
  dispatch(x, [&](auto e) {
    using E = decltype(e);
    using T = Compute<E>;
    rfa::correct_input_gradient<E>(g, x.const_data_ptr<E>(), Q.const_data_ptr<T>(),
                                   constant.const_data_ptr<T>(), grad_x.data_ptr<T>());
  });
}

// The parameters of features without an attention; they hold the memory that `view` points to.
struct Features {
  Tensor feature, shift;
  bool relu;

  Features(const Geometry& g, const Tensor& x, const Tensor& feature_, const Tensor& shift_,
           bool relu_)
      : relu(relu_) {
    check_size("feature", feature_, {g.C, g.K(), g.K()});
    check_size("shift", shift_, {g.C, g.K()});
    feature = feature_.to(compute_type(x)).contiguous();
    shift = shift_.to(compute_type(x)).contiguous();
  }
  template <typename T>
  rfa::Response<T> view() const {
    return {feature.const_data_ptr<T>(), shift.const_data_ptr<T>(), relu};
  }
};

// Gradients of the features' parameters and the input, where they are wanted; else empty.
struct FeatureGradients {
  Tensor x, shift, products;

  FeatureGradients(const Geometry& g, const Tensor& like, bool need_x, bool need_window) {
    const auto options = like.options().dtype(compute_type(like));
    const Tensor none = at::empty({0}, options);
    x = need_x ? at::zeros(like.sizes(), options) : none;
    shift = need_window ? at::empty({g.C, g.K()}, options) : none;
    products = need_window ? at::empty({g.C, g.K(), g.K()}, options) : none;
  }
  template <typename T>
  rfa::Gradients<T> view() const {
    const auto pointer = [](const Tensor& t) { return t.numel() ? t.data_ptr<T>() : nullptr; };
    return {pointer(x), nullptr, pointer(shift), pointer(products), nullptr, 0};
  }
};

std::tuple<Tensor, Tensor> pool_channels(const Tensor& x_, const Tensor& feature,
                                         const Tensor& shift, bool relu, bool indexed,
                                         IntArrayRef kernel, IntArrayRef stride,
                                         IntArrayRef padding, IntArrayRef dilation) {
  const Geometry g = geometry_of(x_, kernel, stride, padding, dilation);
  const Tensor x = x_.contiguous();
  const Features features(g, x, feature, shift, relu);
  const auto options = x.options().dtype(compute_type(x));
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
  const Tensor x = x_.contiguous(), grad = grad_.to(compute_type(x)).contiguous();
  const Tensor largest = largest_.to(compute_type(x)).contiguous();
  const Features features(g, x, feature, shift, relu);
  const FeatureGradients found(g, x, needs[0], needs[1]);
  dispatch(x, [&](auto e) {
    using E = decltype(e);
    using T = Compute<E>;
    rfa::pool_channels_backward<E>(g, features.view<T>(), x.const_data_ptr<E>(),
                                   grad.const_data_ptr<T>(), largest.const_data_ptr<T>(),
                                   found.view<T>());
  });
  return {found.x, found.shift, found.products};
}

std::tuple<Tensor, Tensor> pool_coordinates(const Tensor& x_, const Tensor& feature,
                                            const Tensor& shift, bool relu, IntArrayRef kernel,
                                            IntArrayRef stride, IntArrayRef padding,
                                            IntArrayRef dilation) {
  const Geometry g = geometry_of(x_, kernel, stride, padding, dilation);
  const Tensor x = x_.contiguous();
  const Features features(g, x, feature, shift, relu);
  const auto options = x.options().dtype(compute_type(x));
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
  const Tensor grad_rows = grad_rows_.to(compute_type(x)).contiguous();
  const Tensor grad_columns = grad_columns_.to(compute_type(x)).contiguous();
  const Features features(g, x, feature, shift, relu);
  const FeatureGradients found(g, x, needs[0], needs[1]);
  dispatch(x, [&](auto e) {
    using E = decltype(e);
    using T = Compute<E>;
    rfa::pool_coordinates_backward<E>(g, features.view<T>(), x.const_data_ptr<E>(),
                                      grad_rows.const_data_ptr<T>(),
                                      grad_columns.const_data_ptr<T>(), found.view<T>());
  });
  return {found.x, found.shift, found.products};
}

// The gates as the kernels want them; they hold the memory that `view` points to.
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
    first = first_.to(compute_type(x)).contiguous();
    second = second_.to(compute_type(x)).contiguous();
  }
  template <typename T>
  rfa::Gates<T> view() const {
    return {first.const_data_ptr<T>(), second.const_data_ptr<T>(), first.dim() == 4};
  }
};

Tensor forward_gated(const Tensor& x_, const Tensor& feature, const Tensor& shift, bool relu,
                     const Tensor& first_, const Tensor& second_, const Tensor& weight_,
                     const std::optional<Tensor>& bias_, IntArrayRef kernel, IntArrayRef stride,
                     IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  const Geometry g =
      geometry_of(x_, kernel, stride, padding, dilation, weight_.size(0), groups);
  check_weight(g, x_, weight_, groups);
  const Tensor x = x_.contiguous(), weight = weight_.contiguous();
  const GatePair gates(g, x, first_, second_);
  const Features features(g, x, feature, shift, relu);
  Tensor bias;
  if (bias_) {
    check_size("bias", *bias_, {g.O});
    bias = bias_->to(x.scalar_type()).contiguous();
  }
  Tensor y = at::empty({g.B, g.O, g.h, g.w}, x.options());
  dispatch(x, [&](auto e) {
    using E = decltype(e);
    using T = Compute<E>;
    rfa::forward_gated<E>(g, features.view<T>(), gates.view<T>(), x.const_data_ptr<E>(),
                          weight.const_data_ptr<E>(),
                          bias_ ? bias.const_data_ptr<E>() : nullptr, y.data_ptr<E>());
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward_gated(
    const Tensor& grad_y_, const Tensor& x_, const Tensor& feature, const Tensor& shift, bool relu,
    const Tensor& first_, const Tensor& second_, const Tensor& weight_, std::array<bool, 4> needs,
    IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
    int64_t groups) {
  const Geometry g =
      geometry_of(x_, kernel, stride, padding, dilation, weight_.size(0), groups);
  check_weight(g, x_, weight_, groups);
  check_size("grad_y", grad_y_, {g.B, g.O, g.h, g.w});
  const Tensor x = x_.contiguous(), weight = weight_.contiguous();
  const Tensor grad_y = grad_y_.to(x.scalar_type()).contiguous();
  const GatePair gates(g, x, first_, second_);
  const Features features(g, x, feature, shift, relu);
  const FeatureGradients found(g, x, needs[0], needs[1]);
  Tensor grad_first = at::zeros_like(gates.first), grad_second = at::zeros_like(gates.second);
  const WeightGradient of_weight(g, x, needs[2]);
  dispatch(x, [&](auto e) {
    using E = decltype(e);
    using T = Compute<E>;
    auto gradients = found.view<T>();
    gradients.weight = of_weight.pointer<T>();
    gradients.weight_stride = of_weight.columns;
    rfa::backward_gated<E>(g, features.view<T>(), gates.view<T>(), grad_y.const_data_ptr<E>(),
                           x.const_data_ptr<E>(), weight.const_data_ptr<E>(), gradients,
                           grad_first.data_ptr<T>(), grad_second.data_ptr<T>());
  });
  const Tensor d_weight = of_weight.finish(g, x);
  Tensor d_bias = needs[3] ? grad_y.sum({0, 2, 3}) : at::empty({0}, x.options());
  return {found.x, found.shift, found.products, grad_first, grad_second, d_weight, d_bias};
}

} // namespace

TORCH_LIBRARY(rfa_mmdet_cpu, m) {
  m.def("moments(Tensor x, int[] kernel_size, int[] stride, int[] padding, int[] dilation) -> "
        "(Tensor, Tensor)");
  m.def("forward(Tensor x, Tensor attention, Tensor? feature, Tensor scale, Tensor shift, "
        "bool relu, Tensor weight, Tensor? bias, int[] kernel_size, int[] stride, int[] padding, "
        "int[] dilation, int groups) -> Tensor");
  m.def("backward(Tensor grad_y, Tensor x, Tensor attention, Tensor? feature, Tensor scale, "
        "Tensor shift, bool relu, Tensor weight, bool[4] needs, int[] kernel_size, int[] stride, "
        "int[] padding, int[] dilation, int groups) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("correct_input_gradient(Tensor(a!) grad_x, Tensor x, Tensor Q, Tensor constant, "
        "int[] kernel_size, int[] stride, int[] padding, int[] dilation) -> ()");
  m.def("pool_channels(Tensor x, Tensor feature, Tensor shift, bool relu, bool indexed, "
        "int[] kernel_size, int[] stride, int[] padding, int[] dilation) -> (Tensor, Tensor)");
  m.def("pool_channels_backward(Tensor grad, Tensor x, Tensor feature, Tensor shift, bool relu, "
        "Tensor largest, bool[2] needs, int[] kernel_size, int[] stride, int[] padding, "
        "int[] dilation) -> (Tensor, Tensor, Tensor)");
  m.def("pool_coordinates(Tensor x, Tensor feature, Tensor shift, bool relu, int[] kernel_size, "
        "int[] stride, int[] padding, int[] dilation) -> (Tensor, Tensor)");
  m.def("pool_coordinates_backward(Tensor grad_rows, Tensor grad_columns, Tensor x, "
        "Tensor feature, Tensor shift, bool relu, bool[2] needs, int[] kernel_size, int[] stride, "
        "int[] padding, int[] dilation) -> (Tensor, Tensor, Tensor)");
  m.def("forward_gated(Tensor x, Tensor feature, Tensor shift, bool relu, Tensor first, "
        "Tensor second, Tensor weight, Tensor? bias, int[] kernel_size, int[] stride, "
        "int[] padding, int[] dilation, int groups) -> Tensor");
  m.def("backward_gated(Tensor grad_y, Tensor x, Tensor feature, Tensor shift, bool relu, "
        "Tensor first, Tensor second, Tensor weight, bool[4] needs, int[] kernel_size, "
        "int[] stride, int[] padding, int[] dilation, int groups) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(rfa_mmdet_cpu, CPU, m) {
  m.impl("moments", &moments);
  m.impl("forward", &forward);
  m.impl("backward", &backward);
  m.impl("correct_input_gradient", &correct_input_gradient);
  m.impl("pool_channels", &pool_channels);
  m.impl("pool_channels_backward", &pool_channels_backward);
  m.impl("pool_coordinates", &pool_coordinates);
  m.impl("pool_coordinates_backward", &pool_coordinates_backward);
  m.impl("forward_gated", &forward_gated);
  m.impl("backward_gated", &backward_gated);
}
