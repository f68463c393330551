// Fusion of views, their moments, and the cosines between their projections, in one sweep.
//
//   beta[i,u] = softmax over the present views u of scores[i,u];   z[i] = sum_u beta[i,u] y[i,u]
//   mean[u], variance[u] = moments of y[i,u] over the instances i that have view u
//   cosine_sum = sum over i, u < w present of e[i,u].e[i,w],   e = projected / max(|projected|, 1e-8)
//
// Traffic: forward reads y and projected and writes z, (V D + V P + D) elements per instance; backward reads y, projected
// and d_z and writes dy and d_projected, (2 V D + 2 V P + D). Work: 4 V D + 4 V P operations per instance forward, about
// twice that backward: bound by memory for any number of views.
//
// Variances are sums of squares about a shift, the mean of the first few rows of a partition, so that nothing cancels
// however far from 0 the features are. Sums are taken in float32 over a tile and over a partition, and in float64 over
// partitions, which are fixed by the sizes alone. With S_u = e_0 + ... + e_{u-1}, the cosines of an instance are
// sum_u e_u.S_u: linear in the number of views, and without the cancellation of (|S|^2 - V) / 2.
//
// A tile of instances is taken at a time, small enough to be still in the level-2 cache when its rows are read again.
// What is done once per view and instance (softmax, norms) is done with one instance per lane. Rows of absent views are
// never read: their pointers lead to the shift or to a row of zeros.
#include "view_fusion.h"

#include "blocks.h"
#include "parallel.h"
#include "scratch.h"
#include "simd.h"

namespace umda::UMDA_ISA {
namespace {

constexpr int64_t kTile = 32;               // instances of a tile, at most; a multiple of every vector's width
constexpr int64_t kTileBytes = 256 * 1024;  // rows of a tile, at most (kRows instances at least)
constexpr int64_t kPartition = 256;         // instances of a partition, at least
constexpr int64_t kMaxPartitions = 1024;    // bounds the partial sums
constexpr int64_t kShiftRows = 8;           // whose mean is the shift of a partition
constexpr int kRows = 4;                    // instances taken together: their sums are added across lanes at once
constexpr float kClamp = 1e-8f;             // of norms

UMDA_INLINE Vec square_root(Vec x) {
#if defined(UMDA_ISA_AVX512)
  return _mm512_sqrt_ps(x);
#elif defined(UMDA_ISA_AVX2)
  return _mm256_sqrt_ps(x);
#else
  for (int i = 0; i < kWidth; ++i) {
    x[i] = __builtin_sqrtf(x[i]);
  }
  return x;
#endif
}

// x where `keep`, else 0, whatever x is.
UMDA_INLINE Vec masked(Vec x, bool keep) {
  using IVec = int __attribute__((vector_size(sizeof(Vec))));
  return (Vec)((IVec)x & (IVec)splat(bits_float(keep ? 0xffffffffu : 0u)));
}

UMDA_INLINE int64_t element_size(DType type) { return type == DType::float32 ? 4 : 2; }

// How the instances are cut; a function of the sizes alone.
struct Shape {
  explicit Shape(const ViewFusionInput& in) {
    const int64_t of_y = 2 * in.views * in.y.width * element_size(in.y.type);
    const int64_t of_projected =
        in.projected.data == nullptr ? 0 : 2 * in.views * in.projected.width * element_size(in.projected.type);
    const int64_t bytes = larger<int64_t>(1, larger(of_y, of_projected));
    tile = larger<int64_t>(kRows, smaller(kTile, kTileBytes / bytes / kRows * kRows));
    partition = larger(kPartition, (in.instances + kMaxPartitions - 1) / kMaxPartitions);
    partition = (partition + kTile - 1) / kTile * kTile;
    partitions = (in.instances + partition - 1) / partition;
  }

