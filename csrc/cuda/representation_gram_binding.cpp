#include "cuda/representation_gram.h"

#include "cuda/binding.h"

namespace umda::cuda {
namespace {

// ptr is on the device: that it rises from 0 to N is checked by umda_fast.ops, which may have its values at hand.
Tensor representation_gram(const std::vector<Tensor>& d_pooled, const Tensor& z_any, const Tensor& attention_any,
                           const Tensor& ptr_any, const Tensor& pooled_any, const Tensor& value_any,
                           const Tensor& gate_any, const Tensor& score_weight_any, const Tensor& value_weight_any,
                           const Tensor& gate_weight_any) {
  const OnDevice device(z_any);
  const Tensor z = inner_contiguous(z_any);
  check_shape(z, {-1, -1}, "z");
  const int64_t n = z.size(0), width = z.size(1), losses = static_cast<int64_t>(d_pooled.size());
  STD_TORCH_CHECK(losses <= kRepresentationGramMaxLosses, "d_pooled must hold at most ", kRepresentationGramMaxLosses,
                  " tensors on CUDA, got ", losses);
  const Tensor attention = contiguous_like(attention_any, z, {n, -1}, ScalarType::Float, "attention");
  const Tensor ptr = contiguous_like(ptr_any, z, {-1}, ScalarType::Long, "ptr");
  STD_TORCH_CHECK(ptr.size(0) > 1 || (ptr.size(0) == 1 && n == 0),
                  "ptr must be a vector of one element more than there are bags");
  const int64_t bags = ptr.size(0) - 1, tasks = attention.size(1);
  const Tensor pooled = contiguous_like(pooled_any, z, {bags, tasks, width}, z.scalar_type(), "pooled");
  std::vector<Tensor> kept;  // what the pointers below point to
  std::vector<const void*> pointers;
  for (const Tensor& gradient : d_pooled) {
    kept.push_back(contiguous_like(gradient, z, {bags, tasks, width}, z.scalar_type(), "d_pooled"));
    pointers.push_back(kept.back().const_data_ptr());
  }
  const Tensor value = contiguous_like(value_any, z, {n, -1}, value_any.scalar_type(), "value");
  const int64_t hidden = value.size(1);
  const Tensor gate = contiguous_like(gate_any, z, {n, hidden}, value.scalar_type(), "gate");
  const Tensor score_weight = contiguous_like(score_weight_any, z, {tasks, hidden}, ScalarType::Float, "score_weight");
  const Tensor value_weight = contiguous_like(value_weight_any, z, {hidden, width}, ScalarType::Float, "value_weight");
  const Tensor gate_weight = contiguous_like(gate_weight_any, z, {hidden, width}, ScalarType::Float, "gate_weight");
  Tensor gram = new_tensor(z, {losses, losses}, ScalarType::Float);
  RepresentationGram arguments{losses,
                               bags,
                               n,
                               tasks,
                               width,
                               hidden,
                               ptr.const_data_ptr<int64_t>(),
                               pointers.data(),
                               pooled.const_data_ptr(),
                               z.const_data_ptr(),
                               z.stride(0),
                               attention.const_data_ptr<float>(),
                               value.const_data_ptr(),
                               gate.const_data_ptr(),
                               score_weight.const_data_ptr<float>(),
                               value_weight.const_data_ptr<float>(),
                               gate_weight.const_data_ptr<float>(),
                               gram.mutable_data_ptr<float>(),
                               nullptr,
                               storage_type(z, "z"),
                               storage_type(value, "value")};
  Tensor workspace = new_workspace(z, representation_gram_workspace(arguments));
  arguments.workspace = workspace.mutable_data_ptr();
  check_launch(representation_gram(arguments, device.launch()));
  return gram;
}

UMDA_CUDA_LIBRARY(m) { m.impl("representation_gram", TORCH_BOX(&representation_gram)); }

}  // namespace
}  // namespace umda::cuda
