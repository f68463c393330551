// Hybrid cross-view attention over one vector per view.
//
//   a[u,w] = softmax_{w != u, w present}( q[u].k[w] / sqrt(Dh) + bias[u,w] ),   g[u] = sigmoid(gate[u]), 1 if alone
//   p[u,w] = g[u] if w == u else (1 - g[u]) a[u,w];   out[u] = sum_w p[u,w] v[w]
//   mass = mean over heads of p;   entropy[u] = -sum_w p log p
//
// Traffic: forward reads 3 and writes 1 times N*V*H*Dh elements, backward reads 4 and writes 3. Work: 2*V^2*Dh
// multiply-adds per instance and head forward, 5*V^2*Dh backward: bound by memory up to V = 8 or so.
//
// A tile of instances is taken at a time, small enough that its rows are still in the level-2 cache when they are read
// again: first all dot products of its (instance, head) pairs, then everything between products and weights with one
// (instance, head) per lane (softmax, gate, entropy; no exponential is taken alone), then the weighted sums of rows.
// Rows of absent views are never read: their pointers lead to a row of zeros.
//
// The gradient of the bias is summed per partition of instances, and partitions are fixed by N alone.
#include "cross_view.h"

#include "parallel.h"
#include "scratch.h"
#include "simd.h"

