// Gram matrix of task gradients on the instances behind an attention pooling (docs/model.md, section 4).
//
//   d_score_s[i,t] = A[i,t] P_s[b,t].(z[i] - pooled[b,t])                             P_s: gradient of loss s on pooled
//   c_s[i] = sum_t d_score_s[i,t] w[t],  e_s[i] = [c_s gate (1 - value^2), c_s value gate (1 - gate)]          [2 H]
//   g_s[i] = sum_t A[i,t] P_s[b,t] + [W_a; W_b]^T e_s[i];   gram[s,r] = sum_i g_s[i].g_r[i]
//
// Traffic: reads z, value, gate and A once ((D + 2 H + T) N elements) and P once per bag and unit. Work: N S 2 H D
// multiply-adds through the weights of the scores, 2 N S T D + N S S D / 2 for the rest: bound by arithmetic.
//
// A block takes a unit of 16 to 64 instances, whatever the bags, and passes through the steps above with all losses,
// keeping what lies between them in a workspace of its own (a few hundred kilobytes: level-2 cache); [S, N, D] is never
// there. The products of a unit are summed in float32 within a lane, in float64 beyond, and those of the units in order, so
// results do not depend on the grid.
#include "cuda/representation_gram.h"

#include "cuda/device.h"
#include "cuda/products.h"

namespace umda::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kTile = 64, kDepth = 16;  // rows and columns of g that a block makes at once, and terms in shared memory
constexpr int kOwn = 4;                 // rows and columns of them that are a thread's
constexpr int kMaxUnit = 64;
constexpr int64_t kMaxSlots = 528, kMinSlots = 64, kMaxWorkspace = int64_t{64} << 20;
static_assert(kTile / kOwn * (kTile / kOwn) == kThreads && kTile * kDepth == kOwn * kThreads);

// Fewer losses, longer units: the rows of a unit should fill a tile.
int64_t unit_length(int64_t losses) { return losses >= 4 ? 16 : losses >= 2 ? 32 : kMaxUnit; }

struct Common {
  RepresentationGram a;
  int64_t length, units;
  float *d_scores, *hidden, *gradients;  // of all slots
  double* products;                      // [losses * (losses + 1) / 2, units]
  const void* d_pooled[kRepresentationGramMaxLosses];
};
static_assert(sizeof(Common) <= 4096);

// What `count` items of all threads of a block are dealt out by.
template <class F>
__device__ __forceinline__ void each_item(int64_t count, const F& f) {
  for (int64_t item = threadIdx.x; item < count; item += kThreads) {
    f(item);
  }
}

