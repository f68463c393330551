#include "cpu/task_gradients.h"

#include "cpu/binding.h"

namespace umda {
namespace {

// ema [T, P], whose memory is used as it is.
void check_ema(const Tensor& ema) {
  check_shape(ema, {-1, -1}, "ema");
  check_type(ema, ScalarType::Float, "ema");
  STD_TORCH_CHECK(ema.size(0) >= 1, "ema must have at least one row");
  STD_TORCH_CHECK(ema.size(1) <= 1 || ema.stride(1) == 1, "ema must be contiguous in its last dimension");
}

Tensor task_gradient_statistics(const std::vector<Tensor>& grads, const Tensor& ema, const Tensor& correction_any,
                                const OptionalTensor& active_any, double beta) {
  check_ema(ema);
  const int64_t tasks = ema.size(0), columns = ema.size(1);
  check_shape(correction_any, {tasks}, "correction");
  check_type(correction_any, ScalarType::Float, "correction");
  const Tensor correction = torch::stable::contiguous(correction_any);
  OptionalTensor active;
  if (active_any.has_value()) {
    check_shape(*active_any, {tasks}, "active");
    check_type(*active_any, ScalarType::Bool, "active");
    active = torch::stable::contiguous(*active_any);
  }

  std::vector<Tensor> kept;  // what the pointers below point to
  std::vector<const void*> pointers;
  std::vector<DType> types;
  std::vector<int64_t> begin{0};
  const bool matrix =
      grads.size() == 1 && grads[0].dim() == 2 && grads[0].size(0) == tasks && grads[0].size(1) == columns;
  if (matrix) {
    kept.push_back(inner_contiguous(grads[0]));
    const Tensor& g = kept[0];
    const int64_t row = g.stride(0) * (g.scalar_type() == ScalarType::Float ? 4 : 2);
    for (int64_t t = 0; t < tasks; ++t) {
      pointers.push_back(static_cast<const char*>(g.const_data_ptr()) + t * row);
      types.push_back(storage_type(g, "grads"));
    }
    begin.push_back(columns);
  } else {
    const int64_t count = static_cast<int64_t>(grads.size()), pieces = count / tasks;
    STD_TORCH_CHECK(pieces >= 1 && count % tasks == 0, "grads must be one [", tasks, ", ", columns,
                    "] tensor or a multiple of ", tasks, " tensors, got ", count);
    for (const Tensor& g : grads) {
      kept.push_back(torch::stable::contiguous(g));
      pointers.push_back(kept.back().const_data_ptr());
      types.push_back(storage_type(g, "grads"));
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t piece = i % pieces, size = kept[i].numel();
      if (i < pieces) {
        begin.push_back(begin.back() + size);
      }
      STD_TORCH_CHECK(begin[piece + 1] - begin[piece] == size, "grads[", i, "] must have ",
                      begin[piece + 1] - begin[piece], " elements as that of the first task, got ", size);
    }
    STD_TORCH_CHECK(begin.back() == columns, "grads of a task must have ", columns, " elements together, got ",
                    begin.back());
  }

  Tensor gram = new_tensor(ema, {tasks, tasks}, ScalarType::Float);
  const TaskGradientStatistics arguments{tasks,
                                         columns,
                                         static_cast<int64_t>(begin.size()) - 1,
                                         begin.data(),
                                         pointers.data(),
                                         types.data(),
                                         ema.mutable_data_ptr<float>(),
                                         ema.stride(0),
                                         correction.const_data_ptr<float>(),
                                         active ? active->const_data_ptr<bool>() : nullptr,
                                         beta,
                                         gram.mutable_data_ptr<float>()};
  UMDA_CALL_KERNEL(task_gradient_statistics, arguments);
  return gram;
}

void combine_task_gradients(const Tensor& ema, const Tensor& weights_any, const Tensor& out) {
  check_ema(ema);
  check_shape(weights_any, {ema.size(0)}, "weights");
  check_type(weights_any, ScalarType::Float, "weights");
  check_shape(out, {ema.size(1)}, "out");
  STD_TORCH_CHECK(out.is_contiguous(), "out must be contiguous");
  const Tensor weights = torch::stable::contiguous(weights_any);
  const TaskGradientCombination arguments{ema.size(0),
                                          ema.size(1),
                                          ema.const_data_ptr<float>(),
                                          ema.stride(0),
                                          weights.const_data_ptr<float>(),
                                          out.mutable_data_ptr(),
                                          storage_type(out, "out")};
  UMDA_CALL_KERNEL(combine_task_gradients, arguments);
}

void linear_weight_gradient(const Tensor& d_out_any, const Tensor& x_any, const Tensor& out) {
  check_shape(d_out_any, {-1, -1}, "d_out");
  check_type(d_out_any, ScalarType::Float, "d_out");
  check_shape(x_any, {d_out_any.size(0), -1}, "x");
  check_type(x_any, ScalarType::Float, "x");
  check_shape(out, {d_out_any.size(1), x_any.size(1)}, "out");
  check_type(out, ScalarType::Float, "out");
  STD_TORCH_CHECK(out.size(1) <= 1 || out.stride(1) == 1, "out must be contiguous in its last dimension");
  const Tensor d_out = inner_contiguous(d_out_any), x = inner_contiguous(x_any);
  const LinearWeightGradient arguments{d_out.size(0),
                                       d_out.size(1),
                                       x.size(1),
                                       d_out.const_data_ptr<float>(),
                                       d_out.stride(0),
                                       x.const_data_ptr<float>(),
                                       x.stride(0),
                                       out.mutable_data_ptr<float>(),
                                       out.stride(0)};
  UMDA_CALL_KERNEL(linear_weight_gradient, arguments);
}

STABLE_TORCH_LIBRARY_IMPL(umda_fast, CPU, m) {
  m.impl("task_gradient_statistics", TORCH_BOX(&task_gradient_statistics));
  m.impl("combine_task_gradients", TORCH_BOX(&combine_task_gradients));
  m.impl("linear_weight_gradient", TORCH_BOX(&linear_weight_gradient));
}

}  // namespace
}  // namespace umda
