// Per-task gradient statistics and their combination.
//
//   ema[t] <- beta ema[t] + (1 - beta) g[t];   gram[s,t] = correction[s] correction[t] ema[s].ema[t]
//   out = sum_t weights[t] ema[t]
//
// Traffic: statistics read T*P gradients and T*P floats and write T*P floats, the combination reads T*P and writes P
// elements. Work: T*(T+1)/2 multiply-adds per column for the Gram matrix: bound by memory up to about T = 24.
//
// The gradients of a task are many tensors, of any sizes. Their addresses travel in the arguments of the kernel, as many
// as fit, so nothing is concatenated or copied to the device first. Every piece is cut into chunks of kChunk columns; a
// block takes a chunk, kept in shared memory a few hundred columns at a time for the products. A chunk's products are
// summed in float32 over at most a few hundred columns per thread and in float64 from there on, in a fixed order.
#include "cuda/task_gradients.h"

#include "cuda/device.h"
#include "cuda/products.h"

namespace umda::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kChunk = 4096;
constexpr int kTile = 4;  // tasks: a thread adds the products of 4 x 4 tasks
constexpr int kMaxPieces = 32, kMaxPointers = 288;

struct Piece {
  int64_t begin, size;  // columns of ema
  int64_t first_chunk;  // of all pieces, not only those of this table
  int aligned;          // all addresses allow four elements at a time
};

// Pieces of one launch. A kernel's arguments may have 4096 bytes.
struct Table {
  int count;
  int64_t chunk_end;
  Piece pieces[kMaxPieces];
  const void* grads[kMaxPointers];  // [count, tasks]
  uint8_t types[kMaxPointers];
};

struct Common {
  float* ema;
  int64_t ema_stride, chunks;  // of all pieces
  const bool* active;
  double* products;  // [tasks * (tasks + 1) / 2, chunks]
  float keep, add;   // beta, 1 - beta
  int tasks, columns;  // columns kept in shared memory at a time
};
static_assert(sizeof(Table) + sizeof(Common) <= 4096);

__host__ __device__ constexpr int padded(int tasks) { return (tasks + kTile - 1) / kTile * kTile; }
// Columns are padded by 16 bytes, which spreads the rows over the banks.
__host__ __device__ constexpr int row_stride(int columns) { return columns + 4; }
constexpr int columns_at_a_time(int tasks) { return tasks <= 32 ? 256 : 128; }
__host__ __device__ constexpr int tile_pairs(int tasks) {
  return (padded(tasks) / kTile) * (padded(tasks) / kTile + 1) / 2;
}
// Threads that share a pair of tiles: a power of two.
__host__ __device__ constexpr int slices(int tasks) {
  int n = kThreads;
  while (n * tile_pairs(tasks) > kThreads) {
    n /= 2;
  }
  return n;
}
int64_t shared_bytes(int tasks) {
  const int64_t rows = static_cast<int64_t>(sizeof(float)) * padded(tasks) * row_stride(columns_at_a_time(tasks));
  const int64_t sums = static_cast<int64_t>(sizeof(double)) * kThreads / smaller(slices(tasks), kWarp) * kTile * kTile;
  return larger(rows, sums);
}

__device__ __forceinline__ void load4(float (&x)[4], const void* from, int64_t i, int count, DType type, bool aligned) {
  if (aligned && count == 4) {
    if (type == DType::float32) {
      unpack(load_vector<uint4>(static_cast<const float*>(from) + i), x, static_cast<const float*>(nullptr));
      return;
    }
    const uint2 raw = load_vector<uint2>(static_cast<const uint16_t*>(from) + i);
    const uint32_t words[2] = {raw.x, raw.y};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint16_t bits = static_cast<uint16_t>(words[j / 2] >> 16 * (j % 2));
      x[j] = type == DType::bfloat16 ? to_float(bfloat16{bits}) : to_float(float16{bits});
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    x[j] = j < count ? load_any(from, i + j, type) : 0.0f;
  }
}

__device__ __forceinline__ void store4(const float (&x)[4], float* to, int count, bool aligned) {
  if (aligned && count == 4) {
    store_vector(to, pack(x, static_cast<const float*>(nullptr)));
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (j < count) {
      to[j] = x[j];
    }
  }
}