// One block per unit.
template <class Z>
__global__ void __launch_bounds__(kThreads, 2) multiply_units(const __grid_constant__ Common c) {
  UMDA_SHARED_ARRAY(float4, left, kDepth * (kTile / 4 + 1));
  UMDA_SHARED_ARRAY(float4, right, kDepth * (kTile / 4));
  UMDA_SHARED_ARRAY(int64_t, bags, kMaxUnit);
  const RepresentationGram& a = c.a;
  const int lane = lane_id(), warp = warp_id(), thread = static_cast<int>(threadIdx.x);
  const int losses = static_cast<int>(a.losses), tasks = static_cast<int>(a.tasks);
  const int width = static_cast<int>(a.width), hidden = static_cast<int>(a.hidden);
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * losses * c.length;
  float* const d_scores = c.d_scores + slot * tasks;     // [losses * rows, tasks]
  float* const slopes = c.hidden + slot * 2 * hidden;    // e: [losses * rows, 2 hidden]
  float* const gradients = c.gradients + slot * width;  // g: [losses * rows, width]
  for (int64_t unit = blockIdx.x; unit < c.units; unit += gridDim.x) {
    const int64_t first = unit * c.length;
    const int rows = static_cast<int>(smaller(c.length, a.instances - first)), all = losses * rows;
    if (thread < rows) {
      bags[thread] = find_segment(a.ptr, a.bags, first + thread);
    }
    __syncthreads();

    // A warp per loss, instance and task.
    for (int64_t item = warp; item < static_cast<int64_t>(all) * tasks; item += kWarps) {
      const int row = static_cast<int>(item / tasks), t = static_cast<int>(item % tasks), r = row % rows;
      const int64_t at = (bags[r] * tasks + t) * width;
      const Z* const p = static_cast<const Z*>(c.d_pooled[row / rows]) + at;
      const Z* const pooled = static_cast<const Z*>(a.pooled) + at;
      const Z* const z = static_cast<const Z*>(a.z) + (first + r) * a.z_stride;
      float sum = 0.0f;
      for (int d = lane; d < width; d += kWarp) {
        sum = fmaf(to_float(p[d]), to_float(z[d]) - to_float(pooled[d]), sum);
      }
      sum = sum_warp(sum);
      if (lane == 0) {
        d_scores[item] = a.attention[(first + r) * tasks + t] * sum;
      }
    }
    __syncthreads();

    each_item(static_cast<int64_t>(all) * hidden, [&](int64_t item) {
      const int row = static_cast<int>(item / hidden), h = static_cast<int>(item % hidden);
      float sum = 0.0f;
      for (int t = 0; t < tasks; ++t) {
        sum = fmaf(d_scores[static_cast<int64_t>(row) * tasks + t], a.score_weight[t * hidden + h], sum);
      }
      const int64_t i = (first + row % rows) * hidden + h;
      const float v = load_any(a.value, i, a.hidden_type), u = load_any(a.gate, i, a.hidden_type);
      float* const to = slopes + static_cast<int64_t>(row) * 2 * hidden + h;
      to[0] = sum * u * (1.0f - v * v);
      to[hidden] = sum * u * v * (1.0f - u);
    });
    __syncthreads();

    const int row_of = thread / (kTile / kOwn) * kOwn, column_of = thread % (kTile / kOwn) * kOwn;
    for (int row0 = 0; row0 < all; row0 += kTile) {
      for (int column0 = 0; column0 < width; column0 += kTile) {
        float sums[kOwn][kOwn] = {};
        for (int k0 = 0; k0 < 2 * hidden; k0 += kDepth) {
#pragma unroll
          for (int i = 0; i < kOwn; ++i) {
            const int item = thread + i * kThreads;
            {
              const int k = item % kDepth, row = item / kDepth;
              const bool inside = row0 + row < all && k0 + k < 2 * hidden;
              reinterpret_cast<float*>(left + k * (kTile / 4 + 1))[row] =
                  inside ? slopes[static_cast<int64_t>(row0 + row) * 2 * hidden + k0 + k] : 0.0f;
            }
            const int k = k0 + item / kTile, column = column0 + item % kTile;
            float x = 0.0f;
            if (column < width && k < 2 * hidden) {
              x = k < hidden ? a.value_weight[static_cast<int64_t>(k) * width + column]
                             : a.gate_weight[static_cast<int64_t>(k - hidden) * width + column];
            }
            reinterpret_cast<float*>(right)[item] = x;
          }
          __syncthreads();
#pragma unroll
          for (int k = 0; k < kDepth; ++k) {
            float x[kOwn], y[kOwn];
            unpack(load_vector<uint4>(left + k * (kTile / 4 + 1) + row_of / 4), x, static_cast<const float*>(nullptr));
            unpack(load_vector<uint4>(right + k * (kTile / 4) + column_of / 4), y, static_cast<const float*>(nullptr));
#pragma unroll
            for (int i = 0; i < kOwn; ++i) {
#pragma unroll
              for (int j = 0; j < kOwn; ++j) {
                sums[i][j] = fmaf(x[i], y[j], sums[i][j]);
              }
            }
          }
          __syncthreads();
        }
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          const int row = smaller(row0 + row_of + i, all - 1), r = row % rows;  // past the last, that one again
          const Z* p = static_cast<const Z*>(c.d_pooled[row / rows]) + bags[r] * tasks * width;
          for (int t = 0; t < tasks; ++t, p += width) {
            const float weight = a.attention[(first + r) * tasks + t];
#pragma unroll
            for (int j = 0; j < kOwn; ++j) {
              const int column = column0 + column_of + j;
              sums[i][j] = column < width ? fmaf(weight, to_float(p[column]), sums[i][j]) : 0.0f;
            }
          }
#pragma unroll
          for (int j = 0; j < kOwn; ++j) {
            const int column = column0 + column_of + j;
            if (column < width && row0 + row_of + i < all) {
              gradients[static_cast<int64_t>(row) * width + column] = sums[i][j];
            }
          }
        }
      }
    }
    __syncthreads();

    // A warp per pair of losses.
    const int64_t span = static_cast<int64_t>(rows) * width;
    for (int pair = warp; pair < product_index(0, losses); pair += kWarps) {
      const int t = product_row(pair), s = pair - product_index(0, t);
      float sum = 0.0f;
      for (int64_t i = lane; i < span; i += kWarp) {
        sum = fmaf(gradients[s * span + i], gradients[t * span + i], sum);
      }
      const double total = sum_lanes(static_cast<double>(sum), 1, kWarp);
      if (lane == 0) {
        c.products[pair * c.units + unit] = total;
      }
    }
    __syncthreads();
  }
}

int64_t slots_of(const RepresentationGram& a) {
  const int64_t length = unit_length(a.losses);
  const int64_t bytes = a.losses * length * (a.tasks + 2 * a.hidden + a.width) * static_cast<int64_t>(sizeof(float));
  const int64_t fit = larger(kMinSlots, smaller(kMaxSlots, kMaxWorkspace / larger<int64_t>(bytes, 1)));
  return smaller(fit, divide_up(a.instances, length));
}

struct Space {
  Space(const RepresentationGram& a, void* base) : space(base), slots(slots_of(a)) {
    const int64_t rows = slots * a.losses * unit_length(a.losses);
    products = space.take<double>(a.losses * (a.losses + 1) / 2 * divide_up(a.instances, unit_length(a.losses)));
    d_scores = space.take<float>(rows * a.tasks);
    hidden = space.take<float>(rows * 2 * a.hidden);
    gradients = space.take<float>(rows * a.width);
  }
  Workspace space;
  int64_t slots;
  double* products;
  float *d_scores, *hidden, *gradients;
};

}  // namespace

int64_t representation_gram_workspace(const RepresentationGram& a) { return Space(a, nullptr).space.size(); }

int representation_gram(const RepresentationGram& a, const Launch& launch) {
  const Space space(a, a.workspace);
  Common c{a, unit_length(a.losses), 0, space.d_scores, space.hidden, space.gradients, space.products, {}};
  c.units = divide_up(a.instances, c.length);
  for (int64_t s = 0; s < a.losses; ++s) {
    c.d_pooled[s] = a.d_pooled[s];
  }
  // Every block needs a slot of the workspace.
  const Launch limited{launch.stream, static_cast<int>(smaller<int64_t>(launch.max_blocks, larger<int64_t>(space.slots, 1)))};
  UMDA_DISPATCH_DTYPE(a.z_type, run(limited, multiply_units<scalar_t>, c.units, 1, kThreads, 0, c));
  launch_sum_products(space.products, c.units, static_cast<int>(a.losses), nullptr, a.gram, launch);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace umda::cuda
