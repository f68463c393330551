// Multi-task attention pooling of ragged bags.
//
//   A[i,t] = softmax over the instances i of a bag of scores[i,t];  pooled[b,t] = sum_i A[i,t] z[i]
//
// Traffic: forward reads z once for all tasks (N*D elements; more than 8 tasks read it again, from cache), backward
// reads z once and writes dz once; the rest (scores, T*D per bag, partial sums: at most 2*T*D floats per 64..256
// instances) is small. Work: 2*N*T*D multiply-adds forward, 4*N*T*D backward: bound by memory up to about T = 16.
//
// Balance: instances are cut into units of equal length, whatever the bags; a warp takes a unit and, inside it, one
// segment after another, a segment being what a bag has in the unit. A bag that lies in one unit is finished there.
// Of the others a unit holds two at most, the one that reaches into it from the left (slot 2u of the partial results)
// and the one that reaches out to the right (slot 2u+1); their parts are merged in a second launch, in order. So the
// host needs to know neither the bags nor any count that depends on them, and results do not depend on the grid.
#include "cuda/bag_pool.h"

#include "cuda/device.h"

namespace umda::cuda {
namespace {

constexpr int kThreads = 128;  // small blocks: registers limit what fits a multiprocessor
constexpr int kWarps = kThreads / kWarp;
constexpr float kNegligible = -126.0f;  // exp of it is 0 in float32; stands in for -inf where 0 * -inf would be NaN

// Softmax statistics of one task's scores: the maximum m, sum exp(s - m), sum exp(s - m) (s - m). Relative to the maximum
// a large common offset of the scores costs no digits: entropy = log(sum) - weighted / sum.
struct State {
  float max, sum, weighted;
};

// Longer units mean fewer partial results, shorter ones more warps.
int64_t unit_length(int64_t instances) { return instances >= (1 << 18) ? 256 : instances >= (1 << 16) ? 128 : 64; }

struct Segment {
  int64_t bag, begin, end;  // instances [begin, end)
  bool whole;               // the bag has no others
  bool last;                // the bag has others, in earlier units, and none in later ones
  int64_t slot;             // of its partial results, if not whole
};

// The segments of a unit, in order. A ptr that is not what it should be (it is not read on the host) may leave outputs
// unwritten, but makes nothing loop for ever or reach outside.
struct UnitSegments {
  __device__ __forceinline__ UnitSegments(const BagPoolInput& in, int64_t unit_index, int64_t length)
      : unit(unit_index),
        begin(unit_index * length),
        end(smaller(begin + length, in.instances)),
        next(begin),
        bag(find_segment(in.ptr, in.bags, begin)) {}

  __device__ __forceinline__ bool take(const BagPoolInput& in, Segment& segment) {
    if (next >= end) {
      return false;
    }
    if (in.ptr[bag + 1] <= next && bag + 1 < in.bags) {
      // Mostly the next bag; a long run of empty ones is not walked through.
      ++bag;
      if (in.ptr[bag + 1] <= next) {
        bag += find_segment(in.ptr + bag, in.bags - bag, next);
      }
    }
    const int64_t first = in.ptr[bag], last = in.ptr[bag + 1];
    if (last <= next) {
      return false;
    }
    const bool begins = first >= begin, ends = last <= end;
    segment = {bag, next, smaller(last, end), begins && ends, !begins && ends, 2 * unit + (begins ? 1 : 0)};
    next = segment.end;
    return true;
  }

