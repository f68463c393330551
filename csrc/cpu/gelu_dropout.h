// A bias, GELU and dropout: arguments of the kernels in gelu_dropout.cpp.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace umda {

// Sizes and inputs common to both directions; everything is contiguous.
struct GeluDropoutInput {
  int64_t rows, width;
  const void* x;  // [rows, width]
  DType type;
  const void* bias;  // [width], or null
  DType bias_type;
  const int64_t* seed;  // of the dropout, or null: nothing is dropped
  int threshold;        // of 65536 random numbers, those that drop an element
};

struct GeluDropoutForward {
  GeluDropoutInput in;
  void* y;  // [rows, width], of x's type
};

struct GeluDropoutBackward {
  GeluDropoutInput in;
  const void* d_y;  // [rows, width], of x's type
  void* dx;         // [rows, width], of x's type
  void* d_bias;     // [width], of the bias's type, or null
};

}  // namespace umda

UMDA_DECLARE_KERNEL(void, gelu_dropout_forward, const ::umda::GeluDropoutForward&)
UMDA_DECLARE_KERNEL(void, gelu_dropout_backward, const ::umda::GeluDropoutBackward&)
