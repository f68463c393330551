// Inner products that blocks leave behind, and their sum. Seen by kernels only.
#pragma once

#include <cstdint>

#include "cuda/device.h"

namespace umda::cuda {

// Where the product of rows s <= t is kept.
__host__ __device__ constexpr int product_index(int s, int t) { return t * (t + 1) / 2 + s; }

// The row t of a product, whose column is index - product_index(0, t).
__host__ __device__ constexpr int product_row(int index) {
  int t = 0;
  while (product_index(0, t + 1) <= index) {
    ++t;
  }
  return t;
}

// gram [count, count] = products [count * (count + 1) / 2, chunks], added up in a fixed order, times correction [count] on
// either side unless that is null.
void launch_sum_products(const double* products, int64_t chunks, int count, const float* correction, float* gram,
                         const Launch& launch);

}  // namespace umda::cuda