  int64_t unit, begin, end, next, bag;
};

__device__ __forceinline__ float score(const BagPoolInput& in, int64_t i, int64_t t) {
  return load_any(in.scores, i * in.scores_stride + t * in.scores_task_stride, in.scores_type);
}

__device__ __forceinline__ float finite_or_zero(float max) { return max == -infinity() ? 0.0f : max; }

// Statistics of task t over a segment, the same in all lanes.
__device__ __forceinline__ State segment_state(const BagPoolInput& in, const Segment& segment, int64_t t) {
  float top = -infinity();
  for (int64_t i = segment.begin + lane_id(); i < segment.end; i += kWarp) {
    top = fmaxf(top, score(in, i, t));
  }
  top = max_warp(top);
  // Where every score is -inf, s - max would be NaN; the other parts of the bag may be finite.
  const float shift = finite_or_zero(top);
  float sum = 0.0f, weighted = 0.0f;
  for (int64_t i = segment.begin + lane_id(); i < segment.end; i += kWarp) {
    const float x = score(in, i, t) - shift;
    const float p = expf(x);
    sum += p;
    weighted = fmaf(p, fmaxf(kNegligible, x), weighted);
  }
  return {top, sum_warp(sum), sum_warp(weighted)};
}

// How much the sums of a part are multiplied by when the maximum becomes `top`, and the logarithm of that.
__device__ __forceinline__ float part_shift(const State& part, float top) {
  // A part of nothing but -inf; one with a NaN in it has a sum, of NaN.
  const bool nothing = part.max == -infinity() && part.sum == 0.0f;
  return nothing ? kNegligible : fmaxf(kNegligible, part.max - top);
}

// The parts of a bag that ends in unit `last_unit` and began in an earlier one: slots slot(0), slot(1), ...
struct Parts {
  __device__ __forceinline__ Parts(const BagPoolInput& in, int64_t bag, int64_t last_unit, int64_t length) {
    first_unit = larger<int64_t>(in.ptr[bag], 0) / length;
    count = last_unit - first_unit + 1;
  }
  // A bag owns the slot on the right of the unit in which it begins, on the left of the others.
  __device__ __forceinline__ int64_t slot(int64_t part) const { return 2 * (first_unit + part) + (part == 0 ? 1 : 0); }

