// Multi-task attention pooling of ragged bags.
//
//   A[i,t] = softmax over the instances i of a bag of scores[i,t];  pooled[b,t] = sum_i A[i,t] z[i]
//
// Traffic: forward reads z once for all tasks (N*D elements), backward reads z once and writes dz once; the rest
// (scores, T*D per bag) is small. Work: 2*N*T*D multiply-adds forward, 4*N*T*D backward: bound by memory up to about T = 16.
//
// Bags are cut into chunks of at most kChunk instances, whatever the number of threads. A chunk is a softmax of its own
// (its maximum m, l = sum exp(s-m), w = sum exp(s-m)(s-m), and sum exp(s-m) z); the chunks of a bag are merged in
// order. Chunks are handed to threads in groups of about kGroup instances, so a bag of 200,000 uses all cores and ten
// thousand bags of five do not pay for ten thousand hand-overs.
//
//   entropy = -sum A log A = log l - w/l: relative to the maximum, so a large common offset of the scores costs nothing.
#include "bag_pool.h"

#include "parallel.h"
#include "scratch.h"
#include "simd.h"

namespace umda::UMDA_ISA {
namespace {

constexpr int64_t kChunk = 512;  // instances: 512 KB of z at D = 256, half of a usual level-2 cache
constexpr int64_t kGroup = 1024;
constexpr int64_t kTile = 32;  // rows per sweep over the accumulators: 32 KB at D = 256
constexpr float kNegligible = -126.0f;  // exp of it is 0 in float32; stands in for -inf where 0 * -inf would be NaN

// The pointer may be null where there are no elements, as that of an empty tensor is.
template <class T>
UMDA_INLINE void zero_elements(T* p, int64_t count) {
  if (count > 0) {
    __builtin_memset(static_cast<void*>(p), 0, static_cast<size_t>(count) * sizeof(T));
  }
}

struct Chunk {
  int64_t bag, begin, end;
  int64_t part;  // row of the partial results, -1: the bag has this chunk only
};

// The cutting of all bags into chunks, and of the chunks into groups.
struct Plan {
  explicit Plan(const BagPoolInput& in)
      : chunks(count_chunks(in)), groups(count_chunks(in) + 1), first_part(in.bags + 1) {
    int64_t weight = kGroup;  // opens the first group
    for (int64_t b = 0; b < in.bags; ++b) {
      const int64_t begin = in.ptr[b], end = in.ptr[b + 1];
      const bool split = end - begin > kChunk;
      first_part[b] = num_parts;
      for (int64_t i = begin; i == begin || i < end; i += kChunk) {
        // An empty bag costs something, too: its outputs are written.
        if (weight >= kGroup) {
          groups[num_groups++] = num_chunks;
          weight = 0;
        }
        const int64_t stop = smaller(i + kChunk, end);
        chunks[num_chunks++] = {b, i, stop, split ? num_parts++ : -1};
        weight += stop - i + 8;
      }
    }
    first_part[in.bags] = num_parts;
    groups[num_groups] = num_chunks;
  }

  static int64_t count_chunks(const BagPoolInput& in) {
    int64_t count = 0;
    for (int64_t b = 0; b < in.bags; ++b) {
      const int64_t n = in.ptr[b + 1] - in.ptr[b];
      count += n == 0 ? 1 : (n + kChunk - 1) / kChunk;
    }
    return count;
  }

