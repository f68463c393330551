// Per-task gradient statistics and their combination.
//
//   ema[t] <- beta ema[t] + (1 - beta) g[t];   gram[s,t] = (c[s] ema[s]).(c[t] ema[t]);   out = sum_t w[t] ema[t]
//
// Traffic: statistics reads g and ema once and writes ema (3*T*P elements), the combination reads ema and writes out
// (T*P + P). Work: T*(T+1)/2 multiply-adds per column: bound by memory up to T = 30 or so.
//
// Columns are cut into spans whose rows of ema stay in the level-2 cache: a span is smoothed task by task, then its
// products are taken. Products are summed in float32 over at most kChain columns, kWidth sums side by side, and from
// there on in float64. Spans form groups, whatever the number of threads; a group has its own sums, and those of all
// groups are added in order.
#include "task_gradients.h"

#include "matmul.h"
#include "parallel.h"
#include "products.h"
#include "scratch.h"
#include "simd.h"

namespace umda::UMDA_ISA {
namespace {

constexpr int64_t kSpanElements = 1 << 15;  // of ema, all tasks together: 128 KB
constexpr int64_t kMinGroup = 1 << 14;
constexpr int64_t kMaxGroups = 512;

int64_t span_columns(int64_t tasks) {
  const int64_t fit = kSpanElements / tasks / kChain * kChain;
  return fit < kChain ? kChain : fit;
}

int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

template <class G>
void smooth(float* ema, const G* grad, int64_t count, Vec keep, Vec take) {
  const auto step = [&](int64_t i) UMDA_LAMBDA_INLINE { store(ema + i, fma(keep, load(ema + i), take * load(grad + i))); };
  int64_t i = 0;
  for (; i + 4 * kWidth <= count; i += 4 * kWidth) {
    step(i);
    step(i + kWidth);
    step(i + 2 * kWidth);
    step(i + 3 * kWidth);
  }
  for (; i < count; i += kWidth) {
    const int n = static_cast<int>(smaller<int64_t>(kWidth, count - i));
    store(ema + i, fma(keep, load(ema + i, n), take * load(grad + i, n)), n);
  }
}

// The piece that holds a column.
int64_t piece_of(const TaskGradientStatistics& a, int64_t column) {
  int64_t low = 0, high = a.pieces;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (a.piece_begin[middle] <= column ? low : high) = middle;
  }
  return low;
}

void smooth_span(const TaskGradientStatistics& a, int64_t task, int64_t begin, int64_t end, int64_t piece) {
  const Vec keep = splat(static_cast<float>(a.beta)), take = splat(static_cast<float>(1.0 - a.beta));
  float* const ema = a.ema + task * a.ema_stride;
  for (int64_t column = begin; column < end; ++piece) {
    const int64_t stop = smaller(end, a.piece_begin[piece + 1]);
    const int64_t tensor = task * a.pieces + piece, offset = column - a.piece_begin[piece];
    if (stop > column) {
      UMDA_DISPATCH_DTYPE(a.types[tensor], smooth(ema + column, static_cast<const scalar_t*>(a.grads[tensor]) + offset,
                                                  stop - column, keep, take));
      column = stop;
    }
  }
}

template <class T>
void combine(const TaskGradientCombination& a, int64_t begin, int64_t end) {
  T* const out = static_cast<T*>(a.out);
  constexpr int kVecs = 4;
  int64_t p = begin;
  for (; p + kVecs * kWidth <= end; p += kVecs * kWidth) {
    Vec total[kVecs];
    for (int v = 0; v < kVecs; ++v) {
      total[v] = zero();
    }
    const float* row = a.ema + p;
    for (int64_t t = 0; t < a.tasks; ++t, row += a.ema_stride) {
      const Vec weight = splat(a.weights[t]);
      for (int v = 0; v < kVecs; ++v) {
        total[v] = fma(weight, load(row + v * kWidth), total[v]);
      }
    }
    for (int v = 0; v < kVecs; ++v) {
      store(out + p + v * kWidth, total[v]);
    }
  }
  for (; p < end; p += kWidth) {
    const int n = static_cast<int>(smaller<int64_t>(kWidth, end - p));
    Vec total = zero();
    for (int64_t t = 0; t < a.tasks; ++t) {
      total = fma(splat(a.weights[t]), load(a.ema + t * a.ema_stride + p, n), total);
    }
    store(out + p, total, n);
  }
}

// ---- the gradient of a linear layer's weight ---------------------------------------------------------------
//
// A matrix product, whose sums over the batch are cut into runs of kDepth. A block of kRowBlock x kColumnBlock sums is one
// thread's; both factors are copied into the order in which they are read, strips of kRows rows and vectors of columns,
// which then lie in the level-2 cache, a panel of columns in the level-1 cache.

constexpr int64_t kRowBlock = 16 * kRows, kColumnBlock = 256, kDepth = 128;
constexpr int64_t kPanel = kVecs * kWidth;

// Terms [first, first + depth) of rows [row, row + rows): strips of kRows rows, term by term.
void pack_rows(const LinearWeightGradient& a, int64_t row, int64_t rows, int64_t first, int64_t depth, float* to) {
  for (int64_t r = 0; r < rows; r += kRows) {
    const float* from = a.d_out + first * a.d_out_stride + row + r;
    float* strip = to + r * depth;
    const int64_t count = smaller<int64_t>(kRows, rows - r);
    for (int64_t k = 0; k < depth; ++k, from += a.d_out_stride, strip += kRows) {
      if (count == kRows) {
        __builtin_memcpy(strip, from, kRows * sizeof(float));
      } else {
        for (int64_t i = 0; i < count; ++i) {
          strip[i] = from[i];
        }
      }
    }
  }
}

// The same terms of columns [column, column + columns): vector by vector, the last filled up with zeros.
void pack_columns(const LinearWeightGradient& a, int64_t column, int64_t columns, int64_t first, int64_t depth,
                  float* to) {
  for (int64_t c = 0; c < columns; c += kWidth) {
    const int count = static_cast<int>(smaller<int64_t>(kWidth, columns - c));
    const float* from = a.x + first * a.x_stride + column + c;
    for (int64_t k = 0; k < depth; ++k, from += a.x_stride, to += kWidth) {
      store(to, load(from, count));
    }
  }
}

}  // namespace