namespace umda::UMDA_ISA {
namespace {

constexpr int64_t kLanes = 64;                // (instance, head) pairs of a tile, about
constexpr int64_t kTileBytes = 256 * 1024;    // rows of a tile, at most (one instance at least)
constexpr int64_t kPartition = 256;           // instances of a partition, at least
constexpr int64_t kMaxPartitions = 1024;      // bounds the partial sums
constexpr float kNegligible = -126.0f;        // exp of it is 0 in float32; stands in for -inf where 0 * -inf would be NaN

// ---- logarithms ------------------------------------------------------------------------------------------

// log((1+s)/(1-s)) = 2 s (1 + s^2/3 + s^4/5 + ...), kTerms terms.
template <int kTerms>
UMDA_INLINE Vec twice_atanh(Vec s) {
  const Vec z = s * s;
  Vec p = splat(1.0f / (2 * kTerms - 1));
  for (int i = kTerms - 2; i >= 1; --i) {
    p = fma(p, z, splat(1.0f / static_cast<float>(2 * i + 1)));
  }
  const Vec twice = s + s;
  return fma(twice * z, p, twice);
}

// log(1 + x), 0 <= x <= 1. |s| <= 1/3: what is left out is below 2e-8 of the result.
UMDA_INLINE Vec log1p(Vec x) { return twice_atanh<7>(x / (splat(2.0f) + x)); }

// log(x) of normal positive x; NaN stays NaN. |s| <= 0.172 after taking out the power of 2.
UMDA_INLINE Vec log(Vec x) {
  using IVec = int __attribute__((vector_size(sizeof(Vec))));
  const IVec bits = (IVec)x;
  const IVec power = (bits - 0x3f3504f3) >> 23;  // so that the rest lies between sqrt(1/2) and sqrt(2)
  const Vec f = (Vec)(bits - (power << 23)) - splat(1.0f);
  const Vec n = __builtin_convertvector(power, Vec);
  return fma(n, splat(0x1.62e43p-1f), twice_atanh<5>(f / (splat(2.0f) + f))) + (x - x);
}

UMDA_INLINE Vec absolute(Vec x) { return max(x, zero() - x); }

// ---- rows ------------------------------------------------------------------------------------------------

// to[a * kB + b] = left[a] . right[b].
template <int kA, int kB, class T>
UMDA_INLINE void dots(const T* const* left, const T* const* right, int64_t width, float* to) {
  Vec acc[kA * kB];
  for (int i = 0; i < kA * kB; ++i) {
    acc[i] = zero();
  }
  const auto step = [&](auto&& read) UMDA_LAMBDA_INLINE {
    Vec b[kB];
    for (int j = 0; j < kB; ++j) {
      b[j] = read(right[j]);
    }
    for (int i = 0; i < kA; ++i) {
      const Vec a = read(left[i]);
      for (int j = 0; j < kB; ++j) {
        acc[i * kB + j] = fma(a, b[j], acc[i * kB + j]);
      }
    }
  };
  int64_t d = 0;
  for (; d + kWidth <= width; d += kWidth) {
    step([d](const T* p) UMDA_LAMBDA_INLINE { return load(p + d); });
  }
  if (d < width) {
    const int count = static_cast<int>(width - d);
    step([d, count](const T* p) UMDA_LAMBDA_INLINE { return load(p + d, count); });
  }
  int i = 0;
  for (; i + 4 <= kA * kB; i += 4) {
    sums(acc[i], acc[i + 1], acc[i + 2], acc[i + 3], to + i);
  }
  for (; i < kA * kB; ++i) {
    to[i] = sum(acc[i]);
  }
}

// to[(u * views + w) * stride] = left[u] . right[w] for all pairs of views.
template <class T>
UMDA_INLINE void all_dots(const T* const* left, const T* const* right, int64_t views, int64_t width, float* to,
                          int64_t stride) {
  const auto exact = [&](auto size) UMDA_LAMBDA_INLINE {
    constexpr int kViews = decltype(size)::value;
    float values[kViews * kViews];
    dots<kViews, kViews>(left, right, width, values);
    for (int i = 0; i < kViews * kViews; ++i) {
      to[i * stride] = values[i];
    }
  };
  if (views == 3) {
    exact(Constant<3>{});
    return;
  }
  if (views == 2) {
    exact(Constant<2>{});
    return;
  }
  if (views == 1) {
    exact(Constant<1>{});
    return;
  }
  constexpr int kBlock = 4;
  for (int64_t u = 0; u < views; u += kBlock) {
    for (int64_t w = 0; w < views; w += kBlock) {
      const T *rows[kBlock], *columns[kBlock];
      for (int i = 0; i < kBlock; ++i) {  // past the end: the last view again
        rows[i] = left[smaller(u + i, views - 1)];
        columns[i] = right[smaller(w + i, views - 1)];
      }
      float values[kBlock * kBlock];
      dots<kBlock, kBlock>(rows, columns, width, values);
      for (int i = 0; i < kBlock && u + i < views; ++i) {
        for (int j = 0; j < kBlock && w + j < views; ++j) {
          to[((u + i) * views + w + j) * stride] = values[i * kBlock + j];
        }
      }
    }
  }
}

// x where `keep`, else 0, whatever x is.
UMDA_INLINE Vec masked(Vec x, bool keep) {
  using IVec = int __attribute__((vector_size(sizeof(Vec))));
  return (Vec)((IVec)x & (IVec)splat(bits_float(keep ? 0xffffffffu : 0u)));
}

// to[r] = sum_c weight[r * row_step + c * column_step] rows[c] for kOut results, to_stride apart. Results that are not
// present are 0: their weights are, but some present row may hold an infinity or a NaN.
template <int kOut, class T>
UMDA_INLINE void mix_rows(const float* weight, int64_t row_step, int64_t column_step, const T* const* rows,
                          int64_t count, int64_t width, T* to, int64_t to_stride, const bool* present,
                          bool past_cache) {
  const auto block = [&](int64_t d, auto vecs, auto&& read, auto&& write) UMDA_LAMBDA_INLINE {
    constexpr int kVecs = decltype(vecs)::value;
    Vec acc[kOut][kVecs];
    for (int r = 0; r < kOut; ++r) {
      for (int v = 0; v < kVecs; ++v) {
        acc[r][v] = zero();
      }
    }
    for (int64_t c = 0; c < count; ++c) {
      const T* const from = rows[c] + d;
      Vec row[kVecs];
      for (int v = 0; v < kVecs; ++v) {
        row[v] = read(from + v * kWidth);
      }
      for (int r = 0; r < kOut; ++r) {
        const Vec w = splat(weight[r * row_step + c * column_step]);
        for (int v = 0; v < kVecs; ++v) {
          acc[r][v] = fma(w, row[v], acc[r][v]);
        }
      }
    }
    for (int r = 0; r < kOut; ++r) {
      for (int v = 0; v < kVecs; ++v) {
        const Vec result = present == nullptr ? acc[r][v] : masked(acc[r][v], present[r]);
        write(to + r * to_stride + d + v * kWidth, result);
      }
    }
  };
  const auto whole = [&](int64_t d, auto vecs) UMDA_LAMBDA_INLINE {
    const auto read = [](const T* p) UMDA_LAMBDA_INLINE { return load(p); };
    if constexpr (sizeof(T) == sizeof(float)) {
      if (past_cache) {
        block(d, vecs, read, [](T* p, Vec v) UMDA_LAMBDA_INLINE { stream(p, v); });
        return;
      }
    }
    block(d, vecs, read, [](T* p, Vec v) UMDA_LAMBDA_INLINE { store(p, v); });
  };
  int64_t d = 0;
  for (; d + 2 * kWidth <= width; d += 2 * kWidth) {
    whole(d, Constant<2>{});
  }
  for (; d + kWidth <= width; d += kWidth) {
    whole(d, Constant<1>{});
  }
  if (d < width) {
    const int n = static_cast<int>(width - d);
    block(d, Constant<1>{}, [n](const T* p) UMDA_LAMBDA_INLINE { return load(p, n); },
          [n](T* p, Vec v) UMDA_LAMBDA_INLINE { store(p, v, n); });
  }
}

// to[u] = sum_w weight[u * row_step + w * column_step] rows[w], for all views.
template <class T>
UMDA_INLINE void mix(const float* weight, int64_t row_step, int64_t column_step, const T* const* rows, int64_t views,
                     int64_t width, T* to, int64_t to_stride, const bool* present, bool past_cache) {
  int64_t u = 0;
  const auto some = [&](auto size) UMDA_LAMBDA_INLINE {
    constexpr int kOut = decltype(size)::value;
    mix_rows<kOut>(weight + u * row_step, row_step, column_step, rows, views, width, to + u * to_stride, to_stride,
                   present == nullptr ? nullptr : present + u, past_cache);
    u += kOut;
  };
  while (views - u >= 3) {
    some(Constant<3>{});
  }
  if (views - u == 2) {
    some(Constant<2>{});
  }
  if (views - u == 1) {
    some(Constant<1>{});
  }
}

// ---- a tile ----------------------------------------------------------------------------------------------

// Pairs (instance, head) of a tile, one per lane: lane = place in the tile * heads + head. Arrays are [slot][lanes],
// lanes padded to whole vectors.
struct Shape {
  explicit Shape(const CrossViewInput& in) : views(in.views), heads(in.heads), width(in.width) {
    const int64_t bytes = 4 * views * heads * width * (in.type == DType::float32 ? 4 : 2);
    tile = larger<int64_t>(1, smaller(kLanes / heads, kTileBytes / larger<int64_t>(bytes, 1)));
    lanes = (tile * heads + kWidth - 1) / kWidth * kWidth;
    partition = larger(kPartition, (in.instances + kMaxPartitions - 1) / kMaxPartitions);
    partition = (partition + tile - 1) / tile * tile;
    partitions = (in.instances + partition - 1) / partition;
    scale = 1.0f / __builtin_sqrtf(static_cast<float>(width));
  }

