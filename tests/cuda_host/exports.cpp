// What ctypes calls: the launchers, by C names, and the sizes of their arguments.
#include "cuda/bag_pool.h"
#include "cuda/task_gradients.h"

using namespace umda::cuda;

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int64_t size_BagPoolForward() { return sizeof(BagPoolForward); }
EXPORT int64_t size_BagPoolBackward() { return sizeof(BagPoolBackward); }
EXPORT int64_t call_bag_pool_forward_workspace(const BagPoolInput* in) { return bag_pool_forward_workspace(*in); }
EXPORT int64_t call_bag_pool_backward_workspace(const BagPoolInput* in) { return bag_pool_backward_workspace(*in); }
EXPORT int call_bag_pool_forward(const BagPoolForward* a, const Launch* launch) { return bag_pool_forward(*a, *launch); }
EXPORT int call_bag_pool_backward(const BagPoolBackward* a, const Launch* launch) {
  return bag_pool_backward(*a, *launch);
}

EXPORT int64_t size_TaskGradientStatistics() { return sizeof(TaskGradientStatistics); }
EXPORT int64_t size_TaskGradientCombination() { return sizeof(TaskGradientCombination); }
EXPORT int64_t call_task_gradient_statistics_workspace(const TaskGradientStatistics* a) {
  return task_gradient_statistics_workspace(*a);
}
EXPORT int call_task_gradient_statistics(const TaskGradientStatistics* a, const Launch* launch) {
  return task_gradient_statistics(*a, *launch);
}
EXPORT int call_combine_task_gradients(const TaskGradientCombination* a, const Launch* launch) {
  return combine_task_gradients(*a, *launch);
}
