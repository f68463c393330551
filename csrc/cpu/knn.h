// Exact k-nearest-neighbour graph inside ragged bags: arguments of the kernel in knn.cpp.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace umda {

// Strides in elements; x's innermost stride is 1. Fewer than 2^31 instances.
struct KnnArguments {
  int64_t bags, instances, width;
  const int64_t* ptr;  // [bags + 1]
  const void* x;       // [instances, width]
  int64_t x_stride;
  DType x_type;
  int64_t k;
  bool euclidean;     // minus the squared distance; else the cosine
  int32_t* neighbors;  // [instances, k], contiguous
  float* similarity;   // [instances, k], contiguous
};

}  // namespace umda

UMDA_DECLARE_KERNEL(void, knn, const ::umda::KnnArguments&)
