#include "cpu/cross_view.h"

#include "cpu/binding.h"

namespace umda {
namespace {

CrossViewRows rows(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

// The inputs in the layout that the kernels take; it owns what had to be copied.
struct Inputs {
  Inputs(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any, const Tensor& gate, const OptionalTensor& bias_any,
         const OptionalTensor& mask_any)
      : q(inner_contiguous(q_any)), k(inner_contiguous(k_any)), v(inner_contiguous(v_any)) {
    check_shape(q, {-1, -1, -1, -1}, "q");
    const int64_t n = q.size(0), views = q.size(1), heads = q.size(2), width = q.size(3);
    check_shape(k, {n, views, heads, width}, "k");
    check_shape(v, {n, views, heads, width}, "v");
    check_type(k, q.scalar_type(), "k");
    check_type(v, q.scalar_type(), "v");
    check_shape(gate, {n, views, heads}, "gate_logits");
    STD_TORCH_CHECK(views >= 1 && views <= kMaxViews, "q must have 1 to ", kMaxViews, " views, got ", views);
    STD_TORCH_CHECK(heads >= 1 && width >= 1, "q must have at least one head of at least one column");
    if (bias_any.has_value()) {
      check_shape(*bias_any, {heads, views, views}, "bias");
      check_type(*bias_any, ScalarType::Float, "bias");
      bias = torch::stable::contiguous(*bias_any);
    }
    if (mask_any.has_value()) {
      check_shape(*mask_any, {n, views}, "mask");
      check_type(*mask_any, ScalarType::Bool, "mask");
      mask = torch::stable::contiguous(*mask_any);
    }
    kernel = {n,
              views,
              heads,
              width,
              rows(q),
              rows(k),
              rows(v),
              storage_type(q, "q"),
              rows(gate),
              storage_type(gate, "gate_logits"),
              bias ? bias->const_data_ptr<float>() : nullptr,
              mask ? mask->const_data_ptr<bool>() : nullptr};
  }

  Tensor q, k, v;
  OptionalTensor bias, mask;
  CrossViewInput kernel;
};

std::tuple<Tensor, Tensor, Tensor> cross_view(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gate,
                                              const OptionalTensor& bias, const OptionalTensor& mask) {
  const Inputs inputs(q, k, v, gate, bias, mask);
  const CrossViewInput& in = inputs.kernel;
  Tensor out = new_tensor(q, {in.instances, in.views, in.heads, in.width}, q.scalar_type());
  Tensor mass = new_tensor(q, {in.instances, in.views, in.views}, ScalarType::Float);
  Tensor entropy = new_tensor(q, {in.instances, in.views, in.heads}, ScalarType::Float);
  const CrossViewForward arguments{in, out.mutable_data_ptr(), mass.mutable_data_ptr<float>(),
                                   entropy.mutable_data_ptr<float>()};
  UMDA_CALL_KERNEL(cross_view_forward, arguments);
  return {out, mass, entropy};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cross_view_backward(
    const OptionalTensor& d_out_any, const OptionalTensor& d_mass_any, const OptionalTensor& d_entropy_any,
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gate, const OptionalTensor& bias,
    const OptionalTensor& mask) {
  const Inputs inputs(q, k, v, gate, bias, mask);
  const CrossViewInput& in = inputs.kernel;
  OptionalTensor d_out, d_mass, d_entropy;
  if (d_out_any.has_value()) {
    check_shape(*d_out_any, {in.instances, in.views, in.heads, in.width}, "d_out");
    check_type(*d_out_any, q.scalar_type(), "d_out");
    d_out = inner_contiguous(*d_out_any);
  }
  if (d_mass_any.has_value()) {
    check_shape(*d_mass_any, {in.instances, in.views, in.views}, "d_mass");
    check_type(*d_mass_any, ScalarType::Float, "d_mass");
    d_mass = torch::stable::contiguous(*d_mass_any);
  }
  if (d_entropy_any.has_value()) {
    check_shape(*d_entropy_any, {in.instances, in.views, in.heads}, "d_entropy");
    check_type(*d_entropy_any, ScalarType::Float, "d_entropy");
    d_entropy = torch::stable::contiguous(*d_entropy_any);
  }
  const auto like_q = [&] { return new_tensor(q, {in.instances, in.views, in.heads, in.width}, q.scalar_type()); };
  Tensor dq = like_q(), dk = like_q(), dv = like_q();
  Tensor d_gate = new_tensor(gate, {in.instances, in.views, in.heads}, gate.scalar_type());
  Tensor d_bias = new_tensor(q, {in.heads, in.views, in.views}, ScalarType::Float);
  const CrossViewBackward arguments{in,
                                    d_out ? rows(*d_out) : CrossViewRows{nullptr, 0, 0, 0},
                                    d_mass ? d_mass->const_data_ptr<float>() : nullptr,
                                    d_entropy ? d_entropy->const_data_ptr<float>() : nullptr,
                                    dq.mutable_data_ptr(),
                                    dk.mutable_data_ptr(),
                                    dv.mutable_data_ptr(),
                                    d_gate.mutable_data_ptr(),
                                    d_bias.mutable_data_ptr<float>()};
  UMDA_CALL_KERNEL(cross_view_backward, arguments);
  return {dq, dk, dv, d_gate, d_bias};
}

STABLE_TORCH_LIBRARY_IMPL(umda_fast, CPU, m) {
  m.impl("cross_view", TORCH_BOX(&cross_view));
  m.impl("cross_view_backward", TORCH_BOX(&cross_view_backward));
}

}  // namespace
}  // namespace umda