void linear_weight_gradient(const LinearWeightGradient& a) {
  const int64_t row_blocks = (a.outputs + kRowBlock - 1) / kRowBlock;
  const int64_t column_blocks = (a.inputs + kColumnBlock - 1) / kColumnBlock;
  parallel_items(row_blocks * column_blocks, [&](int64_t item) {
    const int64_t row = item % row_blocks * kRowBlock, rows = smaller(kRowBlock, a.outputs - row);
    const int64_t column = item / row_blocks * kColumnBlock, columns = smaller(kColumnBlock, a.inputs - column);
    const Scratch<float> left(kRowBlock * kDepth), right(kColumnBlock * kDepth);
    float* const out = a.out + row * a.out_stride + column;
    for (int64_t first = 0; first == 0 || first < a.batch; first += kDepth) {
      const int64_t depth = smaller(kDepth, a.batch - first);
      pack_rows(a, row, rows, first, depth, left.data());
      pack_columns(a, column, columns, first, depth, right.data());
      for (int64_t c = 0; c < columns; c += kPanel) {
        const Columns panel{&right[c * depth], kWidth, depth * kWidth};
        for (int64_t r = 0; r < rows; r += kRows) {
          multiply(smaller<int64_t>(kRows, rows - r), smaller<int64_t>(kPanel, columns - c), depth,
                   {&left[r * depth], 1, kRows}, panel, out + r * a.out_stride + c, a.out_stride, first > 0);
        }
      }
    }
  });
}

void task_gradient_statistics(const TaskGradientStatistics& a) {
  const int64_t span = span_columns(a.tasks), pairs = a.tasks * a.tasks;
  const int64_t group = round_up(larger(kMinGroup, (a.columns + kMaxGroups - 1) / kMaxGroups), span);
  const int64_t groups = (a.columns + group - 1) / group;
  const Scratch<double> products(groups * pairs);
  parallel_items(groups, [&](int64_t g) {
    double* const own = &products[g * pairs];
    __builtin_memset(own, 0, static_cast<size_t>(pairs) * sizeof(double));
    const int64_t stop = smaller(a.columns, (g + 1) * group);
    for (int64_t begin = g * group; begin < stop; begin += span) {
      const int64_t end = smaller(begin + span, stop), piece = piece_of(a, begin);
      for (int64_t t = 0; t < a.tasks; ++t) {
        if (a.active == nullptr || a.active[t]) {
          smooth_span(a, t, begin, end, piece);
        }
      }
      add_products(a.ema + begin, a.ema_stride, a.tasks, end - begin, own);
    }
  });
  store_gram(products.data(), groups, a.tasks, a.gram, [&](int64_t s, int64_t t) {
    return static_cast<double>(a.correction[s]) * static_cast<double>(a.correction[t]);
  });
}

void combine_task_gradients(const TaskGradientCombination& a) {
  parallel_ranges(a.columns, 1 << 14, [&](int64_t begin, int64_t end) {
    UMDA_DISPATCH_DTYPE(a.out_type, combine<scalar_t>(a, begin, end));
  });
}

}  // namespace umda::UMDA_ISA
