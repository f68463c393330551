// A row of memory, vector by vector.
#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace umda::UMDA_ISA {

// f(d, vecs, read, write) over blocks of a row of `width` elements of T: kVecs vectors, then one, then what is left of
// one. write(p, v) goes past the caches if `past_cache` (and p is of T, a whole vector).
template <int kVecs, class F>
UMDA_INLINE void in_blocks(int64_t width, bool past_cache, F&& f) {
  const auto read = [](const auto* p) UMDA_LAMBDA_INLINE { return load(p); };
  const auto write = [](auto* p, Vec v) UMDA_LAMBDA_INLINE { store(p, v); };
  int64_t d = 0;
  if (past_cache) {
    const auto past = [](auto* p, Vec v) UMDA_LAMBDA_INLINE { stream(p, v); };
    for (; d + kVecs * kWidth <= width; d += kVecs * kWidth) {
      f(d, Constant<kVecs>{}, read, write, past);
    }
  }
  for (; d + kVecs * kWidth <= width; d += kVecs * kWidth) {
    f(d, Constant<kVecs>{}, read, write, write);
  }
  for (; d + kWidth <= width; d += kWidth) {
    f(d, Constant<1>{}, read, write, write);
  }
  if (d < width) {
    const int n = static_cast<int>(width - d);
    const auto write_some = [n](auto* p, Vec v) UMDA_LAMBDA_INLINE { store(p, v, n); };
    f(d, Constant<1>{}, [n](const auto* p) UMDA_LAMBDA_INLINE { return load(p, n); }, write_some, write_some);
  }
}

}  // namespace umda::UMDA_ISA
