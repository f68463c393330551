// Gram matrix of task gradients on the instances behind an attention pooling (docs/model.md, section 4).
//
//   d_score_s[i,t] = A[i,t] (P_s[b,t].z[i] - P_s[b,t].pooled[b,t])                    P_s: gradient of loss s on pooled
//   c_s[i] = sum_t d_score_s[i,t] w[t],  e_s[i] = [c_s gate (1 - value^2), c_s value gate (1 - gate)]          [2 H]
//   g_s[i] = sum_t A[i,t] P_s[b,t] + [W_a; W_b]^T e_s[i];   gram[s,r] = sum_i g_s[i].g_r[i]
//
// Traffic: reads z, value, gate and A once ((D + 2 H + T) N elements) and P once per bag and chunk. Work: N S 2 H D
// multiply-adds through the weights of the scores, as many as S backward passes through them, and 2 N S T D + N S S D / 2
// for the rest: bound by arithmetic. What such passes would store, [S, N, D], is never there: instances are taken in
// chunks whose gradients of all losses stay in the level-2 cache and are multiplied there.
//
// Chunks form groups, whatever the bags and the number of threads; a group has its own sums, added in order at the end.
#include "representation_gram.h"

#include "matmul.h"
#include "parallel.h"
#include "products.h"
#include "scratch.h"
#include "simd.h"

namespace umda::UMDA_ISA {
namespace {

constexpr int64_t kChunkElements = 1 << 16;  // of g and e, all losses together: 256 KB
constexpr int64_t kMinChunk = 8, kMaxChunk = 64;
constexpr int64_t kMinGroup = 256, kMaxGroups = 512;
constexpr int kDotRows = 4, kDotTasks = kWidth == 16 ? 4 : 2;

int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

template <class T>
void widen_row(const T* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) {
    const int n = static_cast<int>(smaller<int64_t>(kWidth, count - i));
    store(to + i, load(from + i, n), n);
  }
}

// `count` elements from `offset` on, as float32: where they lie, or copied to `to`.
const float* as_float(const void* from, DType type, int64_t offset, int64_t count, float* to) {
  if (type == DType::float32) {
    return static_cast<const float*>(from) + offset;
  }
  UMDA_DISPATCH_DTYPE(type, widen_row(static_cast<const scalar_t*>(from) + offset, to, count));
  return to;
}

// dots[t * stride + r] = rows[r].p[t] for kDotRows rows and kT tasks.
template <int kT>
UMDA_INLINE void dot_block(const float* const (&rows)[kDotRows], const float* p, int64_t width, float* dots,
                           int64_t stride) {
  Vec products[kT][kDotRows];
  for (int t = 0; t < kT; ++t) {
    for (int r = 0; r < kDotRows; ++r) {
      products[t][r] = zero();
    }
  }
  const auto step = [&](int64_t d, auto&& read) UMDA_LAMBDA_INLINE {
    Vec weight[kT];
    for (int t = 0; t < kT; ++t) {
      weight[t] = read(p + t * width + d);
    }
    for (int r = 0; r < kDotRows; ++r) {
      const Vec x = read(rows[r] + d);
      for (int t = 0; t < kT; ++t) {
        products[t][r] = fma(x, weight[t], products[t][r]);
      }
    }
  };
  int64_t d = 0;
  for (; d + kWidth <= width; d += kWidth) {
    step(d, [](const float* q) UMDA_LAMBDA_INLINE { return load(q); });
  }
  if (d < width) {
    const int count = static_cast<int>(width - d);
    step(d, [count](const float* q) UMDA_LAMBDA_INLINE { return load(q, count); });
  }
  for (int t = 0; t < kT; ++t) {
    sums(products[t][0], products[t][1], products[t][2], products[t][3], dots + t * stride);
  }
}

// dots[t * stride + r] = rows[r].p[t]; written up to the next multiple of kDotRows rows.
void dot_products(const float* rows, int64_t rows_stride, int64_t count, const float* p, int64_t tasks, int64_t width,
                  float* dots, int64_t stride) {
  for (int64_t r = 0; r < count; r += kDotRows) {
    const float* four[kDotRows];
    for (int i = 0; i < kDotRows; ++i) {
      four[i] = rows + smaller(r + i, count - 1) * rows_stride;
    }
    int64_t t = 0;
    for (; t + kDotTasks <= tasks; t += kDotTasks) {
      dot_block<kDotTasks>(four, p + t * width, width, dots + t * stride + r, stride);
    }
    for (; t < tasks; ++t) {
      dot_block<1>(four, p + t * width, width, dots + t * stride + r, stride);
    }
  }
}

float dot(const float* a, const float* b, int64_t count) {
  Vec total = zero();
  for (int64_t i = 0; i < count; i += kWidth) {
    const int n = static_cast<int>(smaller<int64_t>(kWidth, count - i));
    total = fma(load(a + i, n), load(b + i, n), total);
  }
  return sum(total);
}

// [W_a; W_b], vectors of columns one after the other, the last filled up with zeros.
void pack_weights(const RepresentationGram& a, float* to) {
  for (int64_t d = 0; d < a.width; d += kWidth) {
    const int count = static_cast<int>(smaller<int64_t>(kWidth, a.width - d));
    for (int64_t k = 0; k < 2 * a.hidden; ++k, to += kWidth) {
      const float* const from = k < a.hidden ? a.value_weight + k * a.width : a.gate_weight + (k - a.hidden) * a.width;
      store(to, load(from + d, count));
    }
  }
}

int64_t bag_of(const RepresentationGram& a, int64_t instance) {
  int64_t low = 0, high = a.bags;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (a.ptr[middle] <= instance ? low : high) = middle;
  }
  return low;
}

