// Small kernels, right and wrong ones, to test the emulation itself.
#include "cuda/device.h"

namespace umda::cuda {
namespace {

__global__ void sum_block(const float* from, float* to, int64_t count) {
  UMDA_SHARED_ARRAY(float, sums, kWarp);
  float sum = 0.0f;
  for (int64_t i = first_thread(); i < count; i += num_threads()) {
    sum += from[i];
  }
  sum = sum_warp(sum);
  if (lane_id() == 0) {
    sums[warp_id()] = sum;
  }
  __syncthreads();
  if (warp_id() == 0) {
    sum = sum_warp(lane_id() < static_cast<int>(blockDim.x) / kWarp ? sums[lane_id()] : 0.0f);
    if (lane_id() == 0) {
      to[blockIdx.x] = sum;
    }
  }
}

__global__ void shuffles(const int* from, int* to) {
  const int lane = lane_id(), x = from[lane];
  to[lane] = __shfl_sync(kFullWarp, x, lane + 5);
  to[32 + lane] = __shfl_xor_sync(kFullWarp, x, 3);
  to[64 + lane] = __shfl_up_sync(kFullWarp, x, 2);
  to[96 + lane] = __shfl_down_sync(kFullWarp, x, 7);
  to[128 + lane] = __shfl_sync(kFullWarp, x, 1, 8);
  to[160 + lane] = static_cast<int>(__ballot_sync(kFullWarp, x % 3 == 0));
}

__global__ void half_a_barrier(float*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  }
}

__global__ void two_barriers(float*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void half_a_warp(float* to) {
  if (lane_id() < 7) {
    to[0] = __shfl_sync(kFullWarp, 1.0f, 0);
  }
}

__global__ void outside_shared(float* to) {
  UMDA_SHARED_ARRAY(float, sums, 8);
  sums[threadIdx.x % 9] = 1.0f;
  to[0] = sums[0];
}

__global__ void outside_dynamic(float* to) {
  UMDA_DYNAMIC_SHARED(float, sums);
  sums[-1] = 1.0f;
  to[0] = 1.0f;
}

__global__ void shared_as_global(float* to) {
  UMDA_SHARED_ARRAY(float, values, 64);
  values[threadIdx.x] = 1.0f;
  to[threadIdx.x] = __ldg(values + threadIdx.x);
}

// Neighbours exchange a value without waiting for each other: the result depends on the order of the threads.
__global__ void race(float* to) {
  UMDA_SHARED_ARRAY(float, values, 64);
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  to[threadIdx.x] = values[(threadIdx.x + 1) % 64];
}

__global__ void misaligned(float* to) {
  const uint4 raw = __ldg(reinterpret_cast<const uint4*>(to + 1));
  to[0] = __uint_as_float(raw.x);
}

__global__ void uninitialised(float* to) {
  UMDA_SHARED_ARRAY(float, values, 4);
  if (threadIdx.x == 0) {
    to[0] = values[2];
    values[2] = 3.0f;
  }
}

__global__ void convert(const float* from, uint16_t* to, float* back, int count) {
  for (int i = static_cast<int>(first_thread()); i < count; i += static_cast<int>(num_threads())) {
    bfloat16 b;
    float16 h;
    assign(b, from[i]);
    assign(h, from[i]);
    to[i] = b.bits;
    to[count + i] = h.bits;
    back[i] = to_float(b);
    back[count + i] = to_float(h);
  }
}

}  // namespace
}  // namespace umda::cuda

using namespace umda::cuda;

extern "C" void probe_sum(const float* from, float* to, int64_t count, int max_blocks) {
  run({nullptr, max_blocks}, sum_block, count, 128, 128, 0, from, to, count);
}
extern "C" void probe_shuffles(const int* from, int* to) { run({nullptr, 1}, shuffles, 1, 1, 32, 0, from, to); }
extern "C" void probe_convert(const float* from, uint16_t* to, float* back, int count) {
  run({nullptr, 3}, convert, count, 64, 64, 0, from, to, back, count);
}
extern "C" void probe_wrong(int which, float* to) {
  void (*const kernels[])(float*) = {half_a_barrier,  two_barriers, half_a_warp, outside_shared,
                                     outside_dynamic, misaligned,   shared_as_global,
                                     race,            uninitialised};
  run({nullptr, 2}, kernels[which], 2, 1, 64, 32, to);
}
