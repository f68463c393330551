// Gram matrix of task gradients on the instances behind an attention pooling: arguments of representation_gram.cu.
#pragma once

#include <cstdint>

#include "cuda/launch.h"
#include "dtype.h"

namespace umda::cuda {

constexpr int64_t kRepresentationGramMaxLosses = 128;

// All tensors but z are contiguous; strides in elements. The list of d_pooled is read on the host, before the launcher
// returns.
struct RepresentationGram {
  int64_t losses, bags, instances, tasks, width, hidden;
  const int64_t* ptr;           // [bags + 1]
  const void* const* d_pooled;  // [losses], each [bags, tasks, width], of z's type
  const void* pooled;           // [bags, tasks, width], of z's type
  const void* z;                // [instances, width], innermost stride 1
  int64_t z_stride;
  const float* attention;     // [instances, tasks]
  const void* value;          // [instances, hidden]
  const void* gate;           // [instances, hidden]
  const float* score_weight;  // [tasks, hidden]
  const float* value_weight;  // [hidden, width]
  const float* gate_weight;   // [hidden, width]
  float* gram;                // [losses, losses]
  void* workspace;            // of representation_gram_workspace bytes, aligned to 16
  DType z_type, hidden_type;
};

int64_t representation_gram_workspace(const RepresentationGram& a);

// Returns a cudaError_t.
int representation_gram(const RepresentationGram& a, const Launch& launch);

}  // namespace umda::cuda