  int64_t tile, partition, partitions;
};

// f(count, i) for i in [begin, end), count (a constant) instances at a time.
template <class F>
UMDA_INLINE void in_groups(int64_t begin, int64_t end, F&& f) {
  int64_t i = begin;
  for (; i + kRows <= end; i += kRows) {
    f(Constant<kRows>{}, i);
  }
  for (; i < end; ++i) {
    f(Constant<1>{}, i);
  }
}

// Rows of kCount instances from i on, [views][kCount]; those of absent views are absent + u * step.
template <int kCount, class T>
UMDA_INLINE void row_pointers(const ViewFusionInput& in, const ViewRows& rows, int64_t i, const T* absent, int64_t step,
                              const T** to) {
  for (int64_t u = 0; u < in.views; ++u) {
    for (int r = 0; r < kCount; ++r) {
      const bool here = in.mask == nullptr || in.mask[(i + r) * in.views + u];
      to[u * kCount + r] = here ? static_cast<const T*>(rows.data) + (i + r) * rows.instance_stride + u * rows.view_stride
                                : absent + u * step;
    }
  }
}

// ---- one instance per lane ---------------------------------------------------------------------------------

// Arrays of a tile are [views][kTile].

// 1 or 0: whether the view is present.
void load_mask(const ViewFusionInput& in, int64_t begin, int64_t count, float* to) {
  for (int64_t u = 0; u < in.views; ++u) {
    for (int64_t i = 0; i < count; ++i) {
      to[u * kTile + i] = in.mask == nullptr || in.mask[(begin + i) * in.views + u] ? 1.0f : 0.0f;
    }
  }
}

template <class S>
void load_scores(const ViewFusionInput& in, int64_t begin, int64_t count, float* to) {
  const int64_t stride = in.scores.instance_stride;
  for (int64_t u = 0; u < in.views; ++u) {
    const S* const from = static_cast<const S*>(in.scores.data) + begin * stride + u * in.scores.view_stride;
    for (int64_t i = 0; i < count; ++i) {
      to[u * kTile + i] = to_float(from[i * stride]);
    }
  }
}

// [instances, views] from and to a tile.
void load_lanes(const float* from, int64_t views, int64_t begin, int64_t count, float* to) {
  for (int64_t u = 0; u < views; ++u) {
    for (int64_t i = 0; i < count; ++i) {
      to[u * kTile + i] = from[(begin + i) * views + u];
    }
  }
}

template <class S>
void store_lanes(const float* from, int64_t views, int64_t begin, int64_t count, S* to) {
  for (int64_t u = 0; u < views; ++u) {
    for (int64_t i = 0; i < count; ++i) {
      to[(begin + i) * views + u] = from_float<S>(from[u * kTile + i]);
    }
  }
}

// x: scores, then their softmax over the present views.
void softmax(int64_t views, int64_t count, const float* present, float* x) {
  const Vec nothing = splat(-__builtin_inff());
  for (int64_t lane = 0; lane < count; lane += kWidth) {
    Vec top = nothing;
    for (int64_t u = 0; u < views; ++u) {
      const Vec score = load(present + u * kTile + lane) > zero() ? load(x + u * kTile + lane) : nothing;
      store(x + u * kTile + lane, score);
      top = max(score, top);  // a NaN does not become the maximum, but the sum
    }
    top = top > nothing ? top : zero();
    Vec total = zero();
    for (int64_t u = 0; u < views; ++u) {
      const Vec e = exp(load(x + u * kTile + lane) - top);
      store(x + u * kTile + lane, e);
      total = total + e;
    }
    total = total == zero() ? splat(1.0f) : total;  // no view, or none with a score above -inf
    for (int64_t u = 0; u < views; ++u) {
      const Vec share = load(x + u * kTile + lane) / total;
      store(x + u * kTile + lane, load(present + u * kTile + lane) > zero() ? share : zero());
    }
  }
}

// to[lane of r, view u] = left[r].right[u][r] for kViews views from u on and kCount instances; right is [views][kCount].
// kSquare: right's own squares. Asks for what comes `ahead` elements later.
template <int kViews, int kCount, bool kSquare, class T>
UMDA_INLINE void dot_views(const T* const* left, const T* const* right, int64_t u, int64_t width, int64_t ahead,
                           float* to) {
  Vec dots[kViews][kCount];
  for (int w = 0; w < kViews; ++w) {
    for (int r = 0; r < kCount; ++r) {
      dots[w][r] = zero();
    }
  }
  in_blocks<kVecsPerLine<T>>(width, false, [&](int64_t d, auto vecs, auto&& read, auto&&, auto&&) UMDA_LAMBDA_INLINE {
    for (int v = 0; v < decltype(vecs)::value; ++v) {
      Vec factor[kCount];
      for (int r = 0; r < kCount; ++r) {
        factor[r] = kSquare ? zero() : read(left[r] + d + v * kWidth);
      }
      for (int w = 0; w < kViews; ++w) {
        for (int r = 0; r < kCount; ++r) {
          const T* const from = right[(u + w) * kCount + r] + d + v * kWidth;
          if (v == 0) {
            prefetch(from + ahead);
          }
          const Vec x = read(from);
          dots[w][r] = fma(kSquare ? x : factor[r], x, dots[w][r]);
        }
      }
    }
  });
  for (int w = 0; w < kViews; ++w) {
    float* const lane = to + (u + w) * kTile;
    if constexpr (kCount == 4) {
      sums(dots[w][0], dots[w][1], dots[w][2], dots[w][3], lane);
    } else {
      for (int r = 0; r < kCount; ++r) {
        lane[r] = sum(dots[w][r]);
      }
    }
  }
}

template <int kCount, bool kSquare, class T>
UMDA_INLINE void dot_rows(const T* const* left, const T* const* right, int64_t views, int64_t width, float* to) {
  constexpr int kTogether = kWidth == 16 ? 3 : 1;  // what the registers hold
  const int64_t ahead = 2 * kCount * views * width;
  int64_t u = 0;
  for (; u + kTogether <= views; u += kTogether) {
    dot_views<kTogether, kCount, kSquare>(left, right, u, width, ahead, to);
  }
  for (; u < views; ++u) {
    dot_views<1, kCount, kSquare>(left, right, u, width, ahead, to);
  }
}

// |projected|^2 of a tile; 0 where the view is absent.
template <class P>
void square_norms(const ViewFusionInput& in, int64_t begin, int64_t end, const P* zeros, float* to) {
  const P* rows[kMaxFusedViews * kRows];
  in_groups(begin, end, [&](auto size, int64_t i) UMDA_LAMBDA_INLINE {
    constexpr int kCount = decltype(size)::value;
    row_pointers<kCount>(in, in.projected, i, zeros, 0, rows);
    dot_rows<kCount, true>(rows, rows, in.views, in.projected.width, to + (i - begin));
  });
}

// ---- forward ---------------------------------------------------------------------------------------------

// What a partition leaves behind, all [partitions, ...].
struct Parts {
  void* shift;      // [views, width], of y's type
  float* sums;      // [2, views, width]: of y - shift and of its square
  int64_t* count;   // [views]
  double* cosines;  // []
};

UMDA_INLINE float largest_finite(const float16*) { return 65504.0f; }
template <class T>
UMDA_INLINE float largest_finite(const T*) {
  return 0x1.fep127f;  // of bfloat16; float32 has a little more
}

// The mean of the first rows that have the view; 0 where that is not finite: any number would do.
template <class T>
void find_shift(const ViewFusionInput& in, int64_t begin, int64_t end, float* work, T* to) {
  for (int64_t u = 0; u < in.views; ++u) {
    int64_t found = 0;
    __builtin_memset(work, 0, static_cast<size_t>(in.y.width) * sizeof(float));
    for (int64_t i = begin; i < end && found < kShiftRows; ++i) {
      if (in.mask != nullptr && !in.mask[i * in.views + u]) {
        continue;
      }
      ++found;
      const T* const row = static_cast<const T*>(in.y.data) + i * in.y.instance_stride + u * in.y.view_stride;
      in_blocks<1>(in.y.width, false, [&](int64_t d, auto, auto&& read, auto&& write, auto&&) UMDA_LAMBDA_INLINE {
        write(work + d, read(work + d) + read(row + d));
      });
    }
    const Vec share = splat(found == 0 ? 0.0f : 1.0f / static_cast<float>(found));
    const Vec bound = splat(largest_finite(to));
    in_blocks<1>(in.y.width, false, [&](int64_t d, auto, auto&& read, auto&& write, auto&&) UMDA_LAMBDA_INLINE {
      const Vec mean = read(work + d) * share;
      write(to + u * in.y.width + d, (mean <= bound) & (mean >= zero() - bound) ? mean : zero());
    });
  }
}

// z of kCount instances, and what they add to the sums about the shift.
template <int kCount, class T>
UMDA_INLINE void fuse_rows(const T* const* rows, const T* shift, const float* beta, int64_t views, int64_t width, T* z,
                           float* sums_of, bool past_cache) {
  constexpr int kVecs = 2;
  float* const squares_of = sums_of + views * width;
  // The same place two groups on, which the machine does not ask for in time; past the end it is harmless.
  const int64_t ahead = 2 * kCount * views * width;
  in_blocks<kVecs>(width, past_cache, [&](int64_t d, auto vecs, auto&& read, auto&& write, auto&& put) UMDA_LAMBDA_INLINE {
    constexpr int kBlock = decltype(vecs)::value;
    Vec fused[kCount][kBlock];
    for (int r = 0; r < kCount; ++r) {
      for (int v = 0; v < kBlock; ++v) {
        fused[r][v] = zero();
      }
    }
    for (int64_t u = 0; u < views; ++u) {
      Vec weight[kCount];
      for (int r = 0; r < kCount; ++r) {
        weight[r] = splat(beta[u * kTile + r]);
      }
      for (int v = 0; v < kBlock; ++v) {
        const int64_t at = u * width + d + v * kWidth;
        const Vec base = read(shift + at);
        Vec first = zero(), second = zero();
        for (int r = 0; r < kCount; ++r) {
          if (v % kVecsPerLine<T> == 0) {
            prefetch(rows[u * kCount + r] + d + v * kWidth + ahead);
          }
          const Vec x = read(rows[u * kCount + r] + d + v * kWidth);
          fused[r][v] = fma(weight[r], x, fused[r][v]);
          const Vec off = x - base;
          first = first + off;
          second = fma(off, off, second);
        }
        write(sums_of + at, read(sums_of + at) + first);
        write(squares_of + at, read(squares_of + at) + second);
      }
    }
    for (int r = 0; r < kCount; ++r) {
      for (int v = 0; v < kBlock; ++v) {
        put(z + r * width + d + v * kWidth, fused[r][v]);
      }
    }
  });
}

// to += from; from = 0.
void flush(float* from, float* to, int64_t count) {
  in_blocks<1>(count, false, [&](int64_t d, auto, auto&& read, auto&& write, auto&&) UMDA_LAMBDA_INLINE {
    write(to + d, read(to + d) + read(from + d));
    write(from + d, zero());
  });
}

template <class T>
void fuse_partition(const ViewFusionForward& a, const Shape& shape, int64_t p, const Parts& parts) {
  const ViewFusionInput& in = a.in;
  const int64_t views = in.views, width = in.y.width, size = views * width;
  const Scratch<float> lanes(2 * views * kTile);
  const Scratch<float> tile_sums(2 * size + width);
  float* const present = lanes.data();
  float* const beta = present + views * kTile;
  float* const sums_of = parts.sums + p * 2 * size;
  T* const shift = static_cast<T*>(parts.shift) + p * size;
  int64_t* const seen = parts.count + p * views;
  __builtin_memset(lanes.data(), 0, static_cast<size_t>(2 * views * kTile) * sizeof(float));
  __builtin_memset(tile_sums.data(), 0, static_cast<size_t>(2 * size) * sizeof(float));
  __builtin_memset(sums_of, 0, static_cast<size_t>(2 * size) * sizeof(float));
  const int64_t begin = p * shape.partition, end = smaller(in.instances, begin + shape.partition);
  find_shift(in, begin, end, tile_sums.data() + 2 * size, shift);
  for (int64_t u = 0; u < views; ++u) {
    seen[u] = in.mask == nullptr ? end - begin : 0;
    for (int64_t i = begin; in.mask != nullptr && i < end; ++i) {
      seen[u] += in.mask[i * views + u] ? 1 : 0;
    }
  }
  T* const z = static_cast<T*>(a.z);
  const bool past_cache = worth_streaming(z, in.instances, width);
  const T* rows[kMaxFusedViews * kRows];
  for (int64_t first = begin; first < end; first += kTile) {
    const int64_t count = smaller(kTile, end - first);
    load_mask(in, first, count, present);
    UMDA_DISPATCH_DTYPE(in.scores.type, load_scores<scalar_t>(in, first, count, beta));
    softmax(views, count, present, beta);
    store_lanes(beta, views, first, count, a.beta);
    in_groups(first, first + count, [&](auto group, int64_t i) UMDA_LAMBDA_INLINE {
      constexpr int kCount = decltype(group)::value;
      row_pointers<kCount>(in, in.y, i, shift, width, rows);
      fuse_rows<kCount>(rows, shift, beta + (i - first), views, width, z + i * width, tile_sums.data(), past_cache);
    });
    flush(tile_sums.data(), sums_of, 2 * size);
  }
  stream_fence();
}

// Sum of the cosines of a group of instances.
template <int kCount, class P>
UMDA_INLINE float cosines_of(const P* const* rows, const float* inverse, int64_t views, int64_t width) {
  constexpr int kVecs = 4;
  Vec total[kVecs];
  for (int v = 0; v < kVecs; ++v) {
    total[v] = zero();
  }
  for (int r = 0; r < kCount; ++r) {
    in_blocks<kVecs>(width, false, [&](int64_t d, auto vecs, auto&& read, auto&&, auto&&) UMDA_LAMBDA_INLINE {
      constexpr int kBlock = decltype(vecs)::value;
      Vec before[kBlock];
      for (int v = 0; v < kBlock; ++v) {
        before[v] = zero();
      }
      for (int64_t u = 0; u < views; ++u) {
        const Vec scale = splat(inverse[u * kTile + r]);
        for (int v = 0; v < kBlock; ++v) {
          const Vec unit = scale * read(rows[u * kCount + r] + d + v * kWidth);
          total[v] = fma(unit, before[v], total[v]);
          before[v] = before[v] + unit;
        }
      }
    });
  }
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

// 1 / max(|projected|, 1e-8) in place of |projected|^2.
void invert_norms(int64_t views, float* x) {
  for (int64_t lane = 0; lane < views * kTile; lane += kWidth) {
    store(x + lane, splat(1.0f) / max(splat(kClamp), square_root(load(x + lane))));
  }
}

template <class P>
double sum_cosines(const ViewFusionInput& in, const Shape& shape, int64_t p) {
  const Scratch<float> inverse(in.views * kTile);
  const Scratch<P> zeros(in.projected.width);
  __builtin_memset(inverse.data(), 0, static_cast<size_t>(in.views * kTile) * sizeof(float));
  __builtin_memset(static_cast<void*>(zeros.data()), 0, static_cast<size_t>(in.projected.width) * sizeof(P));
  const P* rows[kMaxFusedViews * kRows];
  const int64_t begin = p * shape.partition, end = smaller(in.instances, begin + shape.partition);
  double total = 0.0;
  for (int64_t first = begin; first < end; first += shape.tile) {
    const int64_t last = smaller(first + shape.tile, end);
    square_norms(in, first, last, zeros.data(), inverse.data());
    invert_norms(in.views, inverse.data());
    in_groups(first, last, [&](auto size, int64_t i) UMDA_LAMBDA_INLINE {
      constexpr int kCount = decltype(size)::value;
      row_pointers<kCount>(in, in.projected, i, zeros.data(), 0, rows);
      total += static_cast<double>(
          cosines_of<kCount>(rows, inverse.data() + (i - first), in.views, in.projected.width));
    });
  }
  return total;
}

// Mean and variance of columns [begin, end) of view u from all partitions.
template <class T>
void merge_columns(const ViewFusionForward& a, const Shape& shape, const Parts& parts, int64_t u, int64_t begin,
                   int64_t end) {
  constexpr int64_t kColumns = 64;
  const int64_t views = a.in.views, width = a.in.y.width, size = views * width;
  for (int64_t d = begin; d < end; d += kColumns) {
    const int64_t columns = smaller(kColumns, end - d), at = u * width + d;
    // About the first partition's shift.
    double first[kColumns] = {}, second[kColumns] = {};
    const T* const base = static_cast<const T*>(parts.shift) + at;
    const int64_t count = a.count[u];
    for (int64_t p = 0; p < shape.partitions; ++p) {
      const int64_t seen = parts.count[p * views + u];
      const T* const shift = base + p * size;
      const float* const sums_of = parts.sums + p * 2 * size + at;
      for (int64_t c = 0; c < columns && seen > 0; ++c) {
        const double off = static_cast<double>(to_float(shift[c])) - static_cast<double>(to_float(base[c]));
        const double s = static_cast<double>(sums_of[c]), n = static_cast<double>(seen);
        first[c] += n * off + s;
        second[c] += static_cast<double>(sums_of[size + c]) + off * (2.0 * s + n * off);
      }
    }
    for (int64_t c = 0; c < columns; ++c) {
      const double n = static_cast<double>(count), off = count == 0 ? 0.0 : first[c] / n;
      const double variance = count == 0 ? 0.0 : (second[c] - first[c] * off) / n;
      const double mean = count == 0 ? 0.0 : static_cast<double>(to_float(base[c])) + off;
      a.mean[at + c] = static_cast<float>(mean);
      a.rest[at + c] = static_cast<float>(mean - static_cast<double>(a.mean[at + c]));
      a.variance[at + c] = variance < 0.0 ? 0.0f : static_cast<float>(variance);
    }
  }
}

template <class T>
void forward(const ViewFusionForward& a) {
  const ViewFusionInput& in = a.in;
  const Shape shape(in);
  const int64_t size = in.views * in.y.width;
  const Scratch<T> shifts(shape.partitions * size);
  const Scratch<float> sums_of(shape.partitions * 2 * size);
  const Scratch<int64_t> counts(shape.partitions * in.views);
  const Scratch<double> cosines(shape.partitions);
  const Parts parts{shifts.data(), sums_of.data(), counts.data(), cosines.data()};
  parallel_items(shape.partitions, [&](int64_t p) {
    fuse_partition<T>(a, shape, p, parts);
    parts.cosines[p] = 0.0;
    if (in.projected.data != nullptr) {
      UMDA_DISPATCH_DTYPE(in.projected.type, parts.cosines[p] = sum_cosines<scalar_t>(in, shape, p));
    }
  });
  for (int64_t u = 0; u < in.views; ++u) {
    a.count[u] = 0;
    for (int64_t p = 0; p < shape.partitions; ++p) {
      a.count[u] += parts.count[p * in.views + u];
    }
  }
  constexpr int64_t kPiece = 64;  // columns
  const int64_t pieces = (in.y.width + kPiece - 1) / kPiece;
  parallel_ranges(in.views * pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t d = i % pieces * kPiece;
      merge_columns<T>(a, shape, parts, i / pieces, d, smaller(in.y.width, d + kPiece));
    }
  });
  double cosine_sum = 0.0;
  for (int64_t p = 0; p < shape.partitions; ++p) {
    cosine_sum += parts.cosines[p];
  }
  *a.cosine_sum = static_cast<float>(cosine_sum);
  int64_t pairs = 0;
  for (int64_t i = 0; i < in.instances; ++i) {
    int64_t here = in.mask == nullptr ? in.views : 0;
    for (int64_t u = 0; in.mask != nullptr && u < in.views; ++u) {
      here += in.mask[i * in.views + u] ? 1 : 0;
    }
    pairs += here * (here - 1) / 2;
  }
  *a.pairs = pairs;
}

// ---- backward --------------------------------------------------------------------------------------------
//
//   g[u] = d_z.y[u] + d_beta[u];   d_scores[u] = beta[u] (g[u] - sum_w beta[w] g[w])
//   dy[u] = beta[u] d_z + (d_mean[u] + 2 d_variance[u] (y[u] - mean[u])) / count[u]
//   d_projected[u] = d_cosine_sum / |projected[u]| (S - e[u] (e[u].S)),  S the sum of all e of the instance
//
// The variance's gradient through the mean is 0: the mean is where the sum of squares is smallest (which takes
// the mean to more digits than float32 has, far from 0). Below the clamp, e is
// linear in the projection, and its gradient d_cosine_sum (S - e[u]) / 1e-8.

// d_mean / count and 2 d_variance / count, [views, width] each.
void scale_moments(const ViewFusionBackward& a, float* offset, float* slope) {
  for (int64_t u = 0; u < a.in.views; ++u) {
    const float share = a.count[u] == 0 ? 0.0f : 1.0f / static_cast<float>(a.count[u]);
    for (int64_t c = u * a.in.y.width; c < (u + 1) * a.in.y.width; ++c) {
      offset[c] = a.d_mean == nullptr ? 0.0f : share * a.d_mean[c];
      slope[c] = a.d_variance == nullptr ? 0.0f : 2.0f * share * a.d_variance[c];
    }
  }
}

// In place: beta stays, g becomes d_scores.
void softmax_gradient(int64_t views, int64_t count, const float* present, const float* beta, float* g) {
  for (int64_t lane = 0; lane < count; lane += kWidth) {
    Vec mean = zero();
    for (int64_t u = 0; u < views; ++u) {
      const Vec change = load(present + u * kTile + lane) > zero() ? load(g + u * kTile + lane) : zero();
      mean = fma(load(beta + u * kTile + lane), change, mean);
    }
    for (int64_t u = 0; u < views; ++u) {
      const Vec change = load(beta + u * kTile + lane) * (load(g + u * kTile + lane) - mean);
      store(g + u * kTile + lane, load(present + u * kTile + lane) > zero() ? change : zero());
    }
  }
}

// dy of kCount instances. d_z[r] is null where nothing comes through z.
template <int kCount, class T>
UMDA_INLINE void spread_rows(const ViewFusionBackward& a, const T* const* rows, const T* const* d_z, const float* beta,
                             const float* offset, const float* slope, const bool* present, T* dy, bool past_cache) {
  constexpr int kVecs = kWidth == 16 ? 4 : 2;
  const int64_t views = a.in.views, width = a.in.y.width;
  in_blocks<kVecs>(width, past_cache, [&](int64_t d, auto vecs, auto&& read, auto&&, auto&& put) UMDA_LAMBDA_INLINE {
    constexpr int kBlock = decltype(vecs)::value;
    Vec change[kCount][kBlock];
    for (int r = 0; r < kCount; ++r) {
      for (int v = 0; v < kBlock; ++v) {
        change[r][v] = d_z[0] == nullptr ? zero() : read(d_z[r] + d + v * kWidth);
      }
    }
    for (int64_t u = 0; u < views; ++u) {
      Vec weight[kCount];
      for (int r = 0; r < kCount; ++r) {
        weight[r] = splat(beta[u * kTile + r]);
      }
      for (int v = 0; v < kBlock; ++v) {
        const int64_t at = u * width + d + v * kWidth;
        const Vec constant = read(offset + at);
        Vec result[kCount];
        if (a.d_variance != nullptr) {
          const Vec factor = read(slope + at), mean = read(a.mean + at), rest = read(a.rest + at);
          for (int r = 0; r < kCount; ++r) {
            const Vec x = read(rows[u * kCount + r] + d + v * kWidth);
            result[r] = fma(weight[r], change[r][v], fma(factor, (x - mean) - rest, constant));
          }
        } else {
          for (int r = 0; r < kCount; ++r) {
            result[r] = fma(weight[r], change[r][v], constant);
          }
        }
        for (int r = 0; r < kCount; ++r) {
          const Vec kept = present == nullptr ? result[r] : masked(result[r], present[r * views + u]);
          put(dy + (r * views + u) * width + d + v * kWidth, kept);
        }
      }
    }
  });
}

template <class T>
void fusion_gradient(const ViewFusionBackward& a, const Shape& shape, int64_t p, const float* offset, const float* slope) {
  const ViewFusionInput& in = a.in;
  const int64_t views = in.views, width = in.y.width, tile = views * kTile;
  const Scratch<float> lanes(4 * tile);
  const Scratch<T> zeros(width);
  float* const present = lanes.data();
  float *const beta = present + tile, *const g = present + 2 * tile, *const d_beta = present + 3 * tile;
  __builtin_memset(lanes.data(), 0, static_cast<size_t>(4 * tile) * sizeof(float));
  __builtin_memset(static_cast<void*>(zeros.data()), 0, static_cast<size_t>(width) * sizeof(T));
  T* const dy = static_cast<T*>(a.dy);
  const bool past_cache = worth_streaming(dy, in.instances * views, width);
  const bool nothing = a.d_z == nullptr && a.d_mean == nullptr && a.d_variance == nullptr;
  const T *rows[kMaxFusedViews * kRows], *d_z[kRows];
  const auto point = [&](int64_t i, auto size) UMDA_LAMBDA_INLINE {
    constexpr int kCount = decltype(size)::value;
    row_pointers<kCount>(in, in.y, i, zeros.data(), 0, rows);
    for (int r = 0; r < kCount; ++r) {
      d_z[r] = a.d_z == nullptr ? nullptr : static_cast<const T*>(a.d_z) + (i + r) * a.d_z_stride;
    }
  };
  const int64_t begin = p * shape.partition, end = smaller(in.instances, begin + shape.partition);
  for (int64_t first = begin; first < end; first += shape.tile) {
    const int64_t count = smaller(shape.tile, end - first);
    load_mask(in, first, count, present);
    UMDA_DISPATCH_DTYPE(in.scores.type, load_scores<scalar_t>(in, first, count, beta));
    softmax(views, count, present, beta);
    __builtin_memset(g, 0, static_cast<size_t>(tile) * sizeof(float));
    if (a.d_z != nullptr) {
      in_groups(first, first + count, [&](auto size, int64_t i) UMDA_LAMBDA_INLINE {
        constexpr int kCount = decltype(size)::value;
        point(i, size);
        dot_rows<kCount, false>(d_z, rows, views, width, g + (i - first));
      });
    }
    if (a.d_beta != nullptr) {
      load_lanes(a.d_beta, views, first, count, d_beta);
      for (int64_t lane = 0; lane < tile; lane += kWidth) {
        store(g + lane, load(g + lane) + load(d_beta + lane));
      }
    }
    softmax_gradient(views, count, present, beta, g);
    UMDA_DISPATCH_DTYPE(in.scores.type, store_lanes(g, views, first, count, static_cast<scalar_t*>(a.d_scores)));
    if (nothing) {
      const int64_t elements = count * views * width;
      if (elements > 0) {
        __builtin_memset(static_cast<void*>(dy + first * views * width), 0, static_cast<size_t>(elements) * sizeof(T));
      }
      continue;
    }
    if (a.d_z == nullptr) {  // nothing comes through beta, whatever it is
      __builtin_memset(beta, 0, static_cast<size_t>(tile) * sizeof(float));
    }
    in_groups(first, first + count, [&](auto size, int64_t i) UMDA_LAMBDA_INLINE {
      constexpr int kCount = decltype(size)::value;
      point(i, size);
      spread_rows<kCount>(a, rows, d_z, beta + (i - first), offset, slope,
                          in.mask == nullptr ? nullptr : in.mask + i * views, dy + i * views * width, past_cache);
    });
  }
  stream_fence();
}

// e[u].S of an instance, u < views, times |projected[u]| or so: projected[u].S.
template <class P>
UMDA_INLINE void project_rows(const P* const* rows, const float* inverse, int64_t views, int64_t width, float* to) {
  Vec along[kMaxFusedViews];
  for (int64_t u = 0; u < views; ++u) {
    along[u] = zero();
  }
  in_blocks<2>(width, false, [&](int64_t d, auto vecs, auto&& read, auto&&, auto&&) UMDA_LAMBDA_INLINE {
    constexpr int kBlock = decltype(vecs)::value;
    Vec all[kBlock];
    for (int v = 0; v < kBlock; ++v) {
      all[v] = zero();
    }
    for (int64_t u = 0; u < views; ++u) {
      const Vec scale = splat(inverse[u * kTile]);
      for (int v = 0; v < kBlock; ++v) {
        all[v] = fma(scale, read(rows[u] + d + v * kWidth), all[v]);
      }
    }
    for (int64_t u = 0; u < views; ++u) {
      Vec part = along[u];
      for (int v = 0; v < kBlock; ++v) {
        part = fma(all[v], read(rows[u] + d + v * kWidth), part);
      }
      along[u] = part;
    }
  });
  for (int64_t u = 0; u < views; ++u) {
    to[u * kTile] = sum(along[u]);
  }
}

// Norms, their inverses and projected.S in; out: d_projected[u] = toward[u] S - back[u] projected[u].
void cosine_coefficients(int64_t views, int64_t count, float d_cosine_sum, const float* present, const float* inverse,
                         float* toward, float* back) {
  const Vec d = splat(d_cosine_sum), one = splat(1.0f);
  for (int64_t lane = 0; lane < count; lane += kWidth) {
    Vec seen = zero();
    for (int64_t u = 0; u < views; ++u) {
      seen = seen + load(present + u * kTile + lane);
    }
    const auto compared = seen > one;  // else it has no cosine, and no rounding of one
    for (int64_t u = 0; u < views; ++u) {
      const Vec scale = load(inverse + u * kTile + lane);
      const Vec along = scale * load(back + u * kTile + lane);  // e.S
      const Vec share = scale * splat(kClamp) < one ? along : one;
      store(toward + u * kTile + lane, compared ? d * scale : zero());
      store(back + u * kTile + lane, compared ? d * scale * scale * share : zero());
    }
  }
}

template <class P>
UMDA_INLINE void turn_rows(const P* const* rows, const float* inverse, const float* toward, const float* back,
                           const bool* present, int64_t views, int64_t width, P* to, bool past_cache) {
  in_blocks<4>(width, past_cache, [&](int64_t d, auto vecs, auto&& read, auto&&, auto&& put) UMDA_LAMBDA_INLINE {
    constexpr int kBlock = decltype(vecs)::value;
    Vec all[kBlock];
    for (int v = 0; v < kBlock; ++v) {
      all[v] = zero();
    }
    for (int64_t u = 0; u < views; ++u) {
      const Vec scale = splat(inverse[u * kTile]);
      for (int v = 0; v < kBlock; ++v) {
        all[v] = fma(scale, read(rows[u] + d + v * kWidth), all[v]);
      }
    }
    for (int64_t u = 0; u < views; ++u) {
      const Vec ahead = splat(toward[u * kTile]), behind = splat(-back[u * kTile]);
      for (int v = 0; v < kBlock; ++v) {
        const Vec result = fma(behind, read(rows[u] + d + v * kWidth), ahead * all[v]);
        put(to + u * width + d + v * kWidth, present == nullptr ? result : masked(result, present[u]));
      }
    }
  });
}

template <class P>
void cosine_gradient(const ViewFusionBackward& a, const Shape& shape, int64_t p) {
  const ViewFusionInput& in = a.in;
  const int64_t views = in.views, width = in.projected.width, tile = views * kTile;
  P* const to = static_cast<P*>(a.d_projected);
  const int64_t begin = p * shape.partition, end = smaller(in.instances, begin + shape.partition);
  if (a.d_cosine_sum == nullptr) {
    const int64_t elements = (end - begin) * views * width;
    if (elements > 0) {
      __builtin_memset(static_cast<void*>(to + begin * views * width), 0, static_cast<size_t>(elements) * sizeof(P));
    }
    return;
  }
  const Scratch<float> lanes(4 * tile);
  const Scratch<P> zeros(width);
  float *const present = lanes.data(), *const inverse = present + tile;
  float *const toward = present + 2 * tile, *const back = present + 3 * tile;
  __builtin_memset(lanes.data(), 0, static_cast<size_t>(4 * tile) * sizeof(float));
  __builtin_memset(static_cast<void*>(zeros.data()), 0, static_cast<size_t>(width) * sizeof(P));
  const bool past_cache = worth_streaming(to, in.instances * views, width);
  const P* rows[kMaxFusedViews];
  for (int64_t first = begin; first < end; first += shape.tile) {
    const int64_t count = smaller(shape.tile, end - first);
    load_mask(in, first, count, present);
    square_norms(in, first, first + count, zeros.data(), inverse);
    invert_norms(views, inverse);
    for (int64_t i = first; i < first + count; ++i) {
      row_pointers<1>(in, in.projected, i, zeros.data(), 0, rows);
      project_rows(rows, inverse + (i - first), views, width, back + (i - first));
    }
    cosine_coefficients(views, count, *a.d_cosine_sum, present, inverse, toward, back);
    for (int64_t i = first; i < first + count; ++i) {
      row_pointers<1>(in, in.projected, i, zeros.data(), 0, rows);
      turn_rows(rows, inverse + (i - first), toward + (i - first), back + (i - first),
                in.mask == nullptr ? nullptr : in.mask + i * views, views, width, to + i * views * width, past_cache);
    }
  }
  stream_fence();
}

template <class T>
void backward(const ViewFusionBackward& a) {
  const ViewFusionInput& in = a.in;
  const Shape shape(in);
  const Scratch<float> moments(2 * in.views * in.y.width);
  float *const offset = moments.data(), *const slope = offset + in.views * in.y.width;
  scale_moments(a, offset, slope);
  parallel_items(shape.partitions, [&](int64_t p) {
    fusion_gradient<T>(a, shape, p, offset, slope);
    if (in.projected.data != nullptr) {
      UMDA_DISPATCH_DTYPE(in.projected.type, cosine_gradient<scalar_t>(a, shape, p));
    }
  });
}

}  // namespace

void view_fusion_forward(const ViewFusionForward& a) { UMDA_DISPATCH_DTYPE(a.in.y.type, forward<scalar_t>(a)); }

void view_fusion_backward(const ViewFusionBackward& a) { UMDA_DISPATCH_DTYPE(a.in.y.type, backward<scalar_t>(a)); }

}  // namespace umda::UMDA_ISA
