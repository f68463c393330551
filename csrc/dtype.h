// Storage types of the kernels, on the CPU and on CUDA alike. Plain data: no function is shared between objects.
#pragma once

#include <cstdint>

namespace umda {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

enum class DType : int { float32, bfloat16, float16 };

}  // namespace umda

// Calls the statement with `scalar_t` as the storage type of dtype.
#define UMDA_DISPATCH_DTYPE(dtype, ...)            \
  switch (dtype) {                                 \
    case ::umda::DType::float32: {                 \
      using scalar_t = float;                      \
      __VA_ARGS__;                                 \
      break;                                       \
    }                                              \
    case ::umda::DType::bfloat16: {                \
      using scalar_t = ::umda::bfloat16;           \
      __VA_ARGS__;                                 \
      break;                                       \
    }                                              \
    case ::umda::DType::float16: {                 \
      using scalar_t = ::umda::float16;            \
      __VA_ARGS__;                                 \
      break;                                       \
    }                                              \
  }
