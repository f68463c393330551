// Where and how wide a CUDA kernel runs. Seen by bindings (torch, no CUDA syntax) and kernels (CUDA, no torch).
#pragma once

#include <cstdint>

namespace umda::cuda {

struct Launch {
  void* stream;     // a cudaStream_t
  int max_blocks;   // the largest grid; kernels loop over whatever work is left, so any number >= 1 is right
};

// Of a device; returns a cudaError_t.
int count_multiprocessors(int device, int* count);

}  // namespace umda::cuda
