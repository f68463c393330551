// What ctypes calls: the launchers, by C names, and the sizes of their arguments.
#include "cuda/bag_pool.h"
#include "cuda/neighbors.h"
#include "cuda/representation_gram.h"
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

EXPORT int64_t size_TaskGradientCombination() { return sizeof(TaskGradientCombination); }
EXPORT int call_combine_task_gradients(const TaskGradientCombination* a, const Launch* launch) {
  return combine_task_gradients(*a, *launch);
}

#define EXPORT_OPERATION(name, Arguments)                                                              \
  EXPORT int64_t size_##Arguments() { return sizeof(Arguments); }                                      \
  EXPORT int64_t call_##name##_workspace(const Arguments* a) { return name##_workspace(*a); }          \
  EXPORT int call_##name(const Arguments* a, const Launch* launch) { return name(*a, *launch); }

EXPORT_OPERATION(task_gradient_statistics, TaskGradientStatistics)
EXPORT_OPERATION(representation_gram, RepresentationGram)
EXPORT_OPERATION(graph_transpose, GraphTranspose)
EXPORT_OPERATION(edge_cosine_forward, EdgeCosineForward)
EXPORT_OPERATION(edge_cosine_backward, EdgeCosineBackward)
EXPORT_OPERATION(neighbor_sum_forward, NeighborSumForward)
EXPORT_OPERATION(neighbor_sum_backward, NeighborSumBackward)
EXPORT_OPERATION(smoothness_forward, SmoothnessForward)
EXPORT_OPERATION(smoothness_backward, SmoothnessBackward)
EXPORT_OPERATION(neighbor_attention_forward, NeighborAttentionForward)
EXPORT_OPERATION(neighbor_attention_backward, NeighborAttentionBackward)
