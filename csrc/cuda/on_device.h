// A binding's device: which one, its stream, its errors, and the dispatch key to register under. Seen by binding.h only.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>

#include "cuda/launch.h"

#define UMDA_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(umda_fast, CUDA, m)

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
  explicit OnDevice(const torch::stable::Tensor& t) : guard_(t.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &launch_.stream));
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

inline bool on_this_device(const torch::stable::Tensor& t) { return t.is_cuda(); }

}  // namespace umda::cuda
