// Fusion of views with their moments and cosines: arguments of the kernels in view_fusion.cpp.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace umda {

// [instances, views, width], innermost stride 1; null: absent. Strides in elements.
struct ViewRows {
  const void* data;
  int64_t instance_stride, view_stride, width;
  DType type;
};

// Inputs common to both directions.
struct ViewFusionInput {
  int64_t instances, views;
  ViewRows y;
  ViewRows scores;     // [instances, views], any strides
  ViewRows projected;  // or null: no cosines
  const bool* mask;    // [instances, views], contiguous, or null: every view is present
};

// Contiguous results; those of y's or projected's type where they are void.
struct ViewFusionForward {
  ViewFusionInput in;
  void* z;                 // [instances, width]
  float* beta;             // [instances, views]
  float *mean, *variance;  // [views, width]
  float* rest;             // [views, width], what float32 leaves out of mean
  int64_t* count;          // [views]
  float* cosine_sum;
  int64_t* pairs;
};

struct ViewFusionBackward {
  ViewFusionInput in;
  const void* d_z;  // [instances, width] of y's type, innermost stride 1, or null
  int64_t d_z_stride;
  const float* d_beta;                 // [instances, views], contiguous, or null
  const float *d_mean, *d_variance;    // [views, width], contiguous, or null
  const float* d_cosine_sum;           // or null
  const float *mean, *rest;            // [views, width], contiguous
  const int64_t* count;                // [views], contiguous
  void* dy;                            // [instances, views, width]
  void* d_scores;                      // [instances, views], of the scores' type
  void* d_projected;                   // as projected, or null
};

constexpr int64_t kMaxFusedViews = 16;

}  // namespace umda

UMDA_DECLARE_KERNEL(void, view_fusion_forward, const ::umda::ViewFusionForward&)
UMDA_DECLARE_KERNEL(void, view_fusion_backward, const ::umda::ViewFusionBackward&)
