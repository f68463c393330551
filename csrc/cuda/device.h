// What the kernels share: storage types, 16-byte accesses, sums across a warp, launches.
//
// Kernels are written against this header and the CUDA language only, so that the same source compiles with nvcc and,
// through tests/cuda_host/cuda_emulation.h, as plain C++ that runs on the host.
#pragma once

#include <cstdint>

#include "cuda/launch.h"
#include "dtype.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
// A shared array of fixed size, and the block's dynamic shared memory. Macros, because emulated blocks take both from
// memory with guard zones.
#define UMDA_SHARED_ARRAY(type, name, count) __shared__ type name[count]
#define UMDA_CHECK_ALIGNED(p, bytes)
#define UMDA_DYNAMIC_SHARED(type, name)                             \
  extern __shared__ __align__(16) unsigned char umda_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(umda_dynamic_shared)
#else
#include "cuda_emulation.h"
#endif

namespace umda::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kWarp = 32;
constexpr int kPerLane = 8;  // columns of a row that one lane holds: two 16-byte loads of float32, one of 16-bit types
constexpr int kMaxShared = 48 << 10;  // dynamic shared memory that needs no opt-in, in bytes

template <class T>
__host__ __device__ constexpr T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
__host__ __device__ constexpr T larger(T a, T b) {
  return a < b ? b : a;
}
// Rows that a loop loads before it uses the first, so that several loads are on their way at once. At most four, as 32
// lanes make at most eight groups: then 32 rows are a whole number of iterations.
template <bool kVector>
constexpr int kBatch = kVector ? 4 : 1;

__host__ __device__ constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

// ---- storage types ---------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bfloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float to_float(float16 x) { return __half2float(__ushort_as_half(x.bits)); }

__device__ __forceinline__ void assign(float& to, float x) { to = x; }
__device__ __forceinline__ void assign(bfloat16& to, float x) { to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
__device__ __forceinline__ void assign(float16& to, float x) { to.bits = __half_as_ushort(__float2half_rn(x)); }

// Element of an array whose type is known at run time only: for small arrays beside a large one, where a type of its
// own would multiply the kernels. The branch is the same for all threads.
__device__ __forceinline__ float load_any(const void* from, int64_t i, DType type) {
  switch (type) {
    case DType::float32:
      return static_cast<const float*>(from)[i];
    case DType::bfloat16:
      return to_float(static_cast<const bfloat16*>(from)[i]);
    default:
      return to_float(static_cast<const float16*>(from)[i]);
  }
}

__device__ __forceinline__ void store_any(void* to, int64_t i, DType type, float x) {
  switch (type) {
    case DType::float32:
      static_cast<float*>(to)[i] = x;
      break;
    case DType::bfloat16:
      assign(static_cast<bfloat16*>(to)[i], x);
      break;
    default:
      assign(static_cast<float16*>(to)[i], x);
      break;
  }
}

// Vector accesses. load_vector reads any memory, __ldg (below) only what no thread writes while the kernel runs.
template <class V>
__device__ __forceinline__ V load_vector(const void* from) {
  UMDA_CHECK_ALIGNED(from, sizeof(V));
  return *static_cast<const V*>(from);
}
template <class V>
__device__ __forceinline__ void store_vector(void* to, const V& x) {
  UMDA_CHECK_ALIGNED(to, sizeof(V));
  *static_cast<V*>(to) = x;
}

// To global memory. From an ordinary store of a vector that was made of parts, nvcc 13.0 makes four of 4 bytes.
__device__ __forceinline__ void store_global(void* to, const uint4& x) {
#ifdef __CUDACC__
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(x.x), "r"(x.y), "r"(x.z),
               "r"(x.w)
               : "memory");
#else
  store_vector(to, x);
#endif
}

// ---- rows ------------------------------------------------------------------------------------------------
//
// A row of `width` elements is cut into tiles of 8 * lanes columns, each read by `lanes` neighbouring lanes
// (a power of two, 4..32; the other lanes of the warp take other rows). One lane holds 8 columns of a tile: one run of
// 8 for 16-bit types, two runs of 4 for float32, 4 * lanes apart, so that every load of a warp is contiguous.

