#include "cpu/view_fusion.h"

#include "cpu/binding.h"

namespace umda {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

ViewRows rows(const Tensor& t, int64_t width, const char* name) {
  return {t.const_data_ptr(), t.stride(0), t.stride(1), width, storage_type(t, name)};
}

// The inputs in the layout that the kernels take; it owns what had to be copied.
struct Inputs {
  Inputs(const Tensor& y_any, const Tensor& scores, const OptionalTensor& projected_any, const OptionalTensor& mask_any)
      : y(inner_contiguous(y_any)) {
    check_shape(y, {-1, -1, -1}, "y");
    const int64_t n = y.size(0), views = y.size(1);
    check_shape(scores, {n, views}, "scores");
    STD_TORCH_CHECK(views >= 1 && views <= kMaxFusedViews, "y must have 1 to ", kMaxFusedViews, " views, got ", views);
    kernel = {n, views, rows(y, y.size(2), "y"), rows(scores, 1, "scores"), {nullptr, 0, 0, 0, DType::float32}, nullptr};
    if (projected_any.has_value()) {
      check_shape(*projected_any, {n, views, -1}, "projected");
      projected = inner_contiguous(*projected_any);
      kernel.projected = rows(*projected, projected->size(2), "projected");
    }
    if (mask_any.has_value()) {
      check_shape(*mask_any, {n, views}, "mask");
      check_type(*mask_any, ScalarType::Bool, "mask");
      mask = torch::stable::contiguous(*mask_any);
      kernel.mask = mask->const_data_ptr<bool>();
    }
  }

  Tensor y;
  OptionalTensor projected, mask;
  ViewFusionInput kernel;
};

Outputs view_fusion(const Tensor& y, const Tensor& scores, const OptionalTensor& projected, const OptionalTensor& mask) {
  const Inputs inputs(y, scores, projected, mask);
  const ViewFusionInput& in = inputs.kernel;
  const auto floats = [&](std::initializer_list<int64_t> shape) { return new_tensor(y, shape, ScalarType::Float); };
  Tensor z = new_tensor(y, {in.instances, in.y.width}, y.scalar_type());
  Tensor beta = floats({in.instances, in.views});
  const auto per_view = [&] { return floats({in.views, in.y.width}); };
  Tensor mean = per_view(), variance = per_view(), rest = per_view();
  Tensor count = new_tensor(y, {in.views}, ScalarType::Long), pairs = new_tensor(y, {}, ScalarType::Long);
  Tensor cosine_sum = floats({});
  const ViewFusionForward arguments{in,
                                    z.mutable_data_ptr(),
                                    beta.mutable_data_ptr<float>(),
                                    mean.mutable_data_ptr<float>(),
                                    variance.mutable_data_ptr<float>(),
                                    rest.mutable_data_ptr<float>(),
                                    count.mutable_data_ptr<int64_t>(),
                                    cosine_sum.mutable_data_ptr<float>(),
                                    pairs.mutable_data_ptr<int64_t>()};
  UMDA_CALL_KERNEL(view_fusion_forward, arguments);
  return {z, beta, mean, variance, count, cosine_sum, pairs, rest};
}

std::tuple<Tensor, Tensor, Tensor> view_fusion_backward(
    const OptionalTensor& d_z_any, const OptionalTensor& d_beta_any, const OptionalTensor& d_mean_any,
    const OptionalTensor& d_variance_any, const OptionalTensor& d_cosine_sum, const Tensor& y, const Tensor& scores,
    const OptionalTensor& projected, const OptionalTensor& mask, const Tensor& mean_any, const Tensor& rest_any,
    const Tensor& count_any) {
  const Inputs inputs(y, scores, projected, mask);
  const ViewFusionInput& in = inputs.kernel;
  const auto floats = [](const OptionalTensor& t, std::initializer_list<int64_t> shape, const char* name) {
    OptionalTensor result;
    if (t.has_value()) {
      check_shape(*t, shape, name);
      check_type(*t, ScalarType::Float, name);
      result = torch::stable::contiguous(*t);
    }
    return result;
  };
  const OptionalTensor d_beta = floats(d_beta_any, {in.instances, in.views}, "d_beta");
  const OptionalTensor d_mean = floats(d_mean_any, {in.views, in.y.width}, "d_mean");
  const OptionalTensor d_variance = floats(d_variance_any, {in.views, in.y.width}, "d_variance");
  const OptionalTensor d_cosines = floats(d_cosine_sum, {}, "d_cosine_sum");
  const OptionalTensor mean = floats(mean_any, {in.views, in.y.width}, "mean");
  const OptionalTensor rest = floats(rest_any, {in.views, in.y.width}, "rest");
  check_shape(count_any, {in.views}, "count");
  check_type(count_any, ScalarType::Long, "count");
  const Tensor count = torch::stable::contiguous(count_any);
  OptionalTensor d_z;
  if (d_z_any.has_value()) {
    check_shape(*d_z_any, {in.instances, in.y.width}, "d_z");
    check_type(*d_z_any, y.scalar_type(), "d_z");
    d_z = inner_contiguous(*d_z_any);
  }
  Tensor dy = new_tensor(y, {in.instances, in.views, in.y.width}, y.scalar_type());
  Tensor d_scores = new_tensor(scores, {in.instances, in.views}, scores.scalar_type());
  Tensor d_projected =
      projected.has_value()
          ? new_tensor(*projected, {in.instances, in.views, in.projected.width}, projected->scalar_type())
          : new_tensor(y, {0}, y.scalar_type());
  const auto pointer = [](const OptionalTensor& t) { return t ? t->const_data_ptr<float>() : nullptr; };
  const ViewFusionBackward arguments{in,
                                     d_z ? d_z->const_data_ptr() : nullptr,
                                     d_z ? d_z->stride(0) : 0,
                                     pointer(d_beta),
                                     pointer(d_mean),
                                     pointer(d_variance),
                                     pointer(d_cosines),
                                     pointer(mean),
                                     pointer(rest),
                                     count.const_data_ptr<int64_t>(),
                                     dy.mutable_data_ptr(),
                                     d_scores.mutable_data_ptr(),
                                     d_projected.mutable_data_ptr()};
  UMDA_CALL_KERNEL(view_fusion_backward, arguments);
  return {dy, d_scores, d_projected};
}

STABLE_TORCH_LIBRARY_IMPL(umda_fast, CPU, m) {
  m.impl("view_fusion", TORCH_BOX(&view_fusion));
  m.impl("view_fusion_backward", TORCH_BOX(&view_fusion_backward));
}

}  // namespace
}  // namespace umda
