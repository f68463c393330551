// What the bindings of operations with dropout share.
#pragma once

#include "cpu/binding.h"

namespace umda {

// The seed of the dropout, null where there is none.
inline const int64_t* seed_of(const OptionalTensor& seed, int64_t threshold) {
  STD_TORCH_CHECK(threshold >= 0 && threshold < 65536, "threshold must be in 0..65535, got ", threshold);
  if (!seed.has_value()) {
    return nullptr;
  }
  check_type(*seed, ScalarType::Long, "seed");
  check_shape(*seed, {}, "seed");
  return seed->const_data_ptr<int64_t>();
}

inline void check_same_shape(const Tensor& t, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(t.dim() == like.dim(), name, " must have ", like.dim(), " dimensions, got ", t.dim());
  for (int64_t d = 0; d < like.dim(); ++d) {
    STD_TORCH_CHECK(t.size(d) == like.size(d), name, " must have size ", like.size(d), " in dimension ", d, ", got ",
                    t.size(d));
  }
}

}  // namespace umda