template <class T>
constexpr int kRun = 16 / static_cast<int>(sizeof(T));

// Whether all rows can be accessed 16 bytes at a time from end to end.
template <class T>
inline bool aligned_rows(const void* data, int64_t stride, int64_t width) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % kRun<T> == 0 && width % kRun<T> == 0;
}

inline int lanes_for(int64_t width) {
  int lanes = 4;
  while (lanes < kWarp && lanes * kPerLane < width) {
    lanes *= 2;
  }
  return lanes;
}

__device__ __forceinline__ void unpack(const uint4& raw, float* x, const float*) {
  x[0] = __uint_as_float(raw.x);
  x[1] = __uint_as_float(raw.y);
  x[2] = __uint_as_float(raw.z);
  x[3] = __uint_as_float(raw.w);
}
__device__ __forceinline__ void unpack(const uint4& raw, float* x, const bfloat16*) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(words[i] << 16);
    x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}
__device__ __forceinline__ void unpack(const uint4& raw, float* x, const float16*) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = to_float(float16{static_cast<uint16_t>(words[i] & 0xffffu)});
    x[2 * i + 1] = to_float(float16{static_cast<uint16_t>(words[i] >> 16)});
  }
}

__device__ __forceinline__ uint4 pack(const float* x, const float*) {
  return make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3]));
}
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  T a, b;
  assign(a, low);
  assign(b, high);
  return static_cast<uint32_t>(a.bits) | static_cast<uint32_t>(b.bits) << 16;
}
template <class T>
__device__ __forceinline__ uint4 pack(const float* x, const T*) {
  return make_uint4(pack_pair<T>(x[0], x[1]), pack_pair<T>(x[2], x[3]), pack_pair<T>(x[4], x[5]),
                    pack_pair<T>(x[6], x[7]));
}

// First column of a lane's run j in the tile that starts at `tile`.
template <class T>
__device__ __forceinline__ int run_column(int tile, int j, int lane, int lanes) {
  return tile + (j * lanes + lane) * kRun<T>;
}

// The 8 columns of lane `lane` of `lanes`; 0 past the end of the row, and everywhere when the row is not wanted. kVector,
// for aligned rows, is a choice of the caller: with a branch between them, loads would not overlap.
template <bool kVector, class T>
__device__ __forceinline__ void load8(float (&x)[kPerLane], const T* row, int width, int tile, int lane, int lanes,
                                      bool wanted = true) {
#pragma unroll
  for (int j = 0; j < kPerLane / kRun<T>; ++j) {
    const int c = run_column<T>(tile, j, lane, lanes);
    float* const to = x + j * kRun<T>;
    if constexpr (kVector) {
      uint4 raw = make_uint4(0, 0, 0, 0);
      if (wanted && c < width) {
        raw = __ldg(reinterpret_cast<const uint4*>(row + c));
      }
      unpack(raw, to, row);
    } else {
#pragma unroll
      for (int i = 0; i < kRun<T>; ++i) {
        to[i] = wanted && c + i < width ? to_float(row[c + i]) : 0.0f;
      }
    }
  }
}

template <bool kVector, class T>
__device__ __forceinline__ void store8(const float (&x)[kPerLane], T* row, int width, int tile, int lane, int lanes) {
#pragma unroll
  for (int j = 0; j < kPerLane / kRun<T>; ++j) {
    const int c = run_column<T>(tile, j, lane, lanes);
    const float* const from = x + j * kRun<T>;
    if constexpr (kVector) {
      if (c < width) {
        store_global(row + c, pack(from, static_cast<const T*>(row)));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kRun<T>; ++i) {
        if (c + i < width) {
          assign(row[c + i], from[i]);
        }
      }
    }
  }
}

// The same columns of a row of floats as a lane holds of a row of T. Aligned when the row of T is.
template <class T>
__device__ __forceinline__ int quarter_column(int tile, int j, int lane, int lanes) {
  return run_column<T>(tile, 4 * j / kRun<T>, lane, lanes) + 4 * j % kRun<T>;
}

