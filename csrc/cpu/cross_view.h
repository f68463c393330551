// Hybrid cross-view attention over one vector per view: arguments of the kernels in cross_view.cpp.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace umda {

// [instances, views, heads, width], innermost stride 1; null: absent. Strides in elements.
struct CrossViewRows {
  const void* data;
  int64_t instance_stride, view_stride, head_stride;
};

// Sizes and inputs common to both directions.
struct CrossViewInput {
  int64_t instances, views, heads, width;
  CrossViewRows q, k, v;
  DType type;          // of q, k, v
  CrossViewRows gate;  // [instances, views, heads], any strides
  DType gate_type;
  const float* bias;  // [heads, views, views], contiguous, or null
  const bool* mask;   // [instances, views], contiguous, or null: every view is present
};

struct CrossViewForward {
  CrossViewInput in;
  void* out;       // [instances, views, heads, width], contiguous, of the inputs' type
  float* mass;     // [instances, views, views], contiguous
  float* entropy;  // [instances, views, heads], contiguous
};

struct CrossViewBackward {
  CrossViewInput in;
  CrossViewRows d_out;                   // of the inputs' type
  const float *d_mass, *d_entropy;       // contiguous, or null
  void *dq, *dk, *dv;                    // contiguous, of the inputs' type
  void* d_gate;                          // [instances, views, heads], contiguous, of the gate's type
  float* d_bias;                         // [heads, views, views], contiguous
};

constexpr int64_t kMaxViews = 16;

}  // namespace umda

UMDA_DECLARE_KERNEL(void, cross_view_forward, const ::umda::CrossViewForward&)
UMDA_DECLARE_KERNEL(void, cross_view_backward, const ::umda::CrossViewBackward&)
