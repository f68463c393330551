// Inner products of a few long rows, for kernel files: float32 over short chains, float64 beyond.
#pragma once

#include <cstdint>

#include "simd.h"

namespace umda::UMDA_ISA {
namespace {

constexpr int64_t kChain = 1024;  // columns summed in float32, kWidth sums side by side
constexpr int kTile = 4;          // rows x rows of which products are held in registers

// products[s, t] += rows[first + s] . rows[second + t] over `columns` <= kChain columns, for a tile of rows. Rows past
// the end stand for the last one. On the diagonal, s <= t only.
template <bool kDiagonal>
void add_tile(const float* rows, int64_t stride, int64_t count, int64_t first, int64_t second, int64_t columns,
              double* products) {
  const float *left[kTile], *right[kTile];
  for (int i = 0; i < kTile; ++i) {
    left[i] = rows + smaller(first + i, count - 1) * stride;
    right[i] = rows + smaller(second + i, count - 1) * stride;
  }
  Vec sums[kTile][kTile];
  for (int s = 0; s < kTile; ++s) {
    for (int t = 0; t < kTile; ++t) {
      sums[s][t] = zero();
    }
  }
  const auto step = [&](auto&& read) UMDA_LAMBDA_INLINE {
    Vec column[kTile];
    for (int t = 0; t < kTile; ++t) {
      column[t] = read(right[t]);
    }
    for (int s = 0; s < kTile; ++s) {
      const Vec row = kDiagonal ? column[s] : read(left[s]);
      for (int t = kDiagonal ? s : 0; t < kTile; ++t) {
        sums[s][t] = fma(row, column[t], sums[s][t]);
      }
    }
  };
  int64_t i = 0;
  for (; i + kWidth <= columns; i += kWidth) {
    step([i](const float* p) UMDA_LAMBDA_INLINE { return load(p + i); });
  }
  if (i < columns) {
    const int n = static_cast<int>(columns - i);
    step([i, n](const float* p) UMDA_LAMBDA_INLINE { return load(p + i, n); });
  }
  for (int s = 0; s < kTile; ++s) {
    for (int t = kDiagonal ? s : 0; t < kTile; ++t) {
      if (first + s < count && second + t < count) {
        products[(first + s) * count + second + t] += static_cast<double>(sum(sums[s][t]));
      }
    }
  }
}

// products[s, t] += rows[s] . rows[t] for s <= t < count; what lies below the diagonal is undefined.
inline void add_products(const float* rows, int64_t stride, int64_t count, int64_t columns, double* products) {
  for (int64_t begin = 0; begin < columns; begin += kChain) {
    const int64_t chain = smaller(kChain, columns - begin);
    for (int64_t first = 0; first < count; first += kTile) {
      add_tile<true>(rows + begin, stride, count, first, first, chain, products);
      for (int64_t second = first + kTile; second < count; second += kTile) {
        add_tile<false>(rows + begin, stride, count, first, second, chain, products);
      }
    }
  }
}

// gram = products of all groups, added in order, times scale(s, t); both triangles.
template <class F>
void store_gram(const double* products, int64_t groups, int64_t count, float* gram, const F& scale) {
  for (int64_t s = 0; s < count; ++s) {
    for (int64_t t = s; t < count; ++t) {
      double total = 0.0;
      for (int64_t g = 0; g < groups; ++g) {
        total += products[(g * count + s) * count + t];
      }
      gram[s * count + t] = gram[t * count + s] = static_cast<float>(total * scale(s, t));
    }
  }
}

}  // namespace
}  // namespace umda::UMDA_ISA
