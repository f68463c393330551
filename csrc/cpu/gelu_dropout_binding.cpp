#include "cpu/gelu_dropout.h"

#include "cpu/binding.h"
#include "cpu/dropout_binding.h"

namespace umda {
namespace {

// The inputs in the layout that the kernels take; it owns what had to be copied.
struct Inputs {
  Inputs(const Tensor& x_any, const OptionalTensor& bias_any, const OptionalTensor& seed, int64_t threshold)
      : x(torch::stable::contiguous(x_any)) {
    const int64_t dimensions = x.dim();
    STD_TORCH_CHECK(dimensions >= 1 && x.size(dimensions - 1) >= 1, "x must have a last dimension of at least 1");
    const int64_t width = x.size(dimensions - 1);
    kernel = {x.numel() / width, width, x.const_data_ptr(), storage_type(x, "x"), nullptr, DType::float32,
              seed_of(seed, threshold), static_cast<int>(threshold)};
    if (bias_any.has_value()) {
      check_shape(*bias_any, {width}, "bias");
      bias = torch::stable::contiguous(*bias_any);
      kernel.bias = bias->const_data_ptr();
      kernel.bias_type = storage_type(*bias, "bias");
    }
  }

  Tensor x;
  OptionalTensor bias;
  GeluDropoutInput kernel;
};

Tensor gelu_dropout(const Tensor& x, const OptionalTensor& bias, const OptionalTensor& seed, int64_t threshold) {
  const Inputs inputs(x, bias, seed, threshold);
  Tensor y = torch::stable::new_empty(x, inputs.x.sizes(), x.scalar_type());
  UMDA_CALL_KERNEL(gelu_dropout_forward, {inputs.kernel, y.mutable_data_ptr()});
  return y;
}

std::tuple<Tensor, Tensor> gelu_dropout_backward(const Tensor& d_y_any, const Tensor& x, const OptionalTensor& bias,
                                                 const OptionalTensor& seed, int64_t threshold) {
  const Inputs inputs(x, bias, seed, threshold);
  check_type(d_y_any, x.scalar_type(), "d_y");
  check_same_shape(d_y_any, inputs.x, "d_y");
  const Tensor d_y = torch::stable::contiguous(d_y_any);
  Tensor dx = torch::stable::new_empty(x, inputs.x.sizes(), x.scalar_type());
  Tensor d_bias = inputs.bias ? new_tensor(*inputs.bias, {inputs.kernel.width}, inputs.bias->scalar_type())
                              : new_tensor(x, {0}, x.scalar_type());
  const GeluDropoutBackward arguments{inputs.kernel, d_y.const_data_ptr(), dx.mutable_data_ptr(),
                                      inputs.bias ? d_bias.mutable_data_ptr() : nullptr};
  UMDA_CALL_KERNEL(gelu_dropout_backward, arguments);
  return {dx, d_bias};
}

STABLE_TORCH_LIBRARY_IMPL(umda_fast, CPU, m) {
  m.impl("gelu_dropout", TORCH_BOX(&gelu_dropout));
  m.impl("gelu_dropout_backward", TORCH_BOX(&gelu_dropout_backward));
}

}  // namespace
}  // namespace umda
