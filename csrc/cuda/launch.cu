// What the bindings ask of the CUDA runtime. No kernels.
#include "cuda/launch.h"

#include "cuda/device.h"

namespace umda::cuda {

int count_multiprocessors(int device, int* count) {
  return static_cast<int>(cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device));
}

}  // namespace umda::cuda