  Scratch<Chunk> chunks;
  Scratch<int64_t> groups;      // first chunk of each group, and the end
  Scratch<int64_t> first_part;  // per bag
  int64_t num_chunks = 0, num_groups = 0, num_parts = 0;
};

// Scores of rows [begin, end) as float, task-major: to[t * kChunk + (i - begin)].
template <class S>
void load_scores(const BagPoolInput& in, int64_t begin, int64_t end, float* to) {
  const S* from = static_cast<const S*>(in.scores) + begin * in.scores_stride;
  for (int64_t t = 0; t < in.tasks; ++t) {
    const S* column = from + t * in.scores_task_stride;
    float* row = to + t * kChunk;
    for (int64_t i = 0; i < end - begin; ++i) {
      row[i] = to_float(column[i * in.scores_stride]);
    }
  }
}

void load_scores(const BagPoolInput& in, int64_t begin, int64_t end, float* to) {
  UMDA_DISPATCH_DTYPE(in.scores_type, load_scores<scalar_t>(in, begin, end, to));
}

// Softmax statistics of one task's scores in a chunk.
struct State {
  float max, sum, weighted;
};

// Replaces s by exp(s - max).
State softmax_chunk(float* s, int64_t n) {
  Vec top = splat(-__builtin_inff());
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    top = max(load(s + i), top);
  }
  float m = largest(top);
  for (; i < n; ++i) {
    m = s[i] > m ? s[i] : m;
  }
  // Where every score is -inf, s - m would be NaN; the other chunks of the bag may be finite.
  const Vec shift = splat(m == -__builtin_inff() ? 0.0f : m);
  Vec l = zero(), w = zero();
  for (i = 0; i < n; i += kWidth) {
    const int count = static_cast<int>(smaller<int64_t>(kWidth, n - i));
    const Vec x = load(s + i, count) - shift;
    const Vec p = exp(x);
    store(s + i, p, count);
    Vec masked = p;
    if (count < kWidth) {
      masked = load(s + i, count);
    }
    l = l + masked;
    w = fma(masked, max(splat(kNegligible), x), w);
  }
  return {m, sum(l), sum(w)};
}

// Merges the parts of a bag that was cut, in order. part_scale(part, factor) is told by how much each part's sums are
// multiplied.
template <class F>
UMDA_INLINE State merge(const State* states, int64_t first, int64_t last, int64_t tasks, F&& part_scale) {
  float top = -__builtin_inff();
  for (int64_t part = first; part < last; ++part) {
    const float m = states[part * tasks].max;
    top = m > top ? m : top;
  }
  State total{top, 0.0f, 0.0f};
  for (int64_t part = first; part < last; ++part) {
    const State& s = states[part * tasks];
    // A part of nothing but -inf; one with a NaN in it has a sum, of NaN.
    const bool nothing = s.max == -__builtin_inff() && s.sum == 0.0f;
    float shift = nothing ? kNegligible : s.max - top;
    shift = shift < kNegligible ? kNegligible : shift;
    const float scale = exp(shift);
    total.sum += scale * s.sum;
    total.weighted += scale * (s.weighted + s.sum * shift);
    part_scale(part, scale);
  }
  return total;
}

// acc[t, d] += sum over rows of p[t, row] * z[row, d], for kTasks tasks and kVecs vectors of the width.
template <int kTasks, int kVecs, class Z>
UMDA_INLINE void accumulate_block(const Z* z, int64_t z_stride, int64_t rows, const float* p, float* acc, int64_t width,
                                  int64_t ahead) {
  Vec sums[kTasks][kVecs];
  for (int t = 0; t < kTasks; ++t) {
    for (int v = 0; v < kVecs; ++v) {
      sums[t][v] = load(acc + t * width + v * kWidth);
    }
  }
  for (int64_t r = 0; r < rows; ++r, z += z_stride) {
    for (int v = 0; v < kVecs; v += kVecsPerLine<Z>) {
      prefetch(z + ahead + v * kWidth);
    }
    Vec row[kVecs];
    for (int v = 0; v < kVecs; ++v) {
      row[v] = load(z + v * kWidth);
    }
    for (int t = 0; t < kTasks; ++t) {
      const Vec weight = splat(p[t * kChunk + r]);
      for (int v = 0; v < kVecs; ++v) {
        sums[t][v] = fma(weight, row[v], sums[t][v]);
      }
    }
  }
  for (int t = 0; t < kTasks; ++t) {
    for (int v = 0; v < kVecs; ++v) {
      store(acc + t * width + v * kWidth, sums[t][v]);
    }
  }
}

template <int kTasks, class Z>
UMDA_INLINE void accumulate_tail(const Z* z, int64_t z_stride, int64_t rows, const float* p, float* acc, int64_t width,
                                 int count) {
  Vec sums[kTasks];
  for (int t = 0; t < kTasks; ++t) {
    sums[t] = load(acc + t * width, count);
  }
  for (int64_t r = 0; r < rows; ++r, z += z_stride) {
    const Vec row = load(z, count);
    for (int t = 0; t < kTasks; ++t) {
      sums[t] = fma(splat(p[t * kChunk + r]), row, sums[t]);
    }
  }
  for (int t = 0; t < kTasks; ++t) {
    store(acc + t * width, sums[t], count);
  }
}

// Accumulators that fit the registers: 32 of 64 bytes with AVX-512, 16 otherwise.
constexpr int kAccumulators = kWidth == 16 ? 16 : 8;

template <int kTasks, class Z>
void accumulate_tasks(const Z* z, int64_t z_stride, int64_t rows, const float* p, float* acc, int64_t width,
                      int64_t ahead) {
  constexpr int kVecs = kAccumulators / kTasks > 8 ? 8 : kAccumulators / kTasks;
  int64_t d = 0;
  for (; d + kVecs * kWidth <= width; d += kVecs * kWidth) {
    accumulate_block<kTasks, kVecs>(z + d, z_stride, rows, p, acc + d, width, ahead);
  }
  for (; d < width; d += kWidth) {
    const int count = static_cast<int>(smaller<int64_t>(kWidth, width - d));
    accumulate_tail<kTasks>(z + d, z_stride, rows, p, acc + d, width, count);
  }
}

// acc[t, :] = sum_i p[t, i] z[i, :] over a chunk.
template <class Z>
void accumulate_chunk(const Z* z, int64_t z_stride, int64_t rows, const float* p, float* acc, int64_t tasks,
                      int64_t width) {
  __builtin_memset(acc, 0, static_cast<size_t>(tasks * width) * sizeof(float));
  for (int64_t r = 0; r < rows; r += kTile) {
    const int64_t n = smaller(kTile, rows - r);
    const Z* tile = z + r * z_stride;
    const int64_t ahead = kTile * z_stride;  // the same place in the next tile; past the end it is harmless
    int64_t t = 0;
    if constexpr (kAccumulators >= 16) {
      for (; t + 8 <= tasks; t += 8) {
        accumulate_tasks<8>(tile, z_stride, n, p + t * kChunk + r, acc + t * width, width, ahead);
      }
    }
    for (; t + 4 <= tasks; t += 4) {
      accumulate_tasks<4>(tile, z_stride, n, p + t * kChunk + r, acc + t * width, width, ahead);
    }
    for (; t + 2 <= tasks; t += 2) {
      accumulate_tasks<2>(tile, z_stride, n, p + t * kChunk + r, acc + t * width, width, ahead);
    }
    for (; t < tasks; ++t) {
      accumulate_tasks<1>(tile, z_stride, n, p + t * kChunk + r, acc + t * width, width, ahead);
    }
  }
}

// to[d] = scale * from[d], in to's type.
template <class Z>
UMDA_INLINE void store_scaled(Z* to, const float* from, float scale, int64_t width) {
  for (int64_t d = 0; d < width; d += kWidth) {
    const int count = static_cast<int>(smaller<int64_t>(kWidth, width - d));
    store(to + d, load(from + d, count) * splat(scale), count);
  }
}

template <class Z>
void forward(const BagPoolForward& a) {
  const BagPoolInput& in = a.in;
  const Plan plan(in);
  const int64_t per_bag = in.tasks * in.width;
  const Scratch<State> states(plan.num_parts * in.tasks);
  const Scratch<float> parts(plan.num_parts * per_bag);
  Z* const pooled = static_cast<Z*>(a.pooled);

  const auto finish = [&](int64_t bag, int64_t t, const State& s, const float* acc) {
    const int64_t to = bag * in.tasks + t;
    if (s.sum == 0.0f) {
      zero_elements(pooled + to * in.width, in.width);
      a.lse[to] = -__builtin_inff();
      a.entropy[to] = 0.0f;
      return;
    }
    store_scaled(pooled + to * in.width, acc, 1.0f / s.sum, in.width);
    const float log_sum = __builtin_logf(s.sum);
    const float entropy = log_sum - s.weighted / s.sum;
    a.lse[to] = s.max + log_sum;
    a.entropy[to] = entropy < 0.0f ? 0.0f : entropy;  // rounding may leave a little less than 0
  };

  parallel_items(plan.num_groups, [&](int64_t group) {
    const Scratch<float> weights(in.tasks * kChunk);
    const Scratch<float> local_acc(per_bag);
    const Scratch<State> local_states(in.tasks);
    for (int64_t c = plan.groups[group]; c < plan.groups[group + 1]; ++c) {
      const Chunk& chunk = plan.chunks[c];
      const int64_t rows = chunk.end - chunk.begin;
      if (rows == 0) {
        zero_elements(pooled + chunk.bag * per_bag, per_bag);
        for (int64_t t = 0; t < in.tasks; ++t) {
          a.entropy[chunk.bag * in.tasks + t] = 0.0f;
          a.lse[chunk.bag * in.tasks + t] = -__builtin_inff();
        }
        continue;
      }
      const bool whole = chunk.part < 0;
      float* const acc = whole ? local_acc.data() : parts.data() + chunk.part * per_bag;
      State* const state = whole ? local_states.data() : states.data() + chunk.part * in.tasks;
      load_scores(in, chunk.begin, chunk.end, weights.data());
      for (int64_t t = 0; t < in.tasks; ++t) {
        state[t] = softmax_chunk(weights.data() + t * kChunk, rows);
      }
      accumulate_chunk(static_cast<const Z*>(in.z) + chunk.begin * in.z_stride, in.z_stride, rows, weights.data(), acc,
                       in.tasks, in.width);
      for (int64_t t = 0; whole && t < in.tasks; ++t) {
        finish(chunk.bag, t, state[t], acc + t * in.width);
      }
    }
  });

  // Bags of several chunks: one item per bag and task, parts in order.
  parallel_ranges(plan.num_parts == 0 ? 0 : in.bags * in.tasks, 16, [&](int64_t begin, int64_t end) {
    const Scratch<float> acc(in.width);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t bag = item / in.tasks, t = item % in.tasks;
      const int64_t first = plan.first_part[bag], last = plan.first_part[bag + 1];
      if (first == last) {
        continue;
      }
      __builtin_memset(acc.data(), 0, static_cast<size_t>(in.width) * sizeof(float));
      const auto add_part = [&](int64_t part, float scale) {
        const float* const from = parts.data() + part * per_bag + t * in.width;
        for (int64_t d = 0; d < in.width; d += kWidth) {
          const int count = static_cast<int>(smaller<int64_t>(kWidth, in.width - d));
          store(&acc[d], fma(splat(scale), load(from + d, count), load(&acc[d], count)), count);
        }
      };
      const State total = merge(&states[t], first, last, in.tasks, add_part);
      finish(bag, t, total, acc.data());
    }
  });
}