  int64_t views, heads, width;
  int64_t tile;   // instances
  int64_t lanes;  // padded
  int64_t partition, partitions;
  float scale;
};

// bias[h, u, w] for every lane: [views * views, lanes].
void spread_bias(const CrossViewInput& in, const Shape& shape, float* to) {
  for (int64_t slot = 0; slot < shape.views * shape.views; ++slot) {
    for (int64_t lane = 0; lane < shape.lanes; ++lane) {
      const int64_t head = lane % shape.heads;
      to[slot * shape.lanes + lane] = in.bias == nullptr ? 0.0f : in.bias[head * shape.views * shape.views + slot];
    }
  }
}

template <class G>
void load_gate(const CrossViewInput& in, const Shape& shape, int64_t begin, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t u = 0; u < shape.views; ++u) {
      const G* const from = static_cast<const G*>(in.gate.data) + (begin + i) * in.gate.instance_stride +
                            u * in.gate.view_stride;
      for (int64_t h = 0; h < shape.heads; ++h) {
        to[u * shape.lanes + i * shape.heads + h] = to_float(from[h * in.gate.head_stride]);
      }
    }
  }
}

// to[u, lane] = from[instance, u, head] and back, [instances, views, heads] contiguous.
void load_per_head(const float* from, const Shape& shape, int64_t begin, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t u = 0; u < shape.views; ++u) {
      __builtin_memcpy(to + u * shape.lanes + i * shape.heads, from + ((begin + i) * shape.views + u) * shape.heads,
                       static_cast<size_t>(shape.heads) * sizeof(float));
    }
  }
}