  int64_t first_unit, count;
};

// Statistics of a bag from those of its parts, the same in all lanes.
__device__ __forceinline__ State merge_states(const Parts& parts, const State* states, int64_t tasks, int64_t t) {
  float top = -infinity();
  for (int64_t part = lane_id(); part < parts.count; part += kWarp) {
    top = fmaxf(top, states[parts.slot(part) * tasks + t].max);
  }
  top = max_warp(top);
  float sum = 0.0f, weighted = 0.0f;
  for (int64_t part = lane_id(); part < parts.count; part += kWarp) {
    const State state = states[parts.slot(part) * tasks + t];
    const float shift = part_shift(state, top), scale = expf(shift);
    sum = fmaf(scale, state.sum, sum);
    weighted = fmaf(scale, fmaf(state.sum, shift, state.weighted), weighted);
  }
  return {top, sum_warp(sum), sum_warp(weighted)};
}

__device__ __forceinline__ void store_statistics(const BagPoolForward& a, int64_t to, const State& s) {
  const float log_sum = logf(s.sum);
  const bool nothing = s.sum == 0.0f;
  const float entropy = log_sum - s.weighted / s.sum;
  a.lse[to] = nothing ? -infinity() : s.max + log_sum;
  a.entropy[to] = nothing || entropy < 0.0f ? 0.0f : entropy;  // rounding may leave a little less than 0
}

__device__ __forceinline__ float inverse(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }

// ---- forward ---------------------------------------------------------------------------------------------

// One warp per unit. For the weights a lane takes every (32 / kTasks)th row of one task; they go through shared memory, 32
// rows at a time. For the sums it takes 8 columns of every task. `ending` gets the bag of several units that ends in each
// unit, or -1.
template <class Z, int kTasks, bool kVector>
__global__ void __launch_bounds__(kThreads, kTasks > 4 ? 2 : kTasks > 1 ? 3 : 4)
    pool_units(const BagPoolForward a, int64_t length, int lanes, State* states, float* parts, int64_t* ending) {
  UMDA_SHARED_ARRAY(float, all_weights, kWarps * kWarp * kTasks);
  const BagPoolInput& in = a.in;
  const int lane = lane_id(), column_lane = lane % lanes, group = lane / lanes, groups = kWarp / lanes;
  const int width = static_cast<int>(in.width), tile_width = lanes * kPerLane;
  float* const weights = all_weights + warp_id() * kWarp * kTasks;
  const int64_t units = divide_up(in.instances, length);
  for (int64_t unit = first_warp(); unit < units; unit += num_warps()) {
    UnitSegments segments(in, unit, length);
    int64_t ending_here = -1;
    for (Segment segment; segments.take(in, segment);) {
      ending_here = segment.last ? segment.bag : ending_here;
      for (int64_t t0 = 0; t0 < in.tasks; t0 += kTasks) {
        const int64_t task = t0 + lane % kTasks;
        const bool used = task < in.tasks;
        State state = {-infinity(), 0.0f, 0.0f};
        for (int64_t i = segment.begin + lane / kTasks; used && i < segment.end; i += kWarp / kTasks) {
          state.max = fmaxf(state.max, score(in, i, task));
        }
        for (int offset = kTasks; offset < kWarp; offset *= 2) {
          state.max = fmaxf(state.max, __shfl_xor_sync(kFullWarp, state.max, offset));
        }
        const float shift = finite_or_zero(state.max);
        for (int tile = 0; tile == 0 || tile < width; tile += tile_width) {
          float sums[kTasks][kPerLane] = {};
          for (int64_t first = segment.begin; first < segment.end; first += kWarp) {
            const int rows = static_cast<int>(smaller<int64_t>(kWarp, segment.end - first));
#pragma unroll 1
            for (int item = lane; item < kWarp * kTasks; item += kWarp) {
              float p = 0.0f;
              if (used && item / kTasks < rows) {
                const float x = score(in, first + item / kTasks, task) - shift;
                p = expf(x);
                if (tile == 0) {
                  state.sum += p;
                  state.weighted = fmaf(p, fmaxf(kNegligible, x), state.weighted);
                }
              }
              weights[item] = p;
            }
            __syncwarp();
            for (int next = group; next - group < rows; next += kBatch<kVector> * groups) {
              float x[kBatch<kVector>][kPerLane];
#pragma unroll
              for (int i = 0; i < kBatch<kVector>; ++i) {
                const int r = next + i * groups;
                const Z* const row = static_cast<const Z*>(in.z) + (first + r) * in.z_stride;
                load8<kVector>(x[i], row, width, tile, column_lane, lanes, r < rows);
              }
#pragma unroll
              for (int i = 0; i < kBatch<kVector>; ++i) {
#pragma unroll
                for (int t = 0; t < kTasks; ++t) {
                  const float p = weights[(next + i * groups) * kTasks + t];  // 0 from the last row on
#pragma unroll
                  for (int c = 0; c < kPerLane; ++c) {
                    sums[t][c] = fmaf(p, x[i][c], sums[t][c]);
                  }
                }
              }
            }
            __syncwarp();
          }
          if (tile == 0) {
            state.sum = sum_lanes(state.sum, kTasks, kWarp);
            state.weighted = sum_lanes(state.weighted, kTasks, kWarp);
          }
          const float factor = segment.whole ? inverse(state.sum) : 1.0f;
#pragma unroll
          for (int t = 0; t < kTasks; ++t) {
            const float scale = __shfl_sync(kFullWarp, factor, t);
#pragma unroll
            for (int c = 0; c < kPerLane; ++c) {
              sums[t][c] = sum_lanes(sums[t][c], lanes, kWarp) * scale;
            }
            if (group == 0 && t0 + t < in.tasks) {
              if (segment.whole) {
                Z* const to = static_cast<Z*>(a.pooled) + (segment.bag * in.tasks + t0 + t) * in.width;
                store8<kVector>(sums[t], to, width, tile, column_lane, lanes);
              } else {
                float* const to = parts + (segment.slot * in.tasks + t0 + t) * in.width;
                store8_float<Z, kVector>(sums[t], to, width, tile, column_lane, lanes);
              }
            }
          }
        }
        if (lane < kTasks && used) {
          if (segment.whole) {
            store_statistics(a, segment.bag * in.tasks + task, state);
          } else {
            states[segment.slot * in.tasks + task] = state;
          }
        }
      }
    }
    if (lane == 0) {
      ending[unit] = ending_here;
    }
  }
}

// One block per unit and task: the bag of several units that ends there. Each warp adds a run of the parts.
template <class Z, bool kVector>
__global__ void __launch_bounds__(kThreads, 4)
    merge_units(const BagPoolForward a, int64_t length, const State* states, const float* parts_sums,
                const int64_t* ending) {
  constexpr int kTile = kWarp * kPerLane;
  UMDA_SHARED_ARRAY(float, shared, kWarps * kTile);
  const BagPoolInput& in = a.in;
  const int lane = lane_id(), warp = warp_id(), width = static_cast<int>(in.width);
  const int64_t units = divide_up(in.instances, length);
  for (int64_t item = blockIdx.x; item < units * in.tasks; item += gridDim.x) {
    const int64_t unit = item / in.tasks, t = item % in.tasks;
    const int64_t bag = ending[unit];
    if (bag < 0) {
      continue;
    }
    const Parts parts(in, bag, unit, length);
    const State total = merge_states(parts, states, in.tasks, t);
    const int64_t per_warp = divide_up(parts.count, kWarps);
    const int64_t begin = warp * per_warp, end = smaller(begin + per_warp, parts.count);
    const float factor = inverse(total.sum);
    for (int tile = 0; tile < width; tile += kTile) {
      float sums[kPerLane] = {};
      for (int64_t first = begin; first < end; first += kWarp) {
        const int count = static_cast<int>(smaller<int64_t>(kWarp, end - first));
        float scale = 0.0f;
        if (lane < count) {
          scale = expf(part_shift(states[parts.slot(first + lane) * in.tasks + t], total.max));
        }
        for (int part = 0; part < count; part += kBatch<kVector>) {
          float x[kBatch<kVector>][kPerLane], s[kBatch<kVector>];
#pragma unroll
          for (int i = 0; i < kBatch<kVector>; ++i) {
            // Past the last part, that one again, times 0.
            const int64_t slot = parts.slot(first + smaller(part + i, count - 1));
            s[i] = __shfl_sync(kFullWarp, scale, part + i);
            load8_float<Z, kVector>(x[i], parts_sums + (slot * in.tasks + t) * in.width, width, tile, lane, kWarp);
          }
#pragma unroll
          for (int i = 0; i < kBatch<kVector>; ++i) {
#pragma unroll
            for (int c = 0; c < kPerLane; ++c) {
              sums[c] = fmaf(s[i], x[i][c], sums[c]);
            }
          }
        }
      }
#pragma unroll
      for (int c = 0; c < kPerLane; ++c) {
        shared[(warp * kPerLane + c) * kWarp + lane] = sums[c];
      }
      __syncthreads();
      if (warp == 0) {
#pragma unroll
        for (int c = 0; c < kPerLane; ++c) {
          float sum = 0.0f;
          for (int w = 0; w < kWarps; ++w) {
            sum += shared[(w * kPerLane + c) * kWarp + lane];
          }
          sums[c] = sum * factor;
        }
        Z* const to = static_cast<Z*>(a.pooled) + (bag * in.tasks + t) * in.width;
        store8<kVector>(sums, to, width, tile, lane, kWarp);
      }
      __syncthreads();
    }
    if (threadIdx.x == 0) {
      store_statistics(a, bag * in.tasks + t, total);
    }
  }
}

// One warp per 32 bags: zeros for those that are empty.
template <class Z>
__global__ void __launch_bounds__(kThreads) clear_empty(const BagPoolForward a) {
  const BagPoolInput& in = a.in;
  const int lane = lane_id();
  for (int64_t first = first_warp() * kWarp; first < in.bags; first += num_warps() * kWarp) {
    const int64_t own = first + lane;
    unsigned left = __ballot_sync(kFullWarp, own < in.bags && in.ptr[own] == in.ptr[own + 1]);
    for (; left != 0; left &= left - 1) {
      const int64_t bag = first + __ffs(left) - 1;
      Z* const pooled = static_cast<Z*>(a.pooled) + bag * in.tasks * in.width;
      for (int64_t i = lane; i < in.tasks * in.width; i += kWarp) {
        assign(pooled[i], 0.0f);
      }
      for (int64_t t = lane; t < in.tasks; t += kWarp) {
        a.entropy[bag * in.tasks + t] = 0.0f;
        a.lse[bag * in.tasks + t] = -infinity();
      }
    }
  }
}

struct ForwardSpace {
  ForwardSpace(const BagPoolInput& in, void* base) : space(base) {
    const int64_t slots = 2 * divide_up(in.instances, unit_length(in.instances));
    states = space.take<State>(slots * in.tasks);
    parts = space.take<float>(slots * in.tasks * in.width);
    ending = space.take<int64_t>(slots / 2);
  }
  Workspace space;
  State* states;
  float* parts;
  int64_t* ending;
};

template <class Z>
void forward(const BagPoolForward& a, const Launch& launch) {
  const BagPoolInput& in = a.in;
  const int64_t length = unit_length(in.instances), units = divide_up(in.instances, length);
  const ForwardSpace space(in, a.workspace);
  const int lanes = lanes_for(in.width);
  const bool vector = aligned_rows<Z>(in.z, in.z_stride, in.width);
  const auto pool = [&](auto kernel) {
    run(launch, kernel, units, kWarps, kThreads, 0, a, length, lanes, space.states, space.parts, space.ending);
  };
  if (!vector) {
    pool(pool_units<Z, 4, false>);
  } else if (in.tasks == 1) {
    pool(pool_units<Z, 1, true>);
  } else if (in.tasks <= 4) {
    pool(pool_units<Z, 4, true>);
  } else {
    pool(pool_units<Z, 8, true>);
  }
  run(launch, in.width % kRun<Z> == 0 ? merge_units<Z, true> : merge_units<Z, false>, units * in.tasks, 1, kThreads, 0, a,
      length, space.states, space.parts, space.ending);
  run(launch, clear_empty<Z>, in.bags, kThreads, kThreads, 0, a);
}

// ---- backward --------------------------------------------------------------------------------------------
//
//   g[i,t] = d_pooled[t].z[i]
//   d_scores[i,t] = A (g - d_pooled[t].pooled[t]) - d_entropy[t] A (log A + entropy[t]) + d_lse[t] A
//   dz[i] = sum_t A[i,t] d_pooled[t]
//
// A is computed from the scores again and not as exp(scores - lse): one rounding of lse, at scores of 50, would cost
// A four digits in a million. With the statistics relative to the maximum, log A + entropy = s - max - weighted/sum.

// One warp per unit: statistics of the segments that are not whole, and `ending` as above.
__global__ void __launch_bounds__(kThreads)
    unit_states(const BagPoolInput in, int64_t length, State* states, int64_t* ending) {
  const int64_t units = divide_up(in.instances, length);
  for (int64_t unit = first_warp(); unit < units; unit += num_warps()) {
    UnitSegments segments(in, unit, length);
    int64_t ending_here = -1;
    for (Segment segment; segments.take(in, segment);) {
      ending_here = segment.last ? segment.bag : ending_here;
      for (int64_t t = 0; !segment.whole && t < in.tasks; ++t) {
        const State state = segment_state(in, segment, t);
        if (lane_id() == 0) {
          states[segment.slot * in.tasks + t] = state;
        }
      }
    }
    if (lane_id() == 0) {
      ending[unit] = ending_here;
    }
  }
}

// One warp per unit and task: statistics of the bag of several units that ends there. They are filed under the unit in
// which the bag begins; no two such bags begin in one unit.
__global__ void __launch_bounds__(kThreads)
    merge_states_of_bags(const BagPoolInput in, int64_t length, const State* states, const int64_t* ending, State* bags) {
  const int64_t units = divide_up(in.instances, length);
  for (int64_t item = first_warp(); item < units * in.tasks; item += num_warps()) {
    const int64_t unit = item / in.tasks, t = item % in.tasks;
    const int64_t bag = ending[unit];
    if (bag >= 0) {
      const Parts parts(in, bag, unit, length);
      const State total = merge_states(parts, states, in.tasks, t);
      if (lane_id() == 0) {
        bags[parts.first_unit * in.tasks + t] = total;
      }
    }
  }
}

constexpr int kRows = 4;  // rows of z that a lane holds at once

// Shared floats of one warp: weights and d_pooled.z of the rows at hand, four numbers per task.
__host__ __device__ constexpr int64_t backward_shared(int64_t tasks, int groups) {
  return (2 * kRows * groups + 4) * tasks;
}

// Sums v[0..3] over `lanes` >= 4 neighbouring lanes. A lane gets the total of v[row], with row told.
__device__ __forceinline__ float sum_rows(const float (&v)[kRows], int lanes, int lane, int& row) {
  const bool high = (lane & (lanes / 2)) != 0, odd = (lane & (lanes / 4)) != 0;
  const float a = (high ? v[2] : v[0]) + __shfl_xor_sync(kFullWarp, high ? v[0] : v[2], lanes / 2);
  const float b = (high ? v[3] : v[1]) + __shfl_xor_sync(kFullWarp, high ? v[1] : v[3], lanes / 2);
  const float c = (odd ? b : a) + __shfl_xor_sync(kFullWarp, odd ? a : b, lanes / 4);
  row = (high ? 2 : 0) + (odd ? 1 : 0);
  return sum_lanes(c, 1, lanes / 4);
}

// One warp per unit.
template <class Z, bool kVector>
__global__ void __launch_bounds__(kThreads, 2)
    unpool_units(const BagPoolBackward a, int64_t length, int lanes, const State* bags) {
  UMDA_DYNAMIC_SHARED(float, shared);
  const BagPoolInput& in = a.in;
  const int lane = lane_id(), column_lane = lane % lanes, group = lane / lanes, groups = kWarp / lanes;
  const int width = static_cast<int>(in.width), tile_width = lanes * kPerLane, tasks = static_cast<int>(in.tasks);
  const int step = kRows * groups;
  float* const weights = shared + warp_id() * backward_shared(in.tasks, groups);  // [step, tasks]
  float* const dots = weights + step * tasks;                                     // [step, tasks]
  float* const tops = dots + step * tasks;                                        // [tasks], as are the others
  float* const inverses = tops + tasks;
  float* const mean_logs = inverses + tasks;
  float* const offsets = mean_logs + tasks;
  const int64_t units = divide_up(in.instances, length);
  for (int64_t unit = first_warp(); unit < units; unit += num_warps()) {
    UnitSegments segments(in, unit, length);
    for (Segment segment; segments.take(in, segment);) {
      const int64_t stats = segment.bag * in.tasks;
      const Z* const d_pooled = static_cast<const Z*>(a.d_pooled) + segment.bag * a.d_pooled_bag_stride;
      for (int t = 0; t < tasks; ++t) {
        const State state = segment.whole ? segment_state(in, segment, t)
                                          : bags[larger<int64_t>(in.ptr[segment.bag], 0) / length * in.tasks + t];
        float offset = 0.0f;  // d_pooled.pooled
        if (a.d_pooled != nullptr) {
          const Z* const pooled = static_cast<const Z*>(a.pooled) + (stats + t) * in.width;
          for (int tile = 0; tile < width; tile += kWarp * kPerLane) {
            float x[kPerLane], y[kPerLane];
            load8<kVector>(x, pooled, width, tile, lane, kWarp);
            load8<kVector>(y, d_pooled + t * a.d_pooled_task_stride, width, tile, lane, kWarp);
#pragma unroll
            for (int c = 0; c < kPerLane; ++c) {
              offset = fmaf(x[c], y[c], offset);
            }
          }
          offset = sum_warp(offset);
        }
        if (lane == 0) {
          tops[t] = finite_or_zero(state.max);
          inverses[t] = inverse(state.sum);
          mean_logs[t] = state.sum == 0.0f ? 0.0f : state.weighted / state.sum;
          offsets[t] = offset;
        }
      }
      __syncwarp();
      for (int64_t first = segment.begin; first < segment.end; first += step) {
        const int rows = static_cast<int>(smaller<int64_t>(step, segment.end - first));
        for (int item = lane; item < step * tasks; item += kWarp) {
          const int r = item / tasks, t = item % tasks;
          weights[item] = r < rows ? expf(score(in, first + r, t) - tops[t]) * inverses[t] : 0.0f;
          dots[item] = 0.0f;
        }
        __syncwarp();
        // Rows past the last are read as the last one, and not written.
        const int own = group * kRows;
        for (int tile = 0; tile < width; tile += tile_width) {
          float z[kRows][kPerLane], dz[kRows][kPerLane];
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const Z* const row = static_cast<const Z*>(in.z) + (first + smaller(own + r, rows - 1)) * in.z_stride;
            load8<kVector>(z[r], row, width, tile, column_lane, lanes);
#pragma unroll
            for (int c = 0; c < kPerLane; ++c) {
              dz[r][c] = 0.0f;
            }
          }
          if (a.d_pooled != nullptr) {
            for (int t = 0; t < tasks; ++t) {
              float y[kPerLane], dot[kRows];
              load8<kVector>(y, d_pooled + t * a.d_pooled_task_stride, width, tile, column_lane, lanes);
#pragma unroll
              for (int r = 0; r < kRows; ++r) {
                const float p = weights[(own + r) * tasks + t];
                dot[r] = 0.0f;
#pragma unroll
                for (int c = 0; c < kPerLane; ++c) {
                  dot[r] = fmaf(z[r][c], y[c], dot[r]);
                  dz[r][c] = fmaf(p, y[c], dz[r][c]);
                }
              }
              int row;
              const float total = sum_rows(dot, lanes, lane, row);
              if (column_lane % (lanes / kRows) == 0) {
                dots[(own + row) * tasks + t] += total;
              }
            }
          }
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            if (own + r < rows) {
              Z* const to = static_cast<Z*>(a.dz) + (first + own + r) * in.width;
              store8<kVector>(dz[r], to, width, tile, column_lane, lanes);
            }
          }
        }
        __syncwarp();
        for (int item = lane; item < rows * tasks; item += kWarp) {
          const int r = item / tasks, t = item % tasks;
          const float d_entropy = a.d_entropy == nullptr ? 0.0f : a.d_entropy[stats + t];
          const float d_lse = a.d_lse == nullptr ? 0.0f : a.d_lse[stats + t];
          const float shifted = score(in, first + r, t) - tops[t];
          const float log_term = (shifted < kNegligible ? kNegligible : shifted) - mean_logs[t];
          const float g = dots[item] - offsets[t];
          store_any(a.d_scores, (first + r) * in.tasks + t, in.scores_type,
                    weights[item] * (g - d_entropy * log_term + d_lse));
        }
        __syncwarp();
      }
    }
  }
}

