// Multi-task attention pooling of ragged bags: arguments of the launchers in bag_pool.cu.
#pragma once

#include <cstdint>

#include "cuda/launch.h"
#include "dtype.h"

namespace umda::cuda {

constexpr int64_t kBagPoolMaxTasks = 128;

// Sizes and inputs common to both directions. Strides in elements; z's innermost stride is 1.
struct BagPoolInput {
  int64_t bags, instances, tasks, width;
  const int64_t* ptr;  // [bags + 1]
  const void* z;       // [instances, width]
  int64_t z_stride;
  const void* scores;  // [instances, tasks]
  int64_t scores_stride, scores_task_stride;
  DType z_type, scores_type;
};

struct BagPoolForward {
  BagPoolInput in;
  void* pooled;     // [bags, tasks, width], contiguous, of z's type
  float* entropy;   // [bags, tasks]
  float* lse;       // [bags, tasks]
  void* workspace;  // of bag_pool_forward_workspace bytes, aligned to 16
};

struct BagPoolBackward {
  BagPoolInput in;
  const void* d_pooled;  // [bags, tasks, width] of z's type, innermost stride 1, or null
  int64_t d_pooled_bag_stride, d_pooled_task_stride;
  const float* d_entropy;  // [bags, tasks], contiguous, or null
  const float* d_lse;      // [bags, tasks], contiguous, or null
  const void* pooled;      // what the forward returned, contiguous
  void* dz;                // [instances, width], contiguous, of z's type
  void* d_scores;          // [instances, tasks], contiguous, of scores' type
  void* workspace;         // of bag_pool_backward_workspace bytes, aligned to 16
};

int64_t bag_pool_forward_workspace(const BagPoolInput& in);
int64_t bag_pool_backward_workspace(const BagPoolInput& in);

// Each returns a cudaError_t. Every output element is written.
int bag_pool_forward(const BagPoolForward& a, const Launch& launch);
int bag_pool_backward(const BagPoolBackward& a, const Launch& launch);

}  // namespace umda::cuda