template <class G>
void store_per_head(const float* from, const Shape& shape, int64_t begin, int64_t count, G* to) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t u = 0; u < shape.views; ++u) {
      G* const row = to + ((begin + i) * shape.views + u) * shape.heads;
      const float* const lane = from + u * shape.lanes + i * shape.heads;
      for (int64_t h = 0; h < shape.heads; h += kWidth) {
        const int n = static_cast<int>(smaller<int64_t>(kWidth, shape.heads - h));
        store(row + h, load(lane + h, n), n);
      }
    }
  }
}

// 1 or 0 per view and lane: whether the view is present.
void spread_mask(const CrossViewInput& in, const Shape& shape, int64_t begin, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t u = 0; u < shape.views; ++u) {
      const float present = in.mask[(begin + i) * shape.views + u] ? 1.0f : 0.0f;
      for (int64_t h = 0; h < shape.heads; ++h) {
        to[u * shape.lanes + i * shape.heads + h] = present;
      }
    }
  }
}

// Rows of one instance and head, views in turn.
template <class T>
UMDA_INLINE void row_pointers(const CrossViewRows& rows, int64_t views, int64_t instance, int64_t head,
                              const bool* present, const T* zeros, const T** to) {
  const T* row = static_cast<const T*>(rows.data) + instance * rows.instance_stride + head * rows.head_stride;
  for (int64_t u = 0; u < views; ++u, row += rows.view_stride) {
    to[u] = present == nullptr || present[u] ? row : zeros;
  }
}

// Rows of the same place in the instance `ahead` further on; a head's rows are too short for the hardware to see the
// pattern in time. Past the end it is harmless.
template <class T>
UMDA_INLINE void prefetch_rows(const CrossViewRows& rows, int64_t views, int64_t instance, int64_t head, int64_t width) {
  constexpr int64_t kAhead = 2;
  const T* row =
      static_cast<const T*>(rows.data) + (instance + kAhead) * rows.instance_stride + head * rows.head_stride;
  for (int64_t u = 0; u < views; ++u, row += rows.view_stride) {
    for (int64_t d = 0; d < width; d += 64 / static_cast<int64_t>(sizeof(T))) {
      prefetch(row + d);
    }
  }
}

// What the lanes of one vector and one query view have between products and weights.
struct Lane {
  Vec open;             // 1 where some other view is there to listen to (and this one is present), else 0
  Vec top, sum, mean;   // of the other views' logits: maximum, sum of exp(x - max), mean of x - max under a
  Vec gate, rest;       // g and 1 - g
  Vec logit;            // the gate's
  Vec gate_entropy;     // of (g, 1 - g)
};

// Leaves exp(logit - top) of the other views in weight[w * lanes], and logit - top in shifted[w * lanes] if asked for.
// present: 1 or 0 per view and lane, or null.
template <bool kShifted>
UMDA_INLINE Lane softmax(const Shape& shape, int64_t u, const float* products, const float* bias, const float* present,
                         Vec gate_logit, float* weight, float* shifted) {
  const int64_t views = shape.views, lanes = shape.lanes;
  const Vec nothing = splat(-__builtin_inff()), scale = splat(shape.scale), one = splat(1.0f);
  Lane lane;
  lane.open = zero();
  lane.top = nothing;
  for (int64_t w = 0; w < views; ++w) {
    if (w == u) {
      continue;
    }
    Vec x = fma(load(products + w * lanes), scale, load(bias + w * lanes));
    if (present != nullptr) {
      x = load(present + w * lanes) > zero() ? x : nothing;
    }
    lane.open = x != nothing ? one : lane.open;  // a bias of -inf is as good as a missing view
    store(weight + w * lanes, x);
    lane.top = max(x, lane.top);  // a NaN does not become the maximum
  }
  if (present != nullptr) {
    lane.open = lane.open * load(present + u * lanes);
  }
  lane.top = lane.open > zero() ? lane.top : zero();
  lane.sum = zero();
  Vec weighted = zero();
  for (int64_t w = 0; w < views; ++w) {
    if (w == u) {
      continue;
    }
    const Vec x = load(weight + w * lanes) - lane.top;
    const Vec e = exp(x);
    const Vec bounded = max(splat(kNegligible), x);
    store(weight + w * lanes, e);
    if constexpr (kShifted) {
      store(shifted + w * lanes, bounded);
    }
    lane.sum = lane.sum + e;
    weighted = fma(e, bounded, weighted);
  }
  lane.mean = lane.open > zero() ? weighted / lane.sum : zero();
  const Vec size = min(splat(-kNegligible), absolute(gate_logit));
  const Vec e = exp(zero() - absolute(gate_logit));
  const Vec larger_part = one / (one + e), smaller_part = e * larger_part;
  lane.gate = gate_logit >= zero() ? larger_part : smaller_part;
  lane.rest = gate_logit >= zero() ? smaller_part : larger_part;
  // g log(1/g) + (1-g) log(1/(1-g)): both logarithms are log1p(e), plus |x| in the smaller part.
  lane.gate_entropy = fma(size, smaller_part, log1p(e));
  lane.logit = gate_logit >= zero() ? size : zero() - size;
  return lane;
}