// One block per chunk. kMany: a pair of tiles has so few threads that each would add thousands of columns; their sums
// move on to float64 in between.
template <bool kMany>
__global__ void __launch_bounds__(kThreads) smooth_and_multiply(const Table table, const Common c) {
  UMDA_DYNAMIC_SHARED(unsigned char, shared);
  float* const rows = reinterpret_cast<float*>(shared);     // [padded(tasks), row_stride(columns)]
  double* const sums = reinterpret_cast<double*>(shared);  // [threads / run, 16], afterwards
  const int thread = static_cast<int>(threadIdx.x), groups = c.columns / 4, stride = row_stride(c.columns);
  const int pairs = tile_pairs(c.tasks), share = slices(c.tasks), run = smaller(share, kWarp);
  const int pair = thread / share, slice = thread % share;
  int tile_t = 0;  // pair = tile_t * (tile_t + 1) / 2 + tile_s, tile_s <= tile_t
  while ((tile_t + 1) * (tile_t + 2) / 2 <= pair) {
    ++tile_t;
  }
  const int tile_s = pair - tile_t * (tile_t + 1) / 2;
  int piece_index = 0;
  for (int64_t chunk = table.pieces[0].first_chunk + blockIdx.x; chunk < table.chunk_end; chunk += gridDim.x) {
    while (piece_index + 1 < table.count && table.pieces[piece_index + 1].first_chunk <= chunk) {
      ++piece_index;
    }
    const Piece& piece = table.pieces[piece_index];
    const bool aligned = piece.aligned != 0;
    const int64_t begin = (chunk - piece.first_chunk) * kChunk, end = smaller(begin + kChunk, piece.size);
    float products[kTile][kTile] = {};
    double totals[kTile][kTile] = {};
    for (int64_t first = begin; first < end; first += c.columns) {
      for (int item = thread; item < padded(c.tasks) * groups; item += kThreads) {
        const int t = item / groups, group = item % groups;
        const int64_t column = first + 4 * group;
        const int count = t < c.tasks ? static_cast<int>(larger<int64_t>(0, smaller<int64_t>(4, end - column))) : 0;
        float x[4] = {};
        if (count > 0) {
          float* const ema = c.ema + t * c.ema_stride + piece.begin + column;
          load4(x, ema, 0, count, DType::float32, aligned);
          if (c.active == nullptr || c.active[t]) {
            float g[4];
            const int address = piece_index * c.tasks + t;
            load4(g, table.grads[address], column, count, static_cast<DType>(table.types[address]), aligned);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              x[j] = fmaf(c.keep, x[j], c.add * g[j]);
            }
            store4(x, ema, count, aligned);
          }
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          x[j] = j < count ? x[j] : 0.0f;
        }
        store4(x, rows + t * stride + 4 * group, 4, true);
      }
      __syncthreads();
      for (int group = slice; pair < pairs && group < groups; group += share) {
        float a[kTile][4], b[kTile][4];
#pragma unroll
        for (int i = 0; i < kTile; ++i) {
          load4(a[i], rows + (tile_s * kTile + i) * stride, 4 * group, 4, DType::float32, true);
          load4(b[i], rows + (tile_t * kTile + i) * stride, 4 * group, 4, DType::float32, true);
        }
#pragma unroll
        for (int i = 0; i < kTile; ++i) {
#pragma unroll
          for (int j = 0; j < kTile; ++j) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              products[i][j] = fmaf(a[i][k], b[j][k], products[i][j]);
            }
          }
        }
      }
      if constexpr (kMany) {
#pragma unroll
        for (int i = 0; i < kTile; ++i) {
#pragma unroll
          for (int j = 0; j < kTile; ++j) {
            totals[i][j] += products[i][j];
            products[i][j] = 0.0f;
          }
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
#pragma unroll
      for (int j = 0; j < kTile; ++j) {
        const double sum = sum_lanes(totals[i][j] + products[i][j], 1, run);
        if (thread % run == 0) {
          sums[thread / run * kTile * kTile + i * kTile + j] = sum;
        }
      }
    }
    __syncthreads();
    for (int item = thread; item < pairs * kTile * kTile; item += kThreads) {
      const int of = item / (kTile * kTile), i = item / kTile % kTile, j = item % kTile;
      double sum = 0.0;
      for (int r = 0; r < share / run; ++r) {
        sum += sums[(of * (share / run) + r) * kTile * kTile + item % (kTile * kTile)];
      }
      int tile = 0;
      while ((tile + 1) * (tile + 2) / 2 <= of) {
        ++tile;
      }
      const int t = tile * kTile + j, s = (of - tile * (tile + 1) / 2) * kTile + i;
      if (s <= t && t < c.tasks) {
        c.products[product_index(s, t) * c.chunks + chunk] = sum;
      }
    }
    __syncthreads();
  }
}

// One block per pair of tasks s <= t.
__global__ void __launch_bounds__(kThreads)
    sum_products(const double* products, int64_t chunks, int tasks, const float* correction, float* gram) {
  UMDA_SHARED_ARRAY(double, sums, kThreads / kWarp);
  const int thread = static_cast<int>(threadIdx.x);
  for (int index = static_cast<int>(blockIdx.x); index < tasks * (tasks + 1) / 2; index += static_cast<int>(gridDim.x)) {
    const int t = product_row(index), s = index - product_index(0, t);
    double sum = 0.0;
    for (int64_t chunk = thread; chunk < chunks; chunk += kThreads) {
      sum += products[index * chunks + chunk];
    }
    sum = sum_lanes(sum, 1, kWarp);
    if (lane_id() == 0) {
      sums[warp_id()] = sum;
    }
    __syncthreads();
    if (thread == 0) {
      double total = 0.0;
      for (int w = 0; w < kThreads / kWarp; ++w) {
        total += sums[w];
      }
      const float value = static_cast<float>(correction == nullptr ? total : total * correction[s] * correction[t]);
      gram[s * tasks + t] = value;
      gram[t * tasks + s] = value;
    }
    __syncthreads();
  }
}

