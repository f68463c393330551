// Helpers of the CUDA binding files: checks that need not read device memory.
#pragma once

#include "cpu/binding.h"
#include "cuda/launch.h"
#ifdef UMDA_EMULATED
#include "emulated_device.h"
#else
#include "cuda/on_device.h"
#endif

namespace umda::cuda {

inline void same_device(const Tensor& t, const Tensor& as, const char* name) {
  STD_TORCH_CHECK(on_this_device(t) && t.get_device_index() == as.get_device_index(), name,
                  " must be on the same CUDA device as the other arguments");
}

// Contiguous, of this shape (-1: any size) and type, on the device of `as`.
inline Tensor contiguous_like(const Tensor& t, const Tensor& as, std::initializer_list<int64_t> shape, ScalarType type,
                              const char* name) {
  check_shape(t, shape, name);
  check_type(t, type, name);
  same_device(t, as, name);
  return torch::stable::contiguous(t);
}

inline OptionalTensor contiguous_like(const OptionalTensor& t, const Tensor& as, std::initializer_list<int64_t> shape,
                                      ScalarType type, const char* name) {
  if (!t.has_value()) {
    return std::nullopt;
  }
  return contiguous_like(*t, as, shape, type, name);
}

inline Tensor new_workspace(const Tensor& like, int64_t bytes) { return new_tensor(like, {bytes}, ScalarType::Byte); }

template <class T>
const T* data_or_null(const OptionalTensor& t) {
  return t.has_value() ? t->const_data_ptr<T>() : nullptr;
}

}  // namespace umda::cuda