template <class T>
void forward_tile(const CrossViewForward& a, const Shape& shape, int64_t begin, int64_t count, const float* bias,
                  const T* zeros, float* weights, float* gate, float* entropy, float* present, bool past_cache) {
  const CrossViewInput& in = a.in;
  const int64_t views = shape.views, heads = shape.heads, width = shape.width, lanes = shape.lanes;
  const T *q[kMaxViews], *k[kMaxViews], *v[kMaxViews];
  for (int64_t i = begin; i < begin + count; ++i) {
    const bool* const here = in.mask == nullptr ? nullptr : in.mask + i * views;
    for (int64_t h = 0; h < heads; ++h) {
      prefetch_rows<T>(in.q, views, i, h, width);
      prefetch_rows<T>(in.k, views, i, h, width);
      prefetch_rows<T>(in.v, views, i, h, width);
      if (views > 1) {
        row_pointers(in.q, views, i, h, here, zeros, q);
        row_pointers(in.k, views, i, h, here, zeros, k);
        all_dots(q, k, views, width, weights + (i - begin) * heads + h, lanes);
      }
    }
  }

  UMDA_DISPATCH_DTYPE(in.gate_type, load_gate<scalar_t>(in, shape, begin, count, gate));
  if (in.mask != nullptr) {
    spread_mask(in, shape, begin, count, present);
  }
  for (int64_t lane = 0; lane < count * heads; lane += kWidth) {
    const float* const there = in.mask == nullptr ? nullptr : present + lane;
    for (int64_t u = 0; u < views; ++u) {
      float* const row = weights + u * views * lanes + lane;
      const Lane s = softmax<false>(shape, u, row, bias + u * views * lanes + lane, there, load(gate + u * lanes + lane),
                                    row, nullptr);
      const auto is_open = s.open > zero();
      const Vec inverse = s.rest / s.sum;
      for (int64_t w = 0; w < views; ++w) {
        if (w == u) {
          continue;
        }
        auto counts = is_open;
        if (there != nullptr) {
          counts = counts & (load(there + w * lanes) > zero());
        }
        store(row + w * lanes, counts ? load(row + w * lanes) * inverse : zero());
      }
      const Vec alone = there == nullptr ? splat(1.0f) : load(there + u * lanes);
      store(row + u * lanes, is_open ? s.gate : alone);
      const Vec spread = max(zero(), fma(s.rest, log(s.sum) - s.mean, s.gate_entropy));
      store(entropy + u * lanes + lane, is_open ? spread : zero());
    }
  }

  T* const out = static_cast<T*>(a.out);
  for (int64_t i = begin; i < begin + count; ++i) {
    const bool* const here = in.mask == nullptr ? nullptr : in.mask + i * views;
    const float* const of_instance = weights + (i - begin) * heads;
    for (int64_t h = 0; h < heads; ++h) {
      row_pointers(in.v, views, i, h, here, zeros, v);
      mix(of_instance + h, views * lanes, lanes, v, views, width, out + (i * views * heads + h) * width, heads * width,
          here, past_cache);
    }
    for (int64_t slot = 0; slot < views * views; ++slot) {
      Vec total = zero();
      for (int64_t h = 0; h < heads; h += kWidth) {
        total = total + load(of_instance + slot * lanes + h, static_cast<int>(smaller<int64_t>(kWidth, heads - h)));
      }
      a.mass[i * views * views + slot] = sum(total) / static_cast<float>(heads);
    }
  }
  store_per_head(entropy, shape, begin, count, a.entropy);
}

