// GELU(x) = x Phi(x), Phi the normal distribution function, and its derivative Phi(x) + x phi(x).
#pragma once

#include "cpu/simd.h"

namespace umda::UMDA_ISA {

// Phi(x), and exp(-x^2 / 2) = sqrt(2 pi) phi(x).
struct Normal {
  Vec below, bell;
};

// 1 - Phi(a) = exp(-a^2 / 2) R(a) for a = |x|, R(a) = t p(t), t = 1 / (1 + 0.34 a), p a minimax polynomial (relative error
// 3e-8): nothing cancels in the lower tail.
UMDA_INLINE Normal normal(Vec x) {
  using Integers = int __attribute__((vector_size(sizeof(Vec))));
  const Vec size = (Vec)((Integers)x & 0x7fffffff);
  const Vec t = splat(1.0f) / fma(splat(0.34f), size, splat(1.0f));
  Vec p = splat(-0x1.abf4bap-6f);
  p = fma(p, t, splat(0x1.1db19cp-3f));
  p = fma(p, t, splat(-0x1.17afcap-2f));
  p = fma(p, t, splat(0x1.9e1138p-3f));
  p = fma(p, t, splat(-0x1.6e536p-5f));
  p = fma(p, t, splat(0x1.d8826ep-4f));
  p = fma(p, t, splat(0x1.d7d99ap-4f));
  p = fma(p, t, splat(0x1.16c1fcp-3f));
  p = fma(p, t, splat(0x1.15c034p-3f));
  const Vec bell = exp(x * x * splat(-0.5f));
  const Vec beyond = bell * (p * t);
  return {x < zero() ? beyond : splat(1.0f) - beyond, bell};
}

UMDA_INLINE Vec gelu(Vec x) { return x * normal(x).below; }

UMDA_INLINE Vec gelu_slope(Vec x) {
  const Normal at = normal(x);
  return fma(x * splat(0x1.988454p-2f), at.bell, at.below);  // 1 / sqrt(2 pi)
}

}  // namespace umda::UMDA_ISA
