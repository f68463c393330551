// Per-task gradient statistics and their combination: arguments of the kernels in task_gradients.cpp.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace umda {

// A piece is a run of columns that a task's gradient has in one tensor.
struct TaskGradientStatistics {
  int64_t tasks, columns, pieces;
  const int64_t* piece_begin;  // [pieces + 1], first column of each; piece_begin[pieces] = columns
  const void* const* grads;    // [tasks, pieces], contiguous memory of each
  const DType* types;          // [tasks, pieces]
  float* ema;                  // [tasks, columns], innermost stride 1
  int64_t ema_stride;
  const float* correction;  // [tasks]
  const bool* active;       // [tasks], or null: all
  double beta;
  float* gram;  // [tasks, tasks], contiguous
};

struct TaskGradientCombination {
  int64_t tasks, columns;
  const float* ema;  // [tasks, columns], innermost stride 1
  int64_t ema_stride;
  const float* weights;  // [tasks]
  void* out;             // [columns], contiguous
  DType out_type;
};

// out[o, i] = sum_b d_out[b, o] x[b, i]; innermost strides are 1.
struct LinearWeightGradient {
  int64_t batch, outputs, inputs;
  const float* d_out;  // [batch, outputs]
  int64_t d_out_stride;
  const float* x;  // [batch, inputs]
  int64_t x_stride;
  float* out;  // [outputs, inputs]
  int64_t out_stride;
};

}  // namespace umda

UMDA_DECLARE_KERNEL(void, task_gradient_statistics, const ::umda::TaskGradientStatistics&)
UMDA_DECLARE_KERNEL(void, combine_task_gradients, const ::umda::TaskGradientCombination&)
UMDA_DECLARE_KERNEL(void, linear_weight_gradient, const ::umda::LinearWeightGradient&)