struct BackwardSpace {
  BackwardSpace(const BagPoolInput& in, void* base) : space(base) {
    const int64_t units = divide_up(in.instances, unit_length(in.instances));
    states = space.take<State>(2 * units * in.tasks);
    bags = space.take<State>(units * in.tasks);
    ending = space.take<int64_t>(units);
  }
  Workspace space;
  State *states, *bags;
  int64_t* ending;
};

template <class Z>
void backward(const BagPoolBackward& a, const Launch& launch) {
  const BagPoolInput& in = a.in;
  const int64_t length = unit_length(in.instances), units = divide_up(in.instances, length);
  const BackwardSpace space(in, a.workspace);
  const int lanes = lanes_for(in.width);
  run(launch, unit_states, units, kWarps, kThreads, 0, in, length, space.states, space.ending);
  run(launch, merge_states_of_bags, units * in.tasks, kWarps, kThreads, 0, in, length, space.states, space.ending,
      space.bags);
  const int64_t per_warp = backward_shared(in.tasks, kWarp / lanes) * static_cast<int64_t>(sizeof(float));
  const int64_t warps = smaller<int64_t>(kWarps, kMaxShared / larger<int64_t>(per_warp, 1));
  const bool vector = aligned_rows<Z>(in.z, in.z_stride, in.width) &&
                      aligned_rows<Z>(a.pooled, in.width, in.width) &&
                      aligned_rows<Z>(a.d_pooled, a.d_pooled_bag_stride, in.width) &&
                      a.d_pooled_task_stride % kRun<Z> == 0;
  run(launch, vector ? unpool_units<Z, true> : unpool_units<Z, false>, units, warps, static_cast<int>(warps) * kWarp,
      warps * per_warp, a, length, lanes, space.bags);
}

}  // namespace

int64_t bag_pool_forward_workspace(const BagPoolInput& in) { return ForwardSpace(in, nullptr).space.size(); }

int64_t bag_pool_backward_workspace(const BagPoolInput& in) { return BackwardSpace(in, nullptr).space.size(); }

int bag_pool_forward(const BagPoolForward& a, const Launch& launch) {
  UMDA_DISPATCH_DTYPE(a.in.z_type, forward<scalar_t>(a, launch));
  return static_cast<int>(cudaGetLastError());
}

int bag_pool_backward(const BagPoolBackward& a, const Launch& launch) {
  UMDA_DISPATCH_DTYPE(a.in.z_type, backward<scalar_t>(a, launch));
  return static_cast<int>(cudaGetLastError());
}

}  // namespace umda::cuda