// ---- backward --------------------------------------------------------------------------------------------
//
//   g[i,t] = d_pooled[t].z[i]
//   d_scores[i,t] = A (g - d_pooled[t].pooled[t]) - d_entropy[t] A (log A + entropy[t]) + d_lse[t] A
//   dz[i] = sum_t A[i,t] d_pooled[t]
//
// A is computed from the scores again and not as exp(scores - lse): one rounding of lse, at scores of 50, would cost
// A four digits in a million. With the statistics relative to the maximum, log A + entropy = s - max - w/l.

// g[r * tasks + t] for kRows rows and kTasks tasks.
template <int kRows, int kTasks, class Z>
UMDA_INLINE void dot_block(const Z* z, int64_t z_stride, const float* d_pooled, int64_t width, float* g, int64_t tasks,
                           int64_t ahead) {
  Vec sums[kRows][kTasks];
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTasks; ++t) {
      sums[r][t] = zero();
    }
  }
  const auto step = [&](int64_t d, auto&& read) UMDA_LAMBDA_INLINE {
    Vec weight[kTasks];
    for (int t = 0; t < kTasks; ++t) {
      weight[t] = read(d_pooled + t * width + d);
    }
    for (int r = 0; r < kRows; ++r) {
      const Vec row = read(z + r * z_stride + d);
      for (int t = 0; t < kTasks; ++t) {
        sums[r][t] = fma(row, weight[t], sums[r][t]);
      }
    }
  };
  int64_t d = 0;
  for (; d + kWidth <= width; d += kWidth) {
    for (int r = 0; r < kRows; ++r) {
      prefetch(z + r * z_stride + d + ahead);
    }
    step(d, [](const auto* p) UMDA_LAMBDA_INLINE { return load(p); });
  }
  if (d < width) {
    const int count = static_cast<int>(width - d);
    step(d, [count](const auto* p) UMDA_LAMBDA_INLINE { return load(p, count); });
  }
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTasks; ++t) {
      g[r * tasks + t] = sum(sums[r][t]);
    }
  }
}