// Whether whole rows of contiguous results can be written past the caches.
template <class T>
bool can_stream(const void* to, int64_t width) {
  return sizeof(T) == sizeof(float) && width % kWidth == 0 &&
         reinterpret_cast<uintptr_t>(to) % (kWidth * sizeof(float)) == 0;
}

template <class T>
void forward(const CrossViewForward& a) {
  const CrossViewInput& in = a.in;
  const Shape shape(in);
  const int64_t slots = shape.views * shape.views;
  const Scratch<float> bias(slots * shape.lanes);
  const Scratch<T> zeros(shape.width);
  spread_bias(in, shape, bias.data());
  __builtin_memset(static_cast<void*>(zeros.data()), 0, static_cast<size_t>(shape.width) * sizeof(T));
  const bool past_cache = can_stream<T>(a.out, shape.width);
  parallel_items(shape.partitions, [&](int64_t p) {
    const int64_t per_view = shape.views * shape.lanes, total = slots * shape.lanes + 3 * per_view;
    const Scratch<float> work(total);
    __builtin_memset(work.data(), 0, static_cast<size_t>(total) * sizeof(float));
    float* const gate = &work[slots * shape.lanes];
    const int64_t end = smaller(in.instances, (p + 1) * shape.partition);
    for (int64_t begin = p * shape.partition; begin < end; begin += shape.tile) {
      forward_tile<T>(a, shape, begin, smaller(shape.tile, end - begin), bias.data(), zeros.data(), work.data(), gate,
                      gate + per_view, gate + 2 * per_view, past_cache);
    }
    stream_fence();
  });
}

// ---- backward --------------------------------------------------------------------------------------------
//
//   c[u,w] = d_out[u].v[w] + d_mass[u,w] / H,   C[u] = sum_{w != u} a[u,w] c[u,w]
//   ds[u,w] = (1-g) a[u,w] (c[u,w] - C + d_entropy (-log a[u,w] - H(a)))
//   d_gate[u] = g (1-g) (c[u,u] - C - d_entropy (gate + H(a)))
//   dq[u] = sum_w ds[u,w] k[w] / sqrt(Dh),  dk[w] = sum_u ds[u,w] q[u] / sqrt(Dh),  dv[w] = sum_u p[u,w] d_out[u]
//
// With the logits x relative to their maximum, -log a - H(a) is the mean of x under a, less x.

// Arrays of a tile, [slot][lanes] each.
struct BackwardWork {
  float *scores;     // [views * views]: products, then ds / sqrt(Dh)
  float *weights;    // [views * views]: d_out.v and d_mass, then p
  float *shifted;    // [views]: logits of one query view, relative to the maximum
  float *numerator;  // [views]: their exponentials
  float *gate;       // [views]: gate logits, then their gradient
  float *d_entropy;  // [views]
  float *present;    // [views]
  float *d_bias;     // [views * views], summed over the tiles of a partition
};

