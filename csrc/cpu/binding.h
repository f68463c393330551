// Helpers of the binding files, the only ones that see torch. Validation proper (with messages for users) is done
// in Python (umda_fast/ops); what is checked here guards the memory of a direct caller of torch.ops.umda_fast.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "dtype.h"
#include "isa.h"

namespace umda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType storage_type(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16, got ",
                      torch::headeronly::toString(t.scalar_type()));
  }
}

inline void check_type(const Tensor& t, ScalarType type, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == type, name, " must be ", torch::headeronly::toString(type), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
}

// Exact shape; -1 stands for any size.
inline void check_shape(const Tensor& t, std::initializer_list<int64_t> shape, const char* name) {
  STD_TORCH_CHECK(t.dim() == static_cast<int64_t>(shape.size()), name, " must have ", shape.size(),
                  " dimensions, got ", t.dim());
  int64_t d = 0;
  for (const int64_t size : shape) {
    STD_TORCH_CHECK(size < 0 || t.size(d) == size, name, " must have size ", size, " in dimension ", d, ", got ",
                    t.size(d));
    ++d;
  }
}

// A bag pointer: int64 [B+1], from 0, never decreasing, to `total`.
inline void check_ptr(const Tensor& ptr, int64_t total, const char* name) {
  check_type(ptr, ScalarType::Long, name);
  STD_TORCH_CHECK(ptr.dim() == 1 && ptr.size(0) >= 1 && ptr.is_contiguous(), name,
                  " must be a contiguous vector of at least one element");
  const int64_t* p = ptr.const_data_ptr<int64_t>();
  const int64_t last = ptr.size(0) - 1;
  STD_TORCH_CHECK(p[0] == 0 && p[last] == total, name, " must start at 0 and end at ", total, ", got ", p[0], " and ",
                  p[last]);
  for (int64_t i = 0; i < last; ++i) {
    STD_TORCH_CHECK(p[i] <= p[i + 1], name, " must not decrease, got ", p[i], " before ", p[i + 1]);
  }
}

// The tensor itself when its innermost dimension is contiguous, else a contiguous copy.
inline Tensor inner_contiguous(const Tensor& t) {
  const int64_t d = t.dim() - 1;
  return d < 0 || t.size(d) <= 1 || t.stride(d) == 1 ? t : torch::stable::contiguous(t);
}

inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type) {
  const std::vector<int64_t> sizes(shape);
  return torch::stable::new_empty(like, sizes, type);
}

}  // namespace umda