template <int kRows, class Z>
UMDA_INLINE void dot_rows(const Z* z, int64_t z_stride, const float* d_pooled, int64_t width, float* g, int64_t tasks,
                          int64_t ahead) {
  int64_t t = 0;
  for (; t + 2 <= tasks; t += 2) {
    dot_block<kRows, 2>(z, z_stride, d_pooled + t * width, width, g + t, tasks, ahead);
  }
  if (t < tasks) {
    dot_block<kRows, 1>(z, z_stride, d_pooled + t * width, width, g + t, tasks, ahead);
  }
}

// dz of kRows rows: a weighted sum of the d_pooled rows, weights weight[t * kChunk + r].
template <int kRows, bool kStream, class Z>
UMDA_INLINE void spread_rows(Z* dz, const float* d_pooled, const float* weight, int64_t tasks, int64_t width) {
  constexpr int kVecs = 2;
  const auto block = [&](int64_t d, auto vecs, auto&& read, auto&& write) UMDA_LAMBDA_INLINE {
    constexpr int kBlock = decltype(vecs)::value;
    Vec sums[kRows][kBlock];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kBlock; ++v) {
        sums[r][v] = zero();
      }
    }
    for (int64_t t = 0; t < tasks; ++t) {
      Vec from[kBlock];
      for (int v = 0; v < kBlock; ++v) {
        from[v] = read(d_pooled + t * width + d + v * kWidth);
      }
      for (int r = 0; r < kRows; ++r) {
        const Vec w = splat(weight[t * kChunk + r]);
        for (int v = 0; v < kBlock; ++v) {
          sums[r][v] = fma(w, from[v], sums[r][v]);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kBlock; ++v) {
        write(dz + r * width + d + v * kWidth, sums[r][v]);
      }
    }
  };
  int64_t d = 0;
  for (; d + kVecs * kWidth <= width; d += kVecs * kWidth) {
    block(d, Constant<kVecs>{}, [](const float* p) UMDA_LAMBDA_INLINE { return load(p); },
          [](Z* p, Vec v) UMDA_LAMBDA_INLINE { kStream ? stream(p, v) : store(p, v); });
  }
  for (; d < width; d += kWidth) {
    const int count = static_cast<int>(smaller<int64_t>(kWidth, width - d));
    block(d, Constant<1>{}, [count](const float* p) UMDA_LAMBDA_INLINE { return load(p, count); },
          [count](Z* p, Vec v) UMDA_LAMBDA_INLINE { store(p, v, count); });
  }
}