// Columns of a query view, one vector of lanes.
void backward_lanes(const CrossViewBackward& a, const Shape& shape, const BackwardWork& work, const float* bias,
                    int64_t lane, int64_t u) {
  const int64_t views = shape.views, lanes = shape.lanes;
  const float* const there = a.in.mask == nullptr ? nullptr : work.present + lane;
  float* const score = work.scores + u * views * lanes + lane;
  float* const weight = work.weights + u * views * lanes + lane;
  float* const d_bias = work.d_bias + u * views * lanes + lane;
  float* const gate = work.gate + u * lanes + lane;
  float* const numerator = work.numerator + lane;
  float* const shifted = work.shifted + lane;
  const Lane s = softmax<true>(shape, u, score, bias + u * views * lanes + lane, there, load(gate), numerator, shifted);
  const auto is_open = s.open > zero();
  const Vec inverse = is_open ? splat(1.0f) / s.sum : zero();
  Vec mean_change = zero();  // C
  for (int64_t w = 0; w < views; ++w) {
    if (w == u) {
      continue;
    }
    Vec change = load(weight + w * lanes);
    if (there != nullptr) {
      change = load(there + w * lanes) > zero() ? change : zero();
    }
    mean_change = fma(load(numerator + w * lanes) * inverse, change, mean_change);
  }
  const Vec d_entropy = load(work.d_entropy + u * lanes + lane);
  const Vec own_change = load(weight + u * lanes);
  for (int64_t w = 0; w < views; ++w) {
    if (w == u) {
      continue;
    }
    Vec change = load(weight + w * lanes);
    auto counts = is_open;
    if (there != nullptr) {
      counts = counts & (load(there + w * lanes) > zero());
    }
    const Vec p = load(numerator + w * lanes) * inverse * s.rest;
    const Vec entropy_change = d_entropy * (s.mean - load(shifted + w * lanes));
    const Vec gradient = counts ? p * (change - mean_change + entropy_change) : zero();
    store(weight + w * lanes, counts ? p : zero());
    store(score + w * lanes, gradient * splat(shape.scale));
    store(d_bias + w * lanes, load(d_bias + w * lanes) + gradient);
  }
  const Vec alone = there == nullptr ? splat(1.0f) : load(there + u * lanes);
  store(weight + u * lanes, is_open ? s.gate : alone);
  store(score + u * lanes, zero());
  const Vec spread = log(s.sum) - s.mean;  // H(a)
  const Vec gate_change = own_change - mean_change - d_entropy * (s.logit + spread);
  store(gate, is_open ? s.gate * s.rest * gate_change : zero());
}

template <class T>
void backward_tile(const CrossViewBackward& a, const Shape& shape, int64_t begin, int64_t count,
                   const BackwardWork& work, const float* bias, const T* zeros, bool past_cache) {
  const CrossViewInput& in = a.in;
  const int64_t views = shape.views, heads = shape.heads, width = shape.width, lanes = shape.lanes;
  const T *q[kMaxViews], *k[kMaxViews], *v[kMaxViews], *d_out[kMaxViews];
  if (count < shape.tile) {  // lanes of no instance: their gradients have to be 0, for d_bias adds up all lanes
    __builtin_memset(work.scores, 0, static_cast<size_t>(views * views * lanes) * sizeof(float));
    __builtin_memset(work.weights, 0, static_cast<size_t>(views * views * lanes) * sizeof(float));
    __builtin_memset(work.gate, 0, static_cast<size_t>(views * lanes) * sizeof(float));
    __builtin_memset(work.d_entropy, 0, static_cast<size_t>(views * lanes) * sizeof(float));
  }
  for (int64_t i = begin; i < begin + count; ++i) {
    const bool* const here = in.mask == nullptr ? nullptr : in.mask + i * views;
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t lane = (i - begin) * heads + h;
      if (views > 1) {
        prefetch_rows<T>(in.q, views, i, h, width);
        prefetch_rows<T>(in.k, views, i, h, width);
        row_pointers(in.q, views, i, h, here, zeros, q);
        row_pointers(in.k, views, i, h, here, zeros, k);
        all_dots(q, k, views, width, work.scores + lane, lanes);
      }
      if (a.d_out.data != nullptr) {
        prefetch_rows<T>(in.v, views, i, h, width);
        prefetch_rows<T>(a.d_out, views, i, h, width);
        row_pointers(in.v, views, i, h, here, zeros, v);
        row_pointers(a.d_out, views, i, h, here, zeros, d_out);
        all_dots(d_out, v, views, width, work.weights + lane, lanes);
      } else {
        for (int64_t slot = 0; slot < views * views; ++slot) {
          work.weights[slot * lanes + lane] = 0.0f;
        }
      }
    }
    if (a.d_mass != nullptr) {
      for (int64_t slot = 0; slot < views * views; ++slot) {
        const float share = a.d_mass[i * views * views + slot] / static_cast<float>(heads);
        float* const to = work.weights + slot * lanes + (i - begin) * heads;
        for (int64_t h = 0; h < heads; ++h) {
          to[h] += share;
        }
      }
    }
  }

  UMDA_DISPATCH_DTYPE(in.gate_type, load_gate<scalar_t>(in, shape, begin, count, work.gate));
  if (a.d_entropy != nullptr) {
    load_per_head(a.d_entropy, shape, begin, count, work.d_entropy);
  }
  if (in.mask != nullptr) {
    spread_mask(in, shape, begin, count, work.present);
  }
  for (int64_t lane = 0; lane < count * heads; lane += kWidth) {
    for (int64_t u = 0; u < views; ++u) {
      backward_lanes(a, shape, work, bias, lane, u);
    }
  }

  const int64_t to_stride = heads * width;
  for (int64_t i = begin; i < begin + count; ++i) {
    const bool* const here = in.mask == nullptr ? nullptr : in.mask + i * views;
    for (int64_t h = 0; h < heads; ++h) {
      const float* const score = work.scores + (i - begin) * heads + h;
      const float* const weight = work.weights + (i - begin) * heads + h;
      const int64_t to = (i * views * heads + h) * width;
      row_pointers(in.k, views, i, h, here, zeros, k);
      mix(score, views * lanes, lanes, k, views, width, static_cast<T*>(a.dq) + to, to_stride, here, past_cache);
      row_pointers(in.q, views, i, h, here, zeros, q);
      mix(score, lanes, views * lanes, q, views, width, static_cast<T*>(a.dk) + to, to_stride, here, past_cache);
      if (a.d_out.data != nullptr) {
        row_pointers(a.d_out, views, i, h, here, zeros, d_out);
        mix(weight, lanes, views * lanes, d_out, views, width, static_cast<T*>(a.dv) + to, to_stride, here, past_cache);
      } else {
        for (int64_t u = 0; u < views; ++u) {
          __builtin_memset(static_cast<void*>(static_cast<T*>(a.dv) + to + u * to_stride), 0,
                           static_cast<size_t>(width) * sizeof(T));
        }
      }
    }
  }
  UMDA_DISPATCH_DTYPE(in.gate_type,
                      store_per_head(work.gate, shape, begin, count, static_cast<scalar_t*>(a.d_gate)));
}

