// Products of matrices that stay in registers and caches, for kernel files.
#pragma once

#include <cstdint>

#include "simd.h"

namespace umda::UMDA_ISA {
namespace {

constexpr int kRows = 6, kVecs = kWidth == 16 ? 4 : 2;  // of the product held in registers

// A matrix whose element (row r, term k) is at data[r * row + k * term].
struct Rows {
  const float* data;
  int64_t row, term;
};

// A matrix of `depth` rows whose column v * kWidth + lane of row k is at data[k * row + v * vec + lane].
struct Columns {
  const float* data;
  int64_t row, vec;
};

// c[r, :] (+)= sum_k a[r, k] b[k, :] for kR rows and kV vectors, the last of `count` lanes where kTail.
template <int kR, int kV, bool kTail>
UMDA_INLINE void multiply_block(const Rows& a, int64_t depth, const Columns& b, float* c, int64_t c_stride, bool add,
                                int count) {
  static_assert(!kTail || kV == 1);
  Vec sums[kR][kV];
  for (int r = 0; r < kR; ++r) {
    for (int v = 0; v < kV; ++v) {
      sums[r][v] = zero();
    }
  }
  const float *left = a.data, *row = b.data;
  for (int64_t k = 0; k < depth; ++k, left += a.term, row += b.row) {
    Vec column[kV];
    for (int v = 0; v < kV; ++v) {
      column[v] = kTail ? load(row + v * b.vec, count) : load(row + v * b.vec);
    }
    for (int r = 0; r < kR; ++r) {
      const Vec x = splat(left[r * a.row]);
      for (int v = 0; v < kV; ++v) {
        sums[r][v] = fma(x, column[v], sums[r][v]);
      }
    }
  }
  for (int r = 0; r < kR; ++r) {
    for (int v = 0; v < kV; ++v) {
      float* const to = c + r * c_stride + v * kWidth;
      if (add) {  // here and not at the start: the chain of roundings is as short as the terms are few
        sums[r][v] = sums[r][v] + (kTail ? load(to, count) : load(to));
      }
      if constexpr (kTail) {
        store(to, sums[r][v], count);
      } else {
        store(to, sums[r][v]);
      }
    }
  }
}

template <int kV, bool kTail>
void multiply_panel(int64_t rows, const Rows& a, int64_t depth, const Columns& b, float* c, int64_t c_stride, bool add,
                    int count) {
  int64_t r = 0;
  const auto blocks = [&](auto size) UMDA_LAMBDA_INLINE {
    constexpr int kR = decltype(size)::value;
    for (; r + kR <= rows; r += kR) {
      const Rows here{a.data + r * a.row, a.row, a.term};
      multiply_block<kR, kV, kTail>(here, depth, b, c + r * c_stride, c_stride, add, count);
    }
  };
  blocks(Constant<kRows>{});
  blocks(Constant<2>{});
  blocks(Constant<1>{});
}

// c [rows, width] (+)= a [rows, depth] b [depth, width]: a panel of b after the other, which stays in the level-1 cache.
inline void multiply(int64_t rows, int64_t width, int64_t depth, const Rows& a, const Columns& b, float* c,
                     int64_t c_stride, bool add) {
  int64_t d = 0;
  const auto panel = [&] { return Columns{b.data + d / kWidth * b.vec, b.row, b.vec}; };
  for (; d + kVecs * kWidth <= width; d += kVecs * kWidth) {
    multiply_panel<kVecs, false>(rows, a, depth, panel(), c + d, c_stride, add, kWidth);
  }
  for (; d + kWidth <= width; d += kWidth) {
    multiply_panel<1, false>(rows, a, depth, panel(), c + d, c_stride, add, kWidth);
  }
  if (d < width) {
    multiply_panel<1, true>(rows, a, depth, panel(), c + d, c_stride, add, static_cast<int>(width - d));
  }
}

}  // namespace
}  // namespace umda::UMDA_ISA
