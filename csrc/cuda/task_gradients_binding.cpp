#include "cuda/task_gradients.h"

#include "cuda/binding.h"

namespace umda::cuda {
namespace {

// ema [T, P], whose memory is used as it is.
void check_ema(const Tensor& ema) {
  check_shape(ema, {-1, -1}, "ema");
  check_type(ema, ScalarType::Float, "ema");
  STD_TORCH_CHECK(ema.size(0) >= 1, "ema must have at least one row");
  STD_TORCH_CHECK(ema.size(1) <= 1 || ema.stride(1) == 1, "ema must be contiguous in its last dimension");
}

// The pieces of all tasks, as the launcher takes them.
struct Pieces {
  Pieces(const std::vector<Tensor>& grads, const Tensor& ema) {
    const int64_t tasks = ema.size(0), columns = ema.size(1);
    if (grads.size() == 1 && grads[0].dim() == 2 && grads[0].size(0) == tasks && grads[0].size(1) == columns) {
      same_device(grads[0], ema, "grads");
      kept.push_back(inner_contiguous(grads[0]));
      const Tensor& g = kept[0];
      const int64_t row = g.stride(0) * (g.scalar_type() == ScalarType::Float ? 4 : 2);
      for (int64_t t = 0; t < tasks; ++t) {
        pointers.push_back(static_cast<const char*>(g.const_data_ptr()) + t * row);
        types.push_back(storage_type(g, "grads"));
      }
      begin.push_back(columns);
      return;
    }
    const int64_t count = static_cast<int64_t>(grads.size()), pieces = count / tasks;
    STD_TORCH_CHECK(pieces >= 1 && count % tasks == 0, "grads must be one [", tasks, ", ", columns,
                    "] tensor or a multiple of ", tasks, " tensors, got ", count);
    for (const Tensor& g : grads) {
      same_device(g, ema, "grads");
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

  std::vector<Tensor> kept;  // what the pointers point to
  std::vector<const void*> pointers;
  std::vector<DType> types;
  std::vector<int64_t> begin{0};
};

Tensor task_gradient_statistics(const std::vector<Tensor>& grads, const Tensor& ema, const Tensor& correction_any,
                                const OptionalTensor& active_any, double beta) {
  const OnDevice device(ema);
  check_ema(ema);
  const int64_t tasks = ema.size(0);
  STD_TORCH_CHECK(tasks <= kTaskGradientsMaxTasks, "ema must have at most ", kTaskGradientsMaxTasks,
                  " rows on CUDA, got ", tasks);
  const Tensor correction = contiguous_like(correction_any, ema, {tasks}, ScalarType::Float, "correction");
  const OptionalTensor active = contiguous_like(active_any, ema, {tasks}, ScalarType::Bool, "active");
  const Pieces pieces(grads, ema);
  Tensor gram = new_tensor(ema, {tasks, tasks}, ScalarType::Float);
  TaskGradientStatistics arguments{tasks,
                                   ema.size(1),
                                   static_cast<int64_t>(pieces.begin.size()) - 1,
                                   pieces.begin.data(),
                                   pieces.pointers.data(),
                                   pieces.types.data(),
                                   ema.mutable_data_ptr<float>(),
                                   ema.stride(0),
                                   correction.const_data_ptr<float>(),
                                   data_or_null<bool>(active),
                                   beta,
                                   gram.mutable_data_ptr<float>(),
                                   nullptr};
  Tensor workspace = new_workspace(ema, task_gradient_statistics_workspace(arguments));
  arguments.workspace = workspace.mutable_data_ptr();
  check_launch(task_gradient_statistics(arguments, device.launch()));
  return gram;
}

void combine_task_gradients(const Tensor& ema, const Tensor& weights_any, const Tensor& out) {
  const OnDevice device(ema);
  check_ema(ema);
  const Tensor weights = contiguous_like(weights_any, ema, {ema.size(0)}, ScalarType::Float, "weights");
  check_shape(out, {ema.size(1)}, "out");
  same_device(out, ema, "out");
  STD_TORCH_CHECK(out.is_contiguous(), "out must be contiguous");
  check_launch(combine_task_gradients({ema.size(0), ema.size(1), ema.const_data_ptr<float>(), ema.stride(0),
                                       weights.const_data_ptr<float>(), out.mutable_data_ptr(),
                                       storage_type(out, "out")},
                                      device.launch()));
}

UMDA_CUDA_LIBRARY(m) {
  m.impl("task_gradient_statistics", TORCH_BOX(&task_gradient_statistics));
  m.impl("combine_task_gradients", TORCH_BOX(&combine_task_gradients));
}

}  // namespace
}  // namespace umda::cuda