template <class T>
void backward(const CrossViewBackward& a) {
  const CrossViewInput& in = a.in;
  const Shape shape(in);
  const int64_t slots = shape.views * shape.views, lanes = shape.lanes;
  const Scratch<float> bias(slots * lanes);
  const Scratch<T> zeros(shape.width);
  const Scratch<double> parts(shape.partitions * shape.heads * slots);
  spread_bias(in, shape, bias.data());
  __builtin_memset(static_cast<void*>(zeros.data()), 0, static_cast<size_t>(shape.width) * sizeof(T));
  const bool past_cache =
      can_stream<T>(a.dq, shape.width) && can_stream<T>(a.dk, shape.width) && can_stream<T>(a.dv, shape.width);
  parallel_items(shape.partitions, [&](int64_t p) {
    const int64_t all = slots * lanes, per_view = shape.views * lanes, total = 3 * all + 5 * per_view;
    const Scratch<float> memory(total);
    __builtin_memset(memory.data(), 0, static_cast<size_t>(total) * sizeof(float));
    float* const views = &memory[3 * all];
    const BackwardWork work{memory.data(),        &memory[all],         views,
                            views + per_view,     views + 2 * per_view, views + 3 * per_view,
                            views + 4 * per_view, &memory[2 * all]};
    const int64_t end = smaller(in.instances, (p + 1) * shape.partition);
    for (int64_t begin = p * shape.partition; begin < end; begin += shape.tile) {
      backward_tile<T>(a, shape, begin, smaller(shape.tile, end - begin), work, bias.data(), zeros.data(), past_cache);
    }
    for (int64_t h = 0; h < shape.heads; ++h) {
      for (int64_t slot = 0; slot < slots; ++slot) {
        double sum = 0.0;
        for (int64_t lane = h; lane < shape.tile * shape.heads; lane += shape.heads) {
          sum += static_cast<double>(work.d_bias[slot * lanes + lane]);
        }
        parts[(p * shape.heads + h) * slots + slot] = sum;
      }
    }
    stream_fence();
  });
  for (int64_t i = 0; i < shape.heads * slots; ++i) {
    double sum = 0.0;
    for (int64_t p = 0; p < shape.partitions; ++p) {
      sum += parts[p * shape.heads * slots + i];
    }
    a.d_bias[i] = static_cast<float>(sum);
  }
}

}  // namespace

void cross_view_forward(const CrossViewForward& a) { UMDA_DISPATCH_DTYPE(a.in.type, forward<scalar_t>(a)); }

void cross_view_backward(const CrossViewBackward& a) { UMDA_DISPATCH_DTYPE(a.in.type, backward<scalar_t>(a)); }

}  // namespace umda::UMDA_ISA
