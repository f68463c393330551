#include "cuda/bag_pool.h"

#include "cuda/binding.h"

namespace umda::cuda {
namespace {

// ptr is on the device: that it rises from 0 to N is checked by umda_fast.ops, which may have its values at hand.
BagPoolInput make_input(const Tensor& z, const Tensor& scores, const Tensor& ptr) {
  check_shape(z, {-1, -1}, "z");
  check_shape(scores, {z.size(0), -1}, "scores");
  same_device(scores, z, "scores");
  STD_TORCH_CHECK(ptr.dim() == 1 && ptr.size(0) >= 1 && (ptr.size(0) > 1 || z.size(0) == 0),
                  "ptr must be a vector of one element more than there are bags");
  STD_TORCH_CHECK(scores.size(1) <= kBagPoolMaxTasks, "scores must have at most ", kBagPoolMaxTasks,
                  " tasks on CUDA, got ", scores.size(1));
  return {ptr.size(0) - 1,  z.size(0),        scores.size(1),         z.size(1),
          ptr.const_data_ptr<int64_t>(),      z.const_data_ptr(),     z.stride(0),
          scores.const_data_ptr(),            scores.stride(0),       scores.stride(1),
          storage_type(z, "z"),               storage_type(scores, "scores")};
}

std::tuple<Tensor, Tensor, Tensor> bag_pool(const Tensor& z_any, const Tensor& scores, const Tensor& ptr_any) {
  const OnDevice device(z_any);
  const Tensor z = inner_contiguous(z_any);
  const Tensor ptr = contiguous_like(ptr_any, z, {-1}, ScalarType::Long, "ptr");
  const BagPoolInput in = make_input(z, scores, ptr);
  Tensor pooled = new_tensor(z, {in.bags, in.tasks, in.width}, z.scalar_type());
  Tensor entropy = new_tensor(z, {in.bags, in.tasks}, ScalarType::Float);
  Tensor lse = new_tensor(z, {in.bags, in.tasks}, ScalarType::Float);
  Tensor workspace = new_workspace(z, bag_pool_forward_workspace(in));
  check_launch(bag_pool_forward({in, pooled.mutable_data_ptr(), entropy.mutable_data_ptr<float>(),
                                 lse.mutable_data_ptr<float>(), workspace.mutable_data_ptr()},
                                device.launch()));
  return {pooled, entropy, lse};
}

// The kernel finds entropy and lse again from the scores, more exactly than they can be stored.
std::tuple<Tensor, Tensor> bag_pool_backward(const OptionalTensor& d_pooled_any, const OptionalTensor& d_entropy_any,
                                             const OptionalTensor& d_lse_any, const Tensor& z_any, const Tensor& scores,
                                             const Tensor& ptr_any, const Tensor& pooled_any, const Tensor& /*entropy*/,
                                             const Tensor& /*lse*/) {
  const OnDevice device(z_any);
  const Tensor z = inner_contiguous(z_any);
  const Tensor ptr = contiguous_like(ptr_any, z, {-1}, ScalarType::Long, "ptr");
  const BagPoolInput in = make_input(z, scores, ptr);
  const Tensor pooled =
      contiguous_like(pooled_any, z, {in.bags, in.tasks, in.width}, z.scalar_type(), "pooled");
  const OptionalTensor d_entropy =
      contiguous_like(d_entropy_any, z, {in.bags, in.tasks}, ScalarType::Float, "d_entropy");
  const OptionalTensor d_lse = contiguous_like(d_lse_any, z, {in.bags, in.tasks}, ScalarType::Float, "d_lse");
  OptionalTensor d_pooled;
  if (d_pooled_any.has_value()) {
    check_shape(*d_pooled_any, {in.bags, in.tasks, in.width}, "d_pooled");
    check_type(*d_pooled_any, z.scalar_type(), "d_pooled");
    same_device(*d_pooled_any, z, "d_pooled");
    d_pooled = inner_contiguous(*d_pooled_any);
  }
  Tensor dz = new_tensor(z, {in.instances, in.width}, z.scalar_type());
  Tensor d_scores = new_tensor(scores, {in.instances, in.tasks}, scores.scalar_type());
  Tensor workspace = new_workspace(z, bag_pool_backward_workspace(in));
  check_launch(bag_pool_backward({in,
                                  d_pooled ? d_pooled->const_data_ptr() : nullptr,
                                  d_pooled ? d_pooled->stride(0) : 0,
                                  d_pooled ? d_pooled->stride(1) : 0,
                                  data_or_null<float>(d_entropy),
                                  data_or_null<float>(d_lse),
                                  pooled.const_data_ptr(),
                                  dz.mutable_data_ptr(),
                                  d_scores.mutable_data_ptr(),
                                  workspace.mutable_data_ptr()},
                                 device.launch()));
  return {dz, d_scores};
}

UMDA_CUDA_LIBRARY(m) {
  m.impl("bag_pool", TORCH_BOX(&bag_pool));
  m.impl("bag_pool_backward", TORCH_BOX(&bag_pool_backward));
}

}  // namespace
}  // namespace umda::cuda
