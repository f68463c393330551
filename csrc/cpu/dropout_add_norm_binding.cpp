#include "cpu/dropout_add_norm.h"

#include "cpu/binding.h"
#include "cpu/dropout_binding.h"

namespace umda {
namespace {

// The inputs in the layout that the kernels take; it owns what had to be copied.
struct Inputs {
  Inputs(const Tensor& x_any, const OptionalTensor& bias_any, const OptionalTensor& gain_any, const Tensor& stream,
         const OptionalTensor& norm_weight_any, const OptionalTensor& seed, int64_t threshold)
      : x(torch::stable::contiguous(x_any)) {
    const int64_t dimensions = x.dim();
    STD_TORCH_CHECK(dimensions >= 1 && x.size(dimensions - 1) >= 1, "x must have a last dimension of at least 1");
    const int64_t width = x.size(dimensions - 1);
    bias = vector(bias_any, width, "bias");
    gain = vector(gain_any, width, "gain");
    norm_weight = vector(norm_weight_any, width, "norm_weight");
    kernel = {x.numel() / width, width, x.const_data_ptr(), storage_type(x, "x"), data(bias), data(gain),
              data(norm_weight), storage_type(stream, "residual"), seed_of(seed, threshold),
              static_cast<int>(threshold)};
  }

  static OptionalTensor vector(const OptionalTensor& any, int64_t width, const char* name) {
    if (!any.has_value()) {
      return std::nullopt;
    }
    check_shape(*any, {width}, name);
    storage_type(*any, name);
    return torch::stable::contiguous(*any);
  }
  static DropoutVector data(const OptionalTensor& t) {
    return t ? DropoutVector{t->const_data_ptr(), storage_type(*t, "a vector")} : DropoutVector{nullptr, DType::float32};
  }

  Tensor x;
  OptionalTensor bias, gain, norm_weight;
  DropoutAddNormInput kernel;
};

std::vector<int64_t> leading(const Tensor& x) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) {
    sizes.push_back(x.size(d));
  }
  return sizes;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dropout_add_norm(
    const Tensor& x_any, const OptionalTensor& bias, const OptionalTensor& gain, const Tensor& residual_any,
    const OptionalTensor& norm_weight, const OptionalTensor& norm_bias_any, const OptionalTensor& seed,
    int64_t threshold, double eps) {
  const Inputs in(x_any, bias, gain, residual_any, norm_weight, seed, threshold);
  check_same_shape(residual_any, in.x, "residual");
  STD_TORCH_CHECK(norm_weight.has_value() == norm_bias_any.has_value(),
                  "norm_weight and norm_bias must both be given, or neither");
  const Tensor residual = torch::stable::contiguous(residual_any);
  const OptionalTensor norm_bias = Inputs::vector(norm_bias_any, in.kernel.width, "norm_bias");
  const bool normed = norm_bias.has_value();
  const std::vector<int64_t> nothing{0}, rows = normed ? leading(in.x) : nothing;
  Tensor sum = torch::stable::new_empty(residual, residual.sizes(), residual.scalar_type());
  Tensor out = normed ? torch::stable::new_empty(in.x, in.x.sizes(), in.x.scalar_type())
                      : torch::stable::new_empty(in.x, nothing, in.x.scalar_type());
  Tensor mean = torch::stable::new_empty(in.x, rows, ScalarType::Float);
  Tensor rstd = torch::stable::new_empty(in.x, rows, ScalarType::Float);
  const DropoutAddNormForward arguments{in.kernel,
                                        residual.const_data_ptr(),
                                        Inputs::data(norm_bias),
                                        static_cast<float>(eps),
                                        sum.mutable_data_ptr(),
                                        normed ? out.mutable_data_ptr() : nullptr,
                                        mean.mutable_data_ptr<float>(),
                                        rstd.mutable_data_ptr<float>()};
  UMDA_CALL_KERNEL(dropout_add_norm_forward, arguments);
  return {sum, out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dropout_add_norm_backward(
    const OptionalTensor& d_sum_any, const OptionalTensor& d_normed_any, const Tensor& x, const OptionalTensor& bias,
    const OptionalTensor& gain, const Tensor& sum_any, const OptionalTensor& norm_weight, const Tensor& mean_any,
    const Tensor& rstd_any, const OptionalTensor& seed, int64_t threshold) {
  const Inputs in(x, bias, gain, sum_any, norm_weight, seed, threshold);
  check_same_shape(sum_any, in.x, "sum");
  const Tensor sum = torch::stable::contiguous(sum_any);
  const auto gradient = [&](const OptionalTensor& t, ScalarType type, const char* name) -> OptionalTensor {
    if (!t.has_value()) {
      return std::nullopt;
    }
    check_type(*t, type, name);
    check_same_shape(*t, in.x, name);
    return torch::stable::contiguous(*t);
  };
  const OptionalTensor d_sum = gradient(d_sum_any, sum.scalar_type(), "d_sum");
  const OptionalTensor d_normed = gradient(d_normed_any, in.x.scalar_type(), "d_normed");
  const Tensor mean = torch::stable::contiguous(mean_any), rstd = torch::stable::contiguous(rstd_any);
  if (d_normed) {
    STD_TORCH_CHECK(in.norm_weight.has_value(), "norm_weight must be given with d_normed");
    for (const auto& [t, name] : {std::pair{&mean, "mean"}, std::pair{&rstd, "rstd"}}) {
      check_type(*t, ScalarType::Float, name);
      STD_TORCH_CHECK(t->numel() == in.kernel.rows, name, " must have ", in.kernel.rows, " elements, got ", t->numel());
    }
  }
  Tensor dx = torch::stable::new_empty(in.x, in.x.sizes(), in.x.scalar_type());
  Tensor d_residual = torch::stable::new_empty(sum, sum.sizes(), sum.scalar_type());
  const auto of = [&](const OptionalTensor& t) {
    return t ? new_tensor(*t, {in.kernel.width}, t->scalar_type()) : new_tensor(in.x, {0}, in.x.scalar_type());
  };
  Tensor d_bias = of(in.bias), d_gain = of(in.gain), d_weight = of(in.norm_weight), d_shift = of(in.norm_weight);
  const auto pointer = [](const OptionalTensor& t, Tensor& to) { return t ? to.mutable_data_ptr() : nullptr; };
  const DropoutAddNormBackward arguments{in.kernel,
                                         d_sum ? d_sum->const_data_ptr() : nullptr,
                                         d_normed ? d_normed->const_data_ptr() : nullptr,
                                         sum.const_data_ptr(),
                                         d_normed ? mean.const_data_ptr<float>() : nullptr,
                                         d_normed ? rstd.const_data_ptr<float>() : nullptr,
                                         dx.mutable_data_ptr(),
                                         d_residual.mutable_data_ptr(),
                                         pointer(in.bias, d_bias),
                                         pointer(in.gain, d_gain),
                                         pointer(in.norm_weight, d_weight),
                                         pointer(in.norm_weight, d_shift)};
  UMDA_CALL_KERNEL(dropout_add_norm_backward, arguments);
  return {dx, d_residual, d_bias, d_gain, d_weight, d_shift};
}

STABLE_TORCH_LIBRARY_IMPL(umda_fast, CPU, m) {
  m.impl("dropout_add_norm", TORCH_BOX(&dropout_add_norm));
  m.impl("dropout_add_norm_backward", TORCH_BOX(&dropout_add_norm_backward));
}

}  // namespace
}  // namespace umda