// One thread per four columns.
__global__ void __launch_bounds__(kThreads) combine(const TaskGradientCombination a, bool aligned) {
  for (int64_t group = first_thread(); group < divide_up(a.columns, 4); group += num_threads()) {
    const int64_t column = 4 * group;
    const int count = static_cast<int>(smaller<int64_t>(4, a.columns - column));
    float sum[4] = {};
#pragma unroll 4
    for (int64_t t = 0; t < a.tasks; ++t) {
      float x[4];
      load4(x, a.ema + t * a.ema_stride, column, count, DType::float32, aligned);
      const float w = a.weights[t];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        sum[j] = fmaf(w, x[j], sum[j]);
      }
    }
    if (a.out_type == DType::float32) {
      store4(sum, static_cast<float*>(a.out) + column, count, aligned);
    } else {
      for (int j = 0; j < count; ++j) {
        store_any(a.out, column + j, a.out_type, sum[j]);
      }
    }
  }
}

int64_t piece_chunks(const TaskGradientStatistics& a, int64_t piece) {
  return divide_up(a.piece_begin[piece + 1] - a.piece_begin[piece], kChunk);
}

int64_t total_chunks(const TaskGradientStatistics& a) {
  int64_t chunks = 0;
  for (int64_t piece = 0; piece < a.pieces; ++piece) {
    chunks += piece_chunks(a, piece);
  }
  return chunks;
}

bool aligned_to(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

bool aligned_ema(const float* ema, int64_t stride) { return aligned_to(ema, 16) && stride % 4 == 0; }

}  // namespace

void launch_sum_products(const double* products, int64_t chunks, int count, const float* correction, float* gram,
                         const Launch& launch) {
  run(launch, sum_products, product_index(0, count), 1, kThreads, 0, products, chunks, count, correction, gram);
}

int64_t task_gradient_statistics_workspace(const TaskGradientStatistics& a) {
  return total_chunks(a) * a.tasks * (a.tasks + 1) / 2 * static_cast<int64_t>(sizeof(double));
}

int task_gradient_statistics(const TaskGradientStatistics& a, const Launch& launch) {
  const int tasks = static_cast<int>(a.tasks);
  double* const products = static_cast<double*>(a.workspace);
  const Common common{a.ema,
                      a.ema_stride,
                      total_chunks(a),
                      a.active,
                      products,
                      static_cast<float>(a.beta),
                      static_cast<float>(1.0 - a.beta),
                      tasks,
                      columns_at_a_time(tasks)};
  int64_t chunk = 0;
  for (int64_t piece = 0; piece < a.pieces;) {
    Table table{};
    const int64_t first_chunk = chunk;
    for (; piece < a.pieces && table.count < kMaxPieces && (table.count + 1) * tasks <= kMaxPointers; ++piece) {
      if (piece_chunks(a, piece) == 0) {
        continue;
      }
      bool aligned = aligned_ema(a.ema, a.ema_stride) && a.piece_begin[piece] % 4 == 0;
      for (int t = 0; t < tasks; ++t) {
        const DType type = a.types[t * a.pieces + piece];
        const void* const grad = a.grads[t * a.pieces + piece];
        table.grads[table.count * tasks + t] = grad;
        table.types[table.count * tasks + t] = static_cast<uint8_t>(type);
        aligned = aligned && aligned_to(grad, type == DType::float32 ? 16 : 8);
      }
      table.pieces[table.count++] = {a.piece_begin[piece], a.piece_begin[piece + 1] - a.piece_begin[piece], chunk,
                                     aligned ? 1 : 0};
      chunk += piece_chunks(a, piece);
    }
    table.chunk_end = chunk;
    run(launch, slices(tasks) < 16 ? smooth_and_multiply<true> : smooth_and_multiply<false>, chunk - first_chunk, 1,
        kThreads, shared_bytes(tasks), table, common);
  }
  launch_sum_products(products, common.chunks, tasks, a.correction, a.gram, launch);
  return static_cast<int>(cudaGetLastError());
}

int combine_task_gradients(const TaskGradientCombination& a, const Launch& launch) {
  const bool aligned = aligned_ema(a.ema, a.ema_stride) && aligned_to(a.out, 16);
  run(launch, combine, divide_up(a.columns, 4), kThreads, kThreads, 0, a, aligned);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace umda::cuda
