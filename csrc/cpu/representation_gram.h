// Gram matrix of task gradients on the instances behind an attention pooling: arguments of representation_gram.cpp.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace umda {

// Strides in elements; innermost strides are 1.
struct RepresentationGram {
  int64_t losses, bags, instances, tasks, width, hidden;
  const int64_t* ptr;            // [bags + 1]
  const void* const* d_pooled;   // [losses], each [bags, tasks, width], contiguous, of z's type
  const void* pooled;            // [bags, tasks, width], contiguous, of z's type
  const void* z;                 // [instances, width]
  int64_t z_stride;
  DType z_type;
  const float* attention;  // [instances, tasks], contiguous
  const void* value;       // [instances, hidden], contiguous
  const void* gate;        // [instances, hidden], contiguous
  DType hidden_type;
  const float* score_weight;  // [tasks, hidden], contiguous
  const float* value_weight;  // [hidden, width], contiguous
  const float* gate_weight;   // [hidden, width], contiguous
  float* gram;                // [losses, losses], contiguous
};

}  // namespace umda

UMDA_DECLARE_KERNEL(void, representation_gram, const ::umda::RepresentationGram&)