// Working memory of one group, for chunks of up to `chunk` instances.
struct Space {
  Space(const RepresentationGram& a, int64_t chunk)
      : z(chunk * a.width),
        value(chunk * a.hidden),
        gate(chunk * a.hidden),
        d_pooled(a.tasks * a.width),
        pooled(a.tasks * a.width),
        dots(a.tasks * round_up(chunk, kDotRows)),
        d_scores(a.losses * chunk * a.tasks),
        hidden(chunk * a.hidden),
        slopes(a.losses * chunk * 2 * a.hidden),
        gradients(a.losses * chunk * a.width) {}

  Scratch<float> z, value, gate, d_pooled, pooled;  // in float32, where they come in 16 bits
  Scratch<float> dots;       // [tasks, chunk]
  Scratch<float> d_scores;   // [losses, chunk, tasks]
  Scratch<float> hidden;     // c: [chunk, hidden]
  Scratch<float> slopes;     // e: [losses, chunk, 2 hidden]
  Scratch<float> gradients;  // g: [losses, chunk, width]
};

// g through the sum, and the gradients of the scores, for the instances [begin, end) of a chunk that bag b owns.
void through_sum(const RepresentationGram& a, int64_t bag, int64_t first, int64_t begin, int64_t end, int64_t chunk_rows,
                 const float* z, int64_t z_stride, const Space& space) {
  const int64_t rows = end - begin, stride = round_up(rows, kDotRows), per_bag = a.tasks * a.width;
  const float* const pooled = as_float(a.pooled, a.z_type, bag * per_bag, per_bag, space.pooled.data());
  const float* const attention = a.attention + begin * a.tasks;
  for (int64_t s = 0; s < a.losses; ++s) {
    const float* const p = as_float(a.d_pooled[s], a.z_type, bag * per_bag, per_bag, space.d_pooled.data());
    const int64_t at = s * chunk_rows + begin - first;
    dot_products(z, z_stride, rows, p, a.tasks, a.width, space.dots.data(), stride);
    float* const d_scores = &space.d_scores[at * a.tasks];
    for (int64_t t = 0; t < a.tasks; ++t) {
      const float offset = dot(p + t * a.width, pooled + t * a.width, a.width);
      const float* const dots = &space.dots[t * stride];
      for (int64_t r = 0; r < rows; ++r) {
        d_scores[r * a.tasks + t] = attention[r * a.tasks + t] * (dots[r] - offset);
      }
    }
    multiply(rows, a.width, a.tasks, {attention, a.tasks, 1}, {p, a.width, kWidth}, &space.gradients[at * a.width],
             a.width, false);
  }
}

