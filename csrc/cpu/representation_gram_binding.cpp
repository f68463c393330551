#include "cpu/representation_gram.h"

#include "cpu/binding.h"

namespace umda {
namespace {

// Contiguous, of this shape (-1: any size) and type.
Tensor contiguous_of(const Tensor& t, std::initializer_list<int64_t> shape, ScalarType type, const char* name) {
  check_shape(t, shape, name);
  check_type(t, type, name);
  return torch::stable::contiguous(t);
}

Tensor representation_gram(const std::vector<Tensor>& d_pooled, const Tensor& z_any, const Tensor& attention_any,
                           const Tensor& ptr, const Tensor& pooled_any, const Tensor& value_any, const Tensor& gate_any,
                           const Tensor& score_weight_any, const Tensor& value_weight_any,
                           const Tensor& gate_weight_any) {
  const Tensor z = inner_contiguous(z_any);
  check_shape(z, {-1, -1}, "z");
  const int64_t n = z.size(0), width = z.size(1), losses = static_cast<int64_t>(d_pooled.size());
  const Tensor attention = contiguous_of(attention_any, {n, -1}, ScalarType::Float, "attention");
  check_ptr(ptr, n, "ptr");
  const int64_t bags = ptr.size(0) - 1, tasks = attention.size(1);
  const Tensor pooled = contiguous_of(pooled_any, {bags, tasks, width}, z.scalar_type(), "pooled");
  std::vector<Tensor> kept;  // what the pointers below point to
  std::vector<const void*> pointers;
  for (const Tensor& gradient : d_pooled) {
    kept.push_back(contiguous_of(gradient, {bags, tasks, width}, z.scalar_type(), "d_pooled"));
    pointers.push_back(kept.back().const_data_ptr());
  }
  const Tensor value = contiguous_of(value_any, {n, -1}, value_any.scalar_type(), "value");
  const int64_t hidden = value.size(1);
  const Tensor gate = contiguous_of(gate_any, {n, hidden}, value.scalar_type(), "gate");
  const Tensor score_weight = contiguous_of(score_weight_any, {tasks, hidden}, ScalarType::Float, "score_weight");
  const Tensor value_weight = contiguous_of(value_weight_any, {hidden, width}, ScalarType::Float, "value_weight");
  const Tensor gate_weight = contiguous_of(gate_weight_any, {hidden, width}, ScalarType::Float, "gate_weight");
  Tensor gram = new_tensor(z, {losses, losses}, ScalarType::Float);
  const RepresentationGram arguments{losses,
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
                                     storage_type(z, "z"),
                                     attention.const_data_ptr<float>(),
                                     value.const_data_ptr(),
                                     gate.const_data_ptr(),
                                     storage_type(value, "value"),
                                     score_weight.const_data_ptr<float>(),
                                     value_weight.const_data_ptr<float>(),
                                     gate_weight.const_data_ptr<float>(),
                                     gram.mutable_data_ptr<float>()};
  UMDA_CALL_KERNEL(representation_gram, arguments);
  return gram;
}

STABLE_TORCH_LIBRARY_IMPL(umda_fast, CPU, m) { m.impl("representation_gram", TORCH_BOX(&representation_gram)); }

}  // namespace
}  // namespace umda
