// What a block adds to a residual stream, and the layer norm of the sum: arguments of the kernels in
// dropout_add_norm.cpp.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace umda {

// A vector [width], or none.
struct DropoutVector {
  const void* data;
  DType type;
};

// Sizes and inputs common to both directions; everything is contiguous.
struct DropoutAddNormInput {
  int64_t rows, width;
  const void* x;  // [rows, width]
  DType type;     // of x and of the normalised rows
  DropoutVector bias, gain, norm_weight;
  DType stream_type;    // of residual and sum
  const int64_t* seed;  // of the dropout, or null: nothing is dropped
  int threshold;        // of 65536 random numbers, those that drop an element
};

struct DropoutAddNormForward {
  DropoutAddNormInput in;
  const void* residual;     // [rows, width]
  DropoutVector norm_bias;  // with norm_weight
  float eps;
  void* sum;           // [rows, width], of the stream's type
  void* normed;        // [rows, width], of x's type, or null: no layer norm
  float *mean, *rstd;  // [rows], with normed
};

struct DropoutAddNormBackward {
  DropoutAddNormInput in;
  const void* d_sum;     // [rows, width], of the stream's type, or null
  const void* d_normed;  // [rows, width], of x's type, or null
  const void* sum;       // what the forward returned
  const float *mean, *rstd;
  void* dx;          // [rows, width], of x's type
  void* d_residual;  // [rows, width], of the stream's type
  // [width], each of the type of its vector (that of norm_bias is norm_weight's), or null
  void *d_bias, *d_gain, *d_norm_weight, *d_norm_bias;
};

}  // namespace umda

UMDA_DECLARE_KERNEL(void, dropout_add_norm_forward, const ::umda::DropoutAddNormForward&)
UMDA_DECLARE_KERNEL(void, dropout_add_norm_backward, const ::umda::DropoutAddNormBackward&)
