// Rows of one width, cut as their sums over rows ask for.
//
// Sums are taken in float32 over a tile and over a partition, which are fixed by the sizes alone, and in float64 over
// partitions: the same bits for any number of threads.
#pragma once

#include <cstdint>

#include "cpu/philox.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"
#include "parallel.h"

namespace umda::UMDA_ISA {

struct RowShape {
  RowShape(int64_t rows_, int64_t width_) : rows(rows_), width(width_) {
    constexpr int64_t kTile = 32, kTileElements = 8192;         // what the level-1 cache holds beside a row or two
    constexpr int64_t kPartition = 64, kMaxPartitions = 1024;   // bounds the partial sums
    tile = larger<int64_t>(1, smaller(kTile, kTileElements / larger<int64_t>(1, width)));
    partition = larger(kPartition, (rows + kMaxPartitions - 1) / kMaxPartitions);
    partition = (partition + tile - 1) / tile * tile;
    partitions = (rows + partition - 1) / partition;
  }

  // Random numbers of a row, and of a tile of them.
  int64_t numbers_per_row() const { return counters_per_row(width) * kCounterElements; }
  int64_t numbers_per_tile() const {
    return (tile * numbers_per_row() + kRandomElements - 1) / kRandomElements * kRandomElements;
  }

  int64_t rows, width, tile, partition, partitions;
};

// f(first, count, numbers) for every tile of the partition, `numbers` being the random ones of its rows, one row behind
// the other, or null without a seed.
template <class F>
UMDA_INLINE void in_tiles(const RowShape& shape, int64_t partition, const int64_t* seed, uint16_t* numbers, F&& f) {
  const int64_t begin = partition * shape.partition, end = smaller(shape.rows, begin + shape.partition);
  const int64_t counters = counters_per_row(shape.width);
  for (int64_t first = begin; first < end; first += shape.tile) {
    const int64_t count = smaller(shape.tile, end - first);
    if (seed != nullptr) {
      random_numbers(static_cast<uint64_t>(*seed), first * counters, count * counters, numbers);
    }
    f(first, count, seed == nullptr ? nullptr : numbers);
  }
}

// to[d] = the sum of parts[p * stride + d] over all partitions.
template <class T>
void sum_partitions(const float* parts, int64_t partitions, int64_t stride, int64_t width, T* to) {
  constexpr int64_t kColumns = 256;
  parallel_ranges((width + kColumns - 1) / kColumns, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kColumns, count = smaller(kColumns, width - first);
      double total[kColumns] = {};
      for (int64_t p = 0; p < partitions; ++p) {
        for (int64_t d = 0; d < count; ++d) {
          total[d] += static_cast<double>(parts[p * stride + first + d]);
        }
      }
      for (int64_t d = 0; d < count; ++d) {
        to[first + d] = from_float<T>(static_cast<float>(total[d]));
      }
    }
  });
}

// float32 [width] of a vector of any storage type; zeros of none.
inline void widen_row(const void* from, DType type, int64_t width, float* to) {
  __builtin_memset(to, 0, static_cast<size_t>(width) * sizeof(float));
  if (from != nullptr) {
    UMDA_DISPATCH_DTYPE(type, for (int64_t d = 0; d < width; ++d) {
      to[d] = to_float(static_cast<const scalar_t*>(from)[d]);
    });
  }
}

}  // namespace umda::UMDA_ISA