// e of all losses, from the gradients of the scores.
void through_scores(const RepresentationGram& a, int64_t first, int64_t rows, const Space& space) {
  const float* const value = as_float(a.value, a.hidden_type, first * a.hidden, rows * a.hidden, space.value.data());
  const float* const gate = as_float(a.gate, a.hidden_type, first * a.hidden, rows * a.hidden, space.gate.data());
  for (int64_t s = 0; s < a.losses; ++s) {
    multiply(rows, a.hidden, a.tasks, {&space.d_scores[s * rows * a.tasks], a.tasks, 1},
             {a.score_weight, a.hidden, kWidth}, space.hidden.data(), a.hidden, false);
    for (int64_t r = 0; r < rows; ++r) {
      float* const to = &space.slopes[(s * rows + r) * 2 * a.hidden];
      for (int64_t h = 0; h < a.hidden; h += kWidth) {
        const int n = static_cast<int>(smaller<int64_t>(kWidth, a.hidden - h));
        const int64_t i = r * a.hidden + h;
        const Vec v = load(value + i, n), u = load(gate + i, n);
        const Vec c = load(&space.hidden[i], n) * u;
        store(to + h, c - c * v * v, n);
        store(to + a.hidden + h, c * v * (splat(1.0f) - u), n);
      }
    }
  }
}

}  // namespace

void representation_gram(const RepresentationGram& a) {
  const int64_t per_instance = larger<int64_t>(a.losses * (a.width + 2 * a.hidden), 1);
  const int64_t chunk = smaller(kMaxChunk, larger(kMinChunk, kChunkElements / per_instance / kDotRows * kDotRows));
  const int64_t group = round_up(larger(kMinGroup, (a.instances + kMaxGroups - 1) / kMaxGroups), chunk);
  const int64_t groups = (a.instances + group - 1) / group, pairs = a.losses * a.losses;
  const Scratch<float> weights(2 * a.hidden * round_up(a.width, kWidth));
  pack_weights(a, weights.data());
  const Scratch<double> products(groups * pairs);
  parallel_items(groups, [&](int64_t g) {
    double* const own = &products[g * pairs];
    __builtin_memset(own, 0, static_cast<size_t>(pairs) * sizeof(double));
    const Space space(a, chunk);
    const int64_t stop = smaller(a.instances, (g + 1) * group);
    for (int64_t first = g * group; first < stop; first += chunk) {
      const int64_t last = smaller(first + chunk, stop), rows = last - first;
      const float* z = static_cast<const float*>(a.z) + first * a.z_stride;
      int64_t z_stride = a.z_stride;
      if (a.z_type != DType::float32) {
        for (int64_t r = 0; r < rows; ++r) {
          as_float(a.z, a.z_type, (first + r) * a.z_stride, a.width, &space.z[r * a.width]);
        }
        z = space.z.data();
        z_stride = a.width;
      }
      int64_t bag = bag_of(a, first);
      for (int64_t begin = first; begin < last; ++bag) {
        const int64_t end = smaller(a.ptr[bag + 1], last);
        if (end > begin) {
          through_sum(a, bag, first, begin, end, rows, z + (begin - first) * z_stride, z_stride, space);
          begin = end;
        }
      }
      through_scores(a, first, rows, space);
      multiply(a.losses * rows, a.width, 2 * a.hidden, {space.slopes.data(), 2 * a.hidden, 1},
               {weights.data(), kWidth, 2 * a.hidden * kWidth}, space.gradients.data(), a.width, true);
      add_products(space.gradients.data(), rows * a.width, a.losses, rows * a.width, own);
    }
  });
  store_gram(products.data(), groups, a.losses, a.gram, [](int64_t, int64_t) { return 1.0; });
}

}  // namespace umda::UMDA_ISA
