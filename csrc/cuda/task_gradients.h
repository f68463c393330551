// Per-task gradient statistics and their combination: arguments of the launchers in task_gradients.cu.
#pragma once

#include <cstdint>

#include "cuda/launch.h"
#include "dtype.h"

namespace umda::cuda {

constexpr int64_t kTaskGradientsMaxTasks = 64;

// A piece is a run of columns that a task's gradient has in one tensor. The three lists are read on the host, before the
// launcher returns.
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
  float* gram;      // [tasks, tasks], contiguous
  void* workspace;  // of task_gradient_statistics_workspace bytes, aligned to 16
};

struct TaskGradientCombination {
  int64_t tasks, columns;
  const float* ema;  // [tasks, columns], innermost stride 1
  int64_t ema_stride;
  const float* weights;  // [tasks]
  void* out;             // [columns], contiguous
  DType out_type;
};

int64_t task_gradient_statistics_workspace(const TaskGradientStatistics& a);

// Each returns a cudaError_t.
int task_gradient_statistics(const TaskGradientStatistics& a, const Launch& launch);
int combine_task_gradients(const TaskGradientCombination& a, const Launch& launch);

}  // namespace umda::cuda
