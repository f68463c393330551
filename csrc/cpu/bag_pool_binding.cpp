#include "cpu/bag_pool.h"

#include "cpu/binding.h"

namespace umda {
namespace {

BagPoolInput make_input(const Tensor& z, const Tensor& scores, const Tensor& ptr) {
  check_shape(z, {-1, -1}, "z");
  check_shape(scores, {z.size(0), -1}, "scores");
  check_ptr(ptr, z.size(0), "ptr");
  return {ptr.size(0) - 1,
          z.size(0),
          scores.size(1),
          z.size(1),
          ptr.const_data_ptr<int64_t>(),
          z.const_data_ptr(),
          z.stride(0),
          storage_type(z, "z"),
          scores.const_data_ptr(),
          scores.stride(0),
          scores.stride(1),
          storage_type(scores, "scores")};
}

std::tuple<Tensor, Tensor, Tensor> bag_pool(const Tensor& z_any, const Tensor& scores, const Tensor& ptr) {
  const Tensor z = inner_contiguous(z_any);
  const BagPoolInput in = make_input(z, scores, ptr);
  Tensor pooled = new_tensor(z, {in.bags, in.tasks, in.width}, z.scalar_type());
  Tensor entropy = new_tensor(z, {in.bags, in.tasks}, ScalarType::Float);
  Tensor lse = new_tensor(z, {in.bags, in.tasks}, ScalarType::Float);
  const BagPoolForward arguments{in, pooled.mutable_data_ptr(), entropy.mutable_data_ptr<float>(),
                                 lse.mutable_data_ptr<float>()};
  UMDA_CALL_KERNEL(bag_pool_forward, arguments);
  return {pooled, entropy, lse};
}

// The kernel finds entropy and lse again from the scores, more exactly than they can be stored.
std::tuple<Tensor, Tensor> bag_pool_backward(const OptionalTensor& d_pooled_any, const OptionalTensor& d_entropy_any,
                                             const OptionalTensor& d_lse_any, const Tensor& z_any, const Tensor& scores,
                                             const Tensor& ptr, const Tensor& pooled_any, const Tensor& /*entropy*/,
                                             const Tensor& /*lse*/) {
  const Tensor z = inner_contiguous(z_any);
  const BagPoolInput in = make_input(z, scores, ptr);
  const Tensor pooled = torch::stable::contiguous(pooled_any);
  check_shape(pooled, {in.bags, in.tasks, in.width}, "pooled");
  check_type(pooled, z.scalar_type(), "pooled");
  const auto statistic = [&](const OptionalTensor& t, const char* name) -> OptionalTensor {
    if (!t.has_value()) {
      return std::nullopt;
    }
    check_shape(*t, {in.bags, in.tasks}, name);
    check_type(*t, ScalarType::Float, name);
    return torch::stable::contiguous(*t);
  };
  const OptionalTensor d_entropy = statistic(d_entropy_any, "d_entropy");
  const OptionalTensor d_lse = statistic(d_lse_any, "d_lse");
  OptionalTensor d_pooled;
  if (d_pooled_any.has_value()) {
    check_shape(*d_pooled_any, {in.bags, in.tasks, in.width}, "d_pooled");
    check_type(*d_pooled_any, z.scalar_type(), "d_pooled");
    d_pooled = inner_contiguous(*d_pooled_any);
  }
  Tensor dz = new_tensor(z, {in.instances, in.width}, z.scalar_type());
  Tensor d_scores = new_tensor(scores, {in.instances, in.tasks}, scores.scalar_type());
  const BagPoolBackward arguments{in,
                                  d_pooled ? d_pooled->const_data_ptr() : nullptr,
                                  d_pooled ? d_pooled->stride(0) : 0,
                                  d_pooled ? d_pooled->stride(1) : 0,
                                  d_entropy ? d_entropy->const_data_ptr<float>() : nullptr,
                                  d_lse ? d_lse->const_data_ptr<float>() : nullptr,
                                  pooled.const_data_ptr(),
                                  dz.mutable_data_ptr(),
                                  d_scores.mutable_data_ptr()};
  UMDA_CALL_KERNEL(bag_pool_backward, arguments);
  return {dz, d_scores};
}

STABLE_TORCH_LIBRARY_IMPL(umda_fast, CPU, m) {
  m.impl("bag_pool", TORCH_BOX(&bag_pool));
  m.impl("bag_pool_backward", TORCH_BOX(&bag_pool_backward));
}

}  // namespace
}  // namespace umda
