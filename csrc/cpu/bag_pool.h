// Multi-task attention pooling of ragged bags: arguments of the kernels in bag_pool.cpp.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace umda {

// Sizes and inputs common to both directions. Strides in elements; z's innermost stride is 1.
struct BagPoolInput {
  int64_t bags, instances, tasks, width;
  const int64_t* ptr;  // [bags + 1]
  const void* z;       // [instances, width]
  int64_t z_stride;
  DType z_type;
  const void* scores;  // [instances, tasks]
  int64_t scores_stride, scores_task_stride;
  DType scores_type;
};

struct BagPoolForward {
  BagPoolInput in;
  void* pooled;    // [bags, tasks, width], contiguous, of z's type
  float* entropy;  // [bags, tasks]
  float* lse;      // [bags, tasks]
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
};

}  // namespace umda

UMDA_DECLARE_KERNEL(void, bag_pool_forward, const ::umda::BagPoolForward&)
UMDA_DECLARE_KERNEL(void, bag_pool_backward, const ::umda::BagPoolBackward&)
