// Helpers of the CUDA binding files: the caller's device and stream, checks that need not read device memory.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>

#include <stdexcept>
#include <string>

#include "cpu/binding.h"
#include "cuda/launch.h"

namespace umda::cuda {

// Throws what torch says about a cudaError_t. Bindings include no CUDA header: only nvcc knows where those are.
inline void check_launch(int error, const char* function = __builtin_FUNCTION(), int line = __builtin_LINE()) {
  char* message = nullptr;
  torch_c10_cuda_check_msg(error, __FILE__, function, static_cast<uint32_t>(line), true, &message);
  if (message != nullptr) {
    const std::string text = message;
    torch_c10_cuda_free_error_msg(message);
    throw std::runtime_error(text);
  }
}

// For the life of a binding: the tensor's device is the current one, and kernels go to its current stream. Nothing here
// waits for the device, so that calls can be captured in a CUDA graph.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) : guard_(t.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &launch_.stream));
    int multiprocessors = 0;
    check_launch(count_multiprocessors(t.get_device_index(), &multiprocessors));
    launch_.max_blocks = kBlocksPerMultiprocessor * multiprocessors;
  }
  const Launch& launch() const { return launch_; }

 private:
  // A few times what is resident at once: blocks that finish early make room for others.
  static constexpr int kBlocksPerMultiprocessor = 32;
  torch::stable::accelerator::DeviceGuard guard_;
  Launch launch_{};
};

inline void same_device(const Tensor& t, const Tensor& as, const char* name) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == as.get_device_index(), name,
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