template <class T, bool kVector>
__device__ __forceinline__ void load8_float(float (&x)[kPerLane], const float* row, int width, int tile, int lane,
                                            int lanes) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int c = quarter_column<T>(tile, j, lane, lanes);
    if constexpr (kVector) {
      uint4 raw = make_uint4(0, 0, 0, 0);
      if (c < width) {
        raw = __ldg(reinterpret_cast<const uint4*>(row + c));
      }
      unpack(raw, x + 4 * j, row);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[4 * j + i] = c + i < width ? row[c + i] : 0.0f;
      }
    }
  }
}

template <class T, bool kVector>
__device__ __forceinline__ void store8_float(const float (&x)[kPerLane], float* row, int width, int tile, int lane,
                                             int lanes) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int c = quarter_column<T>(tile, j, lane, lanes);
    if constexpr (kVector) {
      if (c < width) {
        store_global(row + c, pack(x + 4 * j, static_cast<const float*>(row)));
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (c + i < width) {
          row[c + i] = x[4 * j + i];
        }
      }
    }
  }
}

// ---- sums across lanes: butterflies, whose order depends on nothing but the lanes ----------------------------

// Over lanes that differ in the bits [from, to) of their number (powers of two); all of them get the result.
__device__ __forceinline__ float sum_lanes(float x, int from, int to) {
  for (int offset = from; offset < to; offset *= 2) {
    x += __shfl_xor_sync(kFullWarp, x, offset);
  }
  return x;
}
__device__ __forceinline__ double sum_lanes(double x, int from, int to) {
  for (int offset = from; offset < to; offset *= 2) {
    x += __shfl_xor_sync(kFullWarp, x, offset);
  }
  return x;
}
__device__ __forceinline__ float sum_warp(float x) { return sum_lanes(x, 1, kWarp); }

__device__ __forceinline__ float max_warp(float x) {
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, offset));
  }
  return x;
}

// ---- searches and work ------------------------------------------------------------------------------------

// The last segment s < count with ptr[s] <= x, for non-decreasing ptr[0..count] with ptr[0] <= x: the one that holds x,
// empty ones stepped over, when x < ptr[count]. Whatever ptr holds, the result lies in [0, count).
__device__ __forceinline__ int64_t find_segment(const int64_t* ptr, int64_t count, int64_t x) {
  int64_t low = 0, high = count - 1;
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    if (ptr[middle] <= x) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) / kWarp; }
__device__ __forceinline__ int64_t first_warp() {
  return (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
}
__device__ __forceinline__ int64_t num_warps() { return static_cast<int64_t>(gridDim.x) * blockDim.x / kWarp; }
__device__ __forceinline__ int64_t first_thread() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int64_t num_threads() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// Launches a kernel on as many blocks as `items` need at `per_block` each, at most launch.max_blocks; on none for no
// items.
template <class... P, class... A>
void run(const Launch& launch, void (*kernel)(P...), int64_t items, int64_t per_block, int threads, int64_t shared,
         const A&... arguments) {
  const int64_t blocks = smaller<int64_t>(divide_up(items, per_block), launch.max_blocks);
  if (blocks > 0) {
#ifdef __CUDACC__
    kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), static_cast<size_t>(shared),
             static_cast<cudaStream_t>(launch.stream)>>>(static_cast<P>(arguments)...);
#else
    emulation::launch(static_cast<unsigned>(blocks), static_cast<unsigned>(threads), static_cast<size_t>(shared),
                      [&] { kernel(static_cast<P>(arguments)...); });
#endif
  }
}

// Scratch memory, cut into aligned arrays: first without memory, to learn the size, then with it.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<unsigned char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    T* const here = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + size_);
    size_ += divide_up(count * static_cast<int64_t>(sizeof(T)), 16) * 16;
    return here;
  }
  int64_t size() const { return size_; }

 private:
  unsigned char* base_;
  int64_t size_ = 0;
};

}  // namespace umda::cuda