template <class S>
void store_scores(void* to, int64_t first, const float* from, int64_t rows, int64_t tasks) {
  S* const d_scores = static_cast<S*>(to) + first * tasks;
  for (int64_t t = 0; t < tasks; ++t) {
    for (int64_t i = 0; i < rows; ++i) {
      d_scores[i * tasks + t] = from_float<S>(from[t * kChunk + i]);
    }
  }
}

template <class Z>
void backward(const BagPoolBackward& a) {
  const BagPoolInput& in = a.in;
  const Plan plan(in);
  const int64_t per_bag = in.tasks * in.width;
  Z* const dz = static_cast<Z*>(a.dz);
  const bool streaming = worth_streaming(dz, in.instances, in.width);

  // Softmax statistics of the bags that are cut: by part, then by bag.
  const Scratch<State> parts(plan.num_parts * in.tasks);
  const Scratch<State> bags(plan.num_parts == 0 ? 0 : in.bags * in.tasks);
  parallel_items(plan.num_parts == 0 ? 0 : plan.num_groups, [&](int64_t group) {
    const Scratch<float> scores(in.tasks * kChunk);
    for (int64_t c = plan.groups[group]; c < plan.groups[group + 1]; ++c) {
      const Chunk& chunk = plan.chunks[c];
      if (chunk.part >= 0) {
        load_scores(in, chunk.begin, chunk.end, scores.data());
        for (int64_t t = 0; t < in.tasks; ++t) {
          parts[chunk.part * in.tasks + t] = softmax_chunk(&scores[t * kChunk], chunk.end - chunk.begin);
        }
      }
    }
  });
  parallel_ranges(plan.num_parts == 0 ? 0 : in.bags, 16, [&](int64_t begin, int64_t end) {
    for (int64_t bag = begin; bag < end; ++bag) {
      for (int64_t t = 0; t < in.tasks; ++t) {
        bags[bag * in.tasks + t] =
            merge(&parts[t], plan.first_part[bag], plan.first_part[bag + 1], in.tasks, [](int64_t, float) {});
      }
    }
  });

  parallel_items(plan.num_groups, [&](int64_t group) {
    const Scratch<float> weights(in.tasks * kChunk);    // A, task-major
    const Scratch<float> gradients(in.tasks * kChunk);  // d_scores, task-major
    const Scratch<float> dots(in.tasks * kChunk);       // g, row-major
    const Scratch<float> d_pooled(per_bag);
    const Scratch<float> offsets(in.tasks);  // d_pooled.pooled
    const Scratch<State> softmax(in.tasks);
    for (int64_t c = plan.groups[group]; c < plan.groups[group + 1]; ++c) {
      const Chunk& chunk = plan.chunks[c];
      const int64_t rows = chunk.end - chunk.begin;
      if (rows == 0) {
        continue;
      }
      const int64_t stats = chunk.bag * in.tasks;
      const Z* const z = static_cast<const Z*>(in.z) + chunk.begin * in.z_stride;
      Z* const dz_chunk = dz + chunk.begin * in.width;
      load_scores(in, chunk.begin, chunk.end, gradients.data());

      if (a.d_pooled == nullptr) {
        zero_elements(dz_chunk, rows * in.width);
        __builtin_memset(dots.data(), 0, static_cast<size_t>(rows * in.tasks) * sizeof(float));
        __builtin_memset(offsets.data(), 0, static_cast<size_t>(in.tasks) * sizeof(float));
      } else {
        for (int64_t t = 0; t < in.tasks; ++t) {
          const Z* const from = static_cast<const Z*>(a.d_pooled) + chunk.bag * a.d_pooled_bag_stride +
                                t * a.d_pooled_task_stride;
          const Z* const pooled = static_cast<const Z*>(a.pooled) + (stats + t) * in.width;
          float* const to = d_pooled.data() + t * in.width;
          Vec dot = zero();
          for (int64_t d = 0; d < in.width; d += kWidth) {
            const int count = static_cast<int>(smaller<int64_t>(kWidth, in.width - d));
            const Vec v = load(from + d, count);
            store(to + d, v, count);
            dot = fma(v, load(pooled + d, count), dot);
          }
          offsets[t] = sum(dot);
        }
      }

      for (int64_t t = 0; t < in.tasks; ++t) {
        const float* const s = &gradients[t * kChunk];
        float* const w = &weights[t * kChunk];
        __builtin_memcpy(w, s, static_cast<size_t>(rows) * sizeof(float));
        softmax[t] = softmax_chunk(w, rows);
        float scale = 1.0f;
        if (chunk.part >= 0) {
          const float part_max = softmax[t].max;
          softmax[t] = bags[stats + t];
          scale = exp(part_max == -__builtin_inff() ? 0.0f : part_max - softmax[t].max);
        }
        // Every score -inf: the weights are 0 and stay so.
        const Vec factor = splat(softmax[t].sum == 0.0f ? 0.0f : scale / softmax[t].sum);
        for (int64_t i = 0; i < rows; i += kWidth) {
          const int count = static_cast<int>(smaller<int64_t>(kWidth, rows - i));
          store(w + i, load(w + i, count) * factor, count);
        }
      }

      if (a.d_pooled != nullptr) {
        const int64_t ahead = 8 * in.z_stride;
        int64_t r = 0;
        for (; r + 4 <= rows; r += 4) {
          dot_rows<4>(z + r * in.z_stride, in.z_stride, d_pooled.data(), in.width, &dots[r * in.tasks], in.tasks, ahead);
          if (streaming) {
            spread_rows<4, true>(dz_chunk + r * in.width, d_pooled.data(), &weights[r], in.tasks, in.width);
          } else {
            spread_rows<4, false>(dz_chunk + r * in.width, d_pooled.data(), &weights[r], in.tasks, in.width);
          }
        }
        for (; r < rows; ++r) {
          dot_rows<1>(z + r * in.z_stride, in.z_stride, d_pooled.data(), in.width, &dots[r * in.tasks], in.tasks, ahead);
          spread_rows<1, false>(dz_chunk + r * in.width, d_pooled.data(), &weights[r], in.tasks, in.width);
        }
        stream_fence();
      }

      for (int64_t t = 0; t < in.tasks; ++t) {
        const float d_entropy = a.d_entropy == nullptr ? 0.0f : a.d_entropy[stats + t];
        const float d_lse = a.d_lse == nullptr ? 0.0f : a.d_lse[stats + t];
        const float top = softmax[t].max == -__builtin_inff() ? 0.0f : softmax[t].max;
        const float mean_log = softmax[t].sum == 0.0f ? 0.0f : softmax[t].weighted / softmax[t].sum;
        for (int64_t i = 0; i < rows; ++i) {
          const float shifted = gradients[t * kChunk + i] - top;
          const float log_term = (shifted < kNegligible ? kNegligible : shifted) - mean_log;
          const float g = dots[i * in.tasks + t] - offsets[t];
          gradients[t * kChunk + i] = weights[t * kChunk + i] * (g - d_entropy * log_term + d_lse);
        }
      }
      UMDA_DISPATCH_DTYPE(in.scores_type,
                          store_scores<scalar_t>(a.d_scores, chunk.begin, gradients.data(), rows, in.tasks));
    }
  });
}

}  // namespace

void bag_pool_forward(const BagPoolForward& a) { UMDA_DISPATCH_DTYPE(a.in.z_type, forward<scalar_t>(a)); }

void bag_pool_backward(const BagPoolBackward& a) { UMDA_DISPATCH_DTYPE(a.in.z_type, backward<scalar_t>(a)); }

}  // namespace umda::UMDA_ISA
