// The CUDA language on the host: __global__ code compiles as plain C++ against this header and runs, one fiber per
// thread, block after block. For tests; nothing here is fast.
//
// What it checks and a GPU would not say:
//   - a barrier or warp operation that some threads reach and others do not (or at another line) is an error;
//   - shared memory, static and dynamic, starts as 0xff bytes (NaN) in every block and lies between guard zones;
//   - vector accesses are aligned, and __ldg reads global memory;
//   - threads, warps and blocks run in an order of choice (set_order): a result that changes with it is a race.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __grid_constant__

#define UMDA_SHARED_ARRAY(type, name, count)                                                \
  static const char name##_key = 0;                                                         \
  type* const name = static_cast<type*>(::emulation::static_shared(&name##_key, sizeof(type) * (count)))
#define UMDA_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(::emulation::dynamic_shared())

#define UMDA_CHECK_ALIGNED(p, bytes) ::emulation::check_aligned(p, bytes, __FILE__, __LINE__)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using cudaError_t = int;
using cudaStream_t = void*;

namespace emulation {

struct Thread {
  uint3 thread, block;
  dim3 block_size, grid_size;
};

// The thread that runs now.
extern Thread* current;

// A point in the source at which threads meet.
struct Site {
  const char* operation;
  const char* file;
  int line;
};

using Body = void (*)(void* context);
void run_grid(unsigned blocks, unsigned threads, size_t shared, Body body, void* context);
void* static_shared(const void* key, size_t bytes);
void* dynamic_shared();
void meet_block(const Site& site);
// Lane `lane` of the caller's warp hands in `value`; every lane gets all 32, once all have come.
const uint64_t* meet_warp(const Site& site, unsigned mask, uint64_t value);
int lane();
bool is_shared(const void* p);
void fail(const char* what, const char* file, int line);

inline void check_aligned(const void* p, size_t bytes, const char* file, int line) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) {
    fail("misaligned access", file, line);
  }
}

template <class F>
void launch(unsigned blocks, unsigned threads, size_t shared, const F& kernel) {
  run_grid(
      blocks, threads, shared, [](void* context) { (*static_cast<const F*>(context))(); },
      const_cast<void*>(static_cast<const void*>(&kernel)));
}

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulation

#define threadIdx (::emulation::current->thread)
#define blockIdx (::emulation::current->block)
#define blockDim (::emulation::current->block_size)
#define gridDim (::emulation::current->grid_size)

#define EMULATION_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline cudaError_t cudaGetLastError() { return 0; }
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 1;
  return 0;
}

inline void __syncthreads(EMULATION_HERE) { emulation::meet_block({"__syncthreads", file, line}); }
inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATION_HERE) {
  emulation::meet_warp({"__syncwarp", file, line}, mask, 0);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATION_HERE) {
  const uint64_t* all = emulation::meet_warp({"__shfl_sync", file, line}, mask, emulation::to_bits(value));
  const int first = emulation::lane() / width * width;
  return emulation::from_bits<T>(all[first + (source & (width - 1))]);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EMULATION_HERE) {
  const uint64_t* all = emulation::meet_warp({"__shfl_xor_sync", file, line}, mask, emulation::to_bits(value));
  const int lane = emulation::lane(), source = lane ^ bits;
  // A lane of a later group keeps its own value; one of an earlier group may be read.
  return emulation::from_bits<T>(all[source / width > lane / width ? lane : source]);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATION_HERE) {
  const uint64_t* all = emulation::meet_warp({"__shfl_up_sync", file, line}, mask, emulation::to_bits(value));
  const int lane = emulation::lane(), source = lane - static_cast<int>(delta);
  return emulation::from_bits<T>(all[source < lane / width * width ? lane : source]);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATION_HERE) {
  const uint64_t* all = emulation::meet_warp({"__shfl_down_sync", file, line}, mask, emulation::to_bits(value));
  const int lane = emulation::lane(), source = lane + static_cast<int>(delta);
  return emulation::from_bits<T>(all[source >= (lane / width + 1) * width ? lane : source]);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATION_HERE) {
  const uint64_t* all = emulation::meet_warp({"__ballot_sync", file, line}, mask, predicate != 0);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) {
    bits |= static_cast<unsigned>(all[i]) << i;
  }
  return bits;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline float __uint_as_float(uint32_t x) { return emulation::from_bits<float>(x); }
inline float __int_as_float(int32_t x) { return emulation::from_bits<float>(static_cast<uint32_t>(x)); }
inline uint32_t __float_as_uint(float x) { return static_cast<uint32_t>(emulation::to_bits(x)); }

template <class T>
T __ldg(const T* from, EMULATION_HERE) {
  emulation::check_aligned(from, sizeof(T), file, line);
  if (emulation::is_shared(from)) {
    emulation::fail("__ldg of shared memory", file, line);
  }
  return *from;
}
// Integers only: floating atomics would make results depend on the order.
template <class T>
T atomicAdd(T* to, T value) {
  static_assert(static_cast<T>(1) / 2 == 0, "integers only");
  const T before = *to;
  *to += value;
  return before;
}

// ---- 16-bit floating point, round to nearest even ------------------------------------------------------------

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline uint16_t __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (x != x) {
    return {0x7fff};
  }
  const uint32_t bits = __float_as_uint(x);
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

inline float __half2float(__half x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31u, fraction = x.bits & 1023u;
  if (exponent == 31) {
    return __uint_as_float(sign | 0x7f800000u | fraction << 13);
  }
  if (exponent == 0) {
    const float small = static_cast<float>(fraction) * 0x1p-24f;
    return sign != 0 ? -small : small;
  }
  return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
}

inline __half __float2half_rn(float x) {
  const uint32_t bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) {
    return {0x7fff};
  }
  if (size >= 0x477ff000u) {  // 65520, from where on the nearest is infinity
    return {static_cast<uint16_t>(sign | 0x7c00u)};
  }
  if (size < 0x38800000u) {  // below 2^-14: a multiple of 2^-24, which nearbyint rounds to even
    const float steps = std::nearbyintf(std::fabs(x) * 0x1p24f);
    return {static_cast<uint16_t>(sign | static_cast<uint32_t>(steps))};
  }
  return {static_cast<uint16_t>(sign | ((size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13))};
}
