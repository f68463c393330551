// Message passing over a neighbour graph: sums, attention, cosines and the smoothness energy.
//
// Traffic: each pass gathers one row of D elements per edge, from cache or memory; nothing of size edges x D is stored.
//
//                        rows gathered per edge, forward   backward
//   neighbor_sum         1 (x)                             1 (d_out, by target: it gives dx and d_weight at once)
//   edge_cosine          1 (r)                             2 (r, over edges out and in)
//   smoothness_energy    1 (z)                             2 (z, over edges out and in)
//   neighbor_attention   2 (k, v)                          3 (q and d_out by target, k by row)
//
// A gradient that flows against an edge is gathered through the transpose (t_ptr, t_edge) instead of being scattered: each
// output is summed by one thread in one order, whatever the number of threads. Random rows are limited by
// latency, not bandwidth, so every loop prefetches the row it will need about kAheadBytes of rows later; cutting the
// width into column blocks that fit a cache was measured and lost.
//
// Work is cut by edges, not rows: a chunk holds about kChunkEdges of them.
#include "neighbors.h"

#include "parallel.h"
#include "scratch.h"
#include "simd.h"

namespace umda::UMDA_ISA {
namespace {

constexpr int64_t kChunkEdges = 2048;
constexpr int64_t kAheadBytes = 8192;
constexpr int kMaxVecs = kWidth == 16 ? 16 : 8;  // accumulators held in registers
constexpr float kNormEpsilon = 1e-8f;            // as torch.nn.functional.cosine_similarity

// The rows [bounds[c], bounds[c+1]) of a chunk c, by the number of edges.
class Chunks {
 public:
  // ptr: edges before each row; null: `degree` per row.
  Chunks(int64_t rows, const int64_t* ptr, int64_t degree)
      : bounds_((ptr == nullptr ? rows * degree : rows == 0 ? 0 : ptr[rows]) / kChunkEdges * 2 + rows / kChunkEdges * 2 + 3) {
    const auto cost = [&](int64_t row) { return (ptr == nullptr ? row * degree : ptr[row]) + row; };
    int64_t opened = -kChunkEdges;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t here = cost(row);
      if (here - opened >= kChunkEdges) {
        bounds_[count++] = row;
        opened = here;
      }
    }
    bounds_[count] = rows;
  }

  // f(row) for all rows, from several threads. When the chunks are shared out says nothing about the result.
  template <class F>
  void for_rows(const F& f) const {
    parallel_items(count, [&](int64_t chunk) {
      for (int64_t row = bounds_[chunk]; row < bounds_[chunk + 1]; ++row) {
        f(row);
      }
    });
  }

  int64_t begin(int64_t chunk) const { return bounds_[chunk]; }
  int64_t end(int64_t chunk) const { return bounds_[chunk + 1]; }

  int64_t count = 0;

 private:
  Scratch<int64_t> bounds_;
};

UMDA_INLINE int64_t row_begin(const NeighborTable& g, int64_t row) {
  return g.indptr == nullptr ? row * g.degree : g.indptr[row];
}

// Whether an entry of `neighbors` is an edge: in one comparison, not negative and below the number of nodes.
UMDA_INLINE bool present(const NeighborTable& g, int32_t j) {
  return static_cast<uint64_t>(static_cast<uint32_t>(j)) < static_cast<uint64_t>(g.nodes);
}

template <class X>
UMDA_INLINE const X* row_of(Rows rows, int64_t i) {
  return static_cast<const X*>(rows.data) + i * rows.stride;
}

template <class X>
UMDA_INLINE const X* row_of(Heads heads, int64_t i, int64_t h) {
  return static_cast<const X*>(heads.data) + i * heads.stride + h * heads.head_stride;
}

template <class X>
UMDA_INLINE void prefetch_row(const X* p, int64_t width) {
  for (int64_t d = 0; d < width; d += 64 / static_cast<int64_t>(sizeof(X))) {
    prefetch(p + d);
  }
}

// How many edges ahead to prefetch rows of this many bytes.
UMDA_INLINE int64_t edges_ahead(int64_t row_bytes) {
  const int64_t edges = kAheadBytes / (row_bytes < 1 ? 1 : row_bytes);
  return edges < 2 ? 2 : edges > 32 ? 32 : edges;
}

// Loads and stores of a block of kVecs full vectors, or of the last `count` lanes of a row.
template <int kVecs, bool kTail>
struct Block {
  static constexpr int vecs = kVecs;
  int count;
  template <class X>
  UMDA_INLINE Vec read(const X* p) const {
    if constexpr (kTail) {
      return load(p, count);
    } else {
      return load(p);
    }
  }
  template <class X>
  UMDA_INLINE void write(X* p, Vec v) const {
    if constexpr (kTail) {
      store(p, v, count);
    } else {
      store(p, v);
    }
  }
};

// f(block, d) for blocks that cover [0, width), the widest first: kMax vectors, then 4, 1 and the tail.
template <int kMax, class F>
UMDA_INLINE void for_blocks(int64_t width, F&& f) {
  int64_t d = 0;
  for (; d + kMax * kWidth <= width; d += kMax * kWidth) {
    f(Block<kMax, false>{kWidth}, d);
  }
  if constexpr (kMax > 4) {
    for (; d + 4 * kWidth <= width; d += 4 * kWidth) {
      f(Block<4, false>{kWidth}, d);
    }
  }
  for (; d + kWidth <= width; d += kWidth) {
    f(Block<1, false>{kWidth}, d);
  }
  if (d < width) {
    f(Block<1, true>{static_cast<int>(width - d)}, d);
  }
}

// a.b, in four chains.
template <class X, class Y>
UMDA_INLINE float dot(const X* a, const Y* b, int64_t width) {
  Vec sums[4] = {zero(), zero(), zero(), zero()};
  for_blocks<4>(width, [&](auto block, int64_t d) UMDA_LAMBDA_INLINE {
    for (int v = 0; v < block.vecs; ++v) {
      sums[v] = fma(block.read(a + d + v * kWidth), block.read(b + d + v * kWidth), sums[v]);
    }
  });
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// The transpose as the backward kernels walk it: position p in t_edge -> the row its edge starts from.
struct Sources {
  explicit Sources(const NeighborTable& g) : row(g.t_ptr[g.nodes]), count(g.t_ptr[g.nodes]) {
    const Scratch<int32_t> edge_row(g.indptr == nullptr ? 0 : g.edges);
    if (g.indptr != nullptr) {
      parallel_ranges(g.nodes, 1024, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          for (int64_t e = g.indptr[i]; e < g.indptr[i + 1]; ++e) {
            edge_row[e] = static_cast<int32_t>(i);
          }
        }
      });
    }
    int64_t bad = 0;
    parallel_ranges(count, 8192, [&](int64_t begin, int64_t end) {
      int64_t wrong = 0;
      for (int64_t p = begin; p < end; ++p) {
        const int64_t e = g.t_edge[p];
        const bool ok = e >= 0 && e < g.edges;
        wrong += ok ? 0 : 1;
        row[p] = !ok ? 0 : g.indptr == nullptr ? static_cast<int32_t>(e / g.degree) : edge_row[e];
      }
      if (wrong > 0) {
        __atomic_store_n(&bad, 1, __ATOMIC_RELAXED);
      }
    });
    valid = bad == 0;
  }

  Scratch<int32_t> row;
  int64_t count;
  bool valid;
};

// ---- transpose -------------------------------------------------------------------------------------------
//
// A stable counting sort: edges are cut into `parts` ranges; each counts its edges per target, a prefix sum over (target,
// range) gives each range its own place for every target. The result is the only stable order: the number of
// ranges does not show.

struct Range {
  int64_t begin, end;
};

UMDA_INLINE Range part_range(int64_t edges, int64_t parts, int64_t part) {
  const int64_t size = (edges + parts - 1) / parts;
  return {smaller(part * size, edges), smaller((part + 1) * size, edges)};
}

}  // namespace

void graph_transpose(const int32_t* neighbors, int64_t edges, int64_t nodes, int64_t* t_ptr, int64_t* t_edge) {
  const NeighborTable g{nodes, 0, edges, neighbors, nullptr, nullptr, nullptr};
  // Counters cost nodes per part: not more of them than there are edges to sort.
  const int64_t most = nodes == 0 ? 1 : edges / nodes;
  const int64_t parts = larger<int64_t>(1, smaller(num_threads(), most));
  const Scratch<int64_t> cursors(parts * nodes);
  parallel_items(parts, [&](int64_t part) {
    int64_t* const count = &cursors[part * nodes];
    __builtin_memset(count, 0, static_cast<size_t>(nodes) * sizeof(int64_t));
    const Range range = part_range(edges, parts, part);
    for (int64_t e = range.begin; e < range.end; ++e) {
      if (present(g, neighbors[e])) {
        ++count[neighbors[e]];
      }
    }
  });
  int64_t total = 0;
  for (int64_t j = 0; j < nodes; ++j) {
    t_ptr[j] = total;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t count = cursors[part * nodes + j];
      cursors[part * nodes + j] = total;
      total += count;
    }
  }
  t_ptr[nodes] = total;
  parallel_items(parts, [&](int64_t part) {
    int64_t* const next = &cursors[part * nodes];
    const Range range = part_range(edges, parts, part);
    for (int64_t e = range.begin; e < range.end; ++e) {
      if (present(g, neighbors[e])) {
        t_edge[next[neighbors[e]]++] = e;
      }
    }
  });
  __builtin_memset(t_edge + total, -1, static_cast<size_t>(edges - total) * sizeof(int64_t));
}

namespace {

// ---- neighbor_sum ----------------------------------------------------------------------------------------

template <class X>
void sum_forward(const NeighborSumForward& a) {
  const NeighborTable& g = a.graph;
  const int64_t ahead = edges_ahead(a.width * static_cast<int64_t>(sizeof(X)));
  Chunks(g.nodes, g.indptr, g.degree).for_rows([&](int64_t i) {
    const int64_t begin = row_begin(g, i), end = row_begin(g, i + 1);
    X* const out = static_cast<X*>(a.out) + i * a.width;
    for_blocks<kMaxVecs>(a.width, [&](auto block, int64_t d) UMDA_LAMBDA_INLINE {
      Vec sums[block.vecs];
      for (int v = 0; v < block.vecs; ++v) {
        sums[v] = zero();
      }
      for (int64_t e = begin; e < end; ++e) {
        if (d == 0 && e + ahead < g.edges && present(g, g.neighbors[e + ahead])) {
          prefetch_row(row_of<X>(a.x, g.neighbors[e + ahead]), a.width);
        }
        const int32_t j = g.neighbors[e];
        if (!present(g, j)) {
          continue;
        }
        const X* const from = row_of<X>(a.x, j) + d;
        const Vec weight = splat(a.weight[e]);
        for (int v = 0; v < block.vecs; ++v) {
          sums[v] = fma(weight, block.read(from + v * kWidth), sums[v]);
        }
      }
      for (int v = 0; v < block.vecs; ++v) {
        block.write(out + d + v * kWidth, sums[v]);
      }
    });
  });
}

// dx[j] = sum over edges i -> j of w d_out[i];  d_w = d_out[i].x[j].
template <class X>
bool sum_backward(const NeighborSumBackward& a) {
  const NeighborTable& g = a.graph;
  const Sources sources(g);
  if (!sources.valid) {
    return false;
  }
  const int64_t ahead = edges_ahead(a.width * static_cast<int64_t>(sizeof(X)));
  // Absent edges, and all of them at width 0.
  parallel_ranges(g.edges, 65536, [&](int64_t begin, int64_t end) {
    __builtin_memset(a.d_weight + begin, 0, static_cast<size_t>(end - begin) * sizeof(float));
  });
  Chunks(g.nodes, g.t_ptr, 0).for_rows([&](int64_t j) {
    const X* const x = row_of<X>(a.x, j);
    X* const dx = static_cast<X*>(a.dx) + j * a.width;
    for_blocks<kMaxVecs>(a.width, [&](auto block, int64_t d) UMDA_LAMBDA_INLINE {
      Vec sums[block.vecs];
      for (int v = 0; v < block.vecs; ++v) {
        sums[v] = zero();
      }
      for (int64_t p = g.t_ptr[j]; p < g.t_ptr[j + 1]; ++p) {
        if (d == 0 && p + ahead < sources.count) {
          prefetch_row(row_of<X>(a.d_out, sources.row[p + ahead]), a.width);
          prefetch(a.weight + g.t_edge[p + ahead]);
          prefetch(a.d_weight + g.t_edge[p + ahead]);
        }
        const int64_t e = g.t_edge[p];
        const X* const from = row_of<X>(a.d_out, sources.row[p]) + d;
        const Vec weight = splat(a.weight[e]);
        Vec dots[4] = {zero(), zero(), zero(), zero()};
        for (int v = 0; v < block.vecs; ++v) {
          const Vec row = block.read(from + v * kWidth);
          sums[v] = fma(weight, row, sums[v]);
          dots[v % 4] = fma(row, block.read(x + d + v * kWidth), dots[v % 4]);
        }
        a.d_weight[e] += sum((dots[0] + dots[1]) + (dots[2] + dots[3]));
      }
      for (int v = 0; v < block.vecs; ++v) {
        block.write(dx + d + v * kWidth, sums[v]);
      }
    });
  });
  return true;
}

// ---- edge_cosine -----------------------------------------------------------------------------------------

// 1 / max(|r[i]|, epsilon) of every row.
template <class X>
void inverse_norms(const NeighborTable& g, Rows r, int64_t width, float* inverse) {
  parallel_ranges(g.nodes, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const X* const row = row_of<X>(r, i);
      const float norm = __builtin_sqrtf(dot(row, row, width));
      inverse[i] = 1.0f / (norm < kNormEpsilon ? kNormEpsilon : norm);
    }
  });
}

template <class X>
void cosine_forward(const EdgeCosineForward& a) {
  const NeighborTable& g = a.graph;
  const Scratch<float> inverse(g.nodes);
  inverse_norms<X>(g, a.r, a.width, inverse.data());
  const int64_t ahead = edges_ahead(a.width * static_cast<int64_t>(sizeof(X)));
  Chunks(g.nodes, g.indptr, g.degree).for_rows([&](int64_t i) {
    const X* const own = row_of<X>(a.r, i);
    for (int64_t e = row_begin(g, i); e < row_begin(g, i + 1); ++e) {
      if (e + ahead < g.edges && present(g, g.neighbors[e + ahead])) {
        prefetch_row(row_of<X>(a.r, g.neighbors[e + ahead]), a.width);
      }
      const int32_t j = g.neighbors[e];
      a.cosine[e] =
          present(g, j) ? dot(own, row_of<X>(a.r, j), a.width) * inverse[i] * inverse[j] : 0.0f;
    }
  });
}

// With u = r / |r| and s = sum over the edges at i, out and in, of d_cos u_other:
//   dr[i] = (s - (s.u[i]) u[i]) / |r[i]|, and s / epsilon where the norm was clamped (the clamp has no slope).
template <class X>
bool cosine_backward(const EdgeCosineBackward& a) {
  const NeighborTable& g = a.graph;
  const Sources sources(g);
  if (!sources.valid) {
    return false;
  }
  const Scratch<float> inverse(g.nodes);
  inverse_norms<X>(g, a.r, a.width, inverse.data());
  const int64_t ahead = edges_ahead(a.width * static_cast<int64_t>(sizeof(X)));
  const Chunks chunks(g.nodes, g.t_ptr, 0);
  parallel_items(chunks.count, [&](int64_t chunk) {
    const Scratch<float> total(a.width);
    for (int64_t i = chunks.begin(chunk); i < chunks.end(chunk); ++i) {
      const X* const own = row_of<X>(a.r, i);
      for_blocks<kMaxVecs>(a.width, [&](auto block, int64_t d) UMDA_LAMBDA_INLINE {
        Vec sums[block.vecs];
        for (int v = 0; v < block.vecs; ++v) {
          sums[v] = zero();
        }
        const auto add = [&](int64_t other, float scale) UMDA_LAMBDA_INLINE {
          const X* const from = row_of<X>(a.r, other) + d;
          for (int v = 0; v < block.vecs; ++v) {
            sums[v] = fma(splat(scale), block.read(from + v * kWidth), sums[v]);
          }
        };
        for (int64_t e = row_begin(g, i); e < row_begin(g, i + 1); ++e) {
          if (d == 0 && e + ahead < g.edges && present(g, g.neighbors[e + ahead])) {
            prefetch_row(row_of<X>(a.r, g.neighbors[e + ahead]), a.width);
          }
          const int32_t j = g.neighbors[e];
          if (present(g, j)) {
            add(j, a.d_cosine[e] * inverse[j]);
          }
        }
        for (int64_t p = g.t_ptr[i]; p < g.t_ptr[i + 1]; ++p) {
          if (d == 0 && p + ahead < sources.count) {
            prefetch_row(row_of<X>(a.r, sources.row[p + ahead]), a.width);
            prefetch(a.d_cosine + g.t_edge[p + ahead]);
          }
          const int32_t source = sources.row[p];
          add(source, a.d_cosine[g.t_edge[p]] * inverse[source]);
        }
        for (int v = 0; v < block.vecs; ++v) {
          block.write(&total[d + v * kWidth], sums[v]);
        }
      });
      const bool clamped = inverse[i] >= 1.0f / kNormEpsilon;
      const float along = clamped ? 0.0f : dot(total.data(), own, a.width) * inverse[i] * inverse[i];
      X* const dr = static_cast<X*>(a.dr) + i * a.width;
      for_blocks<1>(a.width, [&](auto block, int64_t d) UMDA_LAMBDA_INLINE {
        const Vec across = fma(splat(-along), block.read(own + d), block.read(&total[d]));
        block.write(dr + d, across * splat(inverse[i]));
      });
    }
  });
  return true;
}

// ---- smoothness_energy -----------------------------------------------------------------------------------
//
// E = S / (D W), S = sum w |z_i - z_j|^2, W = sum w.
//   d_w = dE (|z_i - z_j|^2 / (D W) - E / W);   dz[i] = 2 dE / (D W) sum over edges at i, out and in, of w (z[i] - z_other)

template <class X>
void smooth_forward(const SmoothnessForward& a) {
  const NeighborTable& g = a.graph;
  const int64_t ahead = edges_ahead(a.width * static_cast<int64_t>(sizeof(X)));
  const Chunks chunks(g.nodes, g.indptr, g.degree);
  const Scratch<double> energies(chunks.count), weights(chunks.count);
  parallel_items(chunks.count, [&](int64_t chunk) {
    double energy = 0.0, weight_sum = 0.0;
    for (int64_t i = chunks.begin(chunk); i < chunks.end(chunk); ++i) {
      const X* const own = row_of<X>(a.z, i);
      Vec sums[4] = {zero(), zero(), zero(), zero()};
      for (int64_t e = row_begin(g, i); e < row_begin(g, i + 1); ++e) {
        if (e + ahead < g.edges && present(g, g.neighbors[e + ahead])) {
          prefetch_row(row_of<X>(a.z, g.neighbors[e + ahead]), a.width);
        }
        const int32_t j = g.neighbors[e];
        if (!present(g, j)) {
          continue;
        }
        weight_sum += static_cast<double>(a.weight[e]);
        const Vec weight = splat(a.weight[e]);
        const X* const other = row_of<X>(a.z, j);
        for_blocks<4>(a.width, [&](auto block, int64_t d) UMDA_LAMBDA_INLINE {
          for (int v = 0; v < block.vecs; ++v) {
            const Vec difference = block.read(own + d + v * kWidth) - block.read(other + d + v * kWidth);
            sums[v] = fma(weight * difference, difference, sums[v]);
          }
        });
      }
      energy += static_cast<double>(sum((sums[0] + sums[1]) + (sums[2] + sums[3])));
    }
    energies[chunk] = energy;
    weights[chunk] = weight_sum;
  });
  double energy = 0.0, weight_sum = 0.0;
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    energy += energies[chunk];
    weight_sum += weights[chunk];
  }
  *a.weight_sum = static_cast<float>(weight_sum);
  const bool nothing = *a.weight_sum == 0.0f || a.width == 0;
  *a.energy = nothing ? 0.0f : static_cast<float>(energy / (static_cast<double>(a.width) * weight_sum));
}

template <class X>
bool smooth_backward(const SmoothnessBackward& a) {
  const NeighborTable& g = a.graph;
  const Sources sources(g);
  if (!sources.valid) {
    return false;
  }
  const int64_t ahead = edges_ahead(a.width * static_cast<int64_t>(sizeof(X)));
  // No gradient where the weights sum to 0.
  const float per_weight = a.weight_sum == 0.0f ? 0.0f : a.d_energy / a.weight_sum;
  const float per_square = a.width == 0 ? 0.0f : per_weight / static_cast<float>(a.width);
  parallel_ranges(g.edges, 65536, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) {
      a.d_weight[e] = present(g, g.neighbors[e]) ? -per_weight * a.energy : 0.0f;
    }
  });
  Chunks(g.nodes, g.t_ptr, 0).for_rows([&](int64_t i) {
    const X* const own = row_of<X>(a.z, i);
    X* const dz = static_cast<X*>(a.dz) + i * a.width;
    for_blocks<kMaxVecs>(a.width, [&](auto block, int64_t d) UMDA_LAMBDA_INLINE {
      Vec sums[block.vecs];
      for (int v = 0; v < block.vecs; ++v) {
        sums[v] = zero();
      }
      for (int64_t e = row_begin(g, i); e < row_begin(g, i + 1); ++e) {
        if (d == 0 && e + ahead < g.edges && present(g, g.neighbors[e + ahead])) {
          prefetch_row(row_of<X>(a.z, g.neighbors[e + ahead]), a.width);
        }
        const int32_t j = g.neighbors[e];
        if (!present(g, j)) {
          continue;
        }
        const X* const other = row_of<X>(a.z, j) + d;
        const Vec weight = splat(a.weight[e]);
        Vec squares[4] = {zero(), zero(), zero(), zero()};
        for (int v = 0; v < block.vecs; ++v) {
          const Vec difference = block.read(own + d + v * kWidth) - block.read(other + v * kWidth);
          sums[v] = fma(weight, difference, sums[v]);
          squares[v % 4] = fma(difference, difference, squares[v % 4]);
        }
        a.d_weight[e] += per_square * sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
      }
      for (int64_t p = g.t_ptr[i]; p < g.t_ptr[i + 1]; ++p) {
        if (d == 0 && p + ahead < sources.count) {
          prefetch_row(row_of<X>(a.z, sources.row[p + ahead]), a.width);
          prefetch(a.weight + g.t_edge[p + ahead]);
        }
        const X* const other = row_of<X>(a.z, sources.row[p]) + d;
        const Vec weight = splat(a.weight[g.t_edge[p]]);
        for (int v = 0; v < block.vecs; ++v) {
          const Vec difference = block.read(own + d + v * kWidth) - block.read(other + v * kWidth);
          sums[v] = fma(weight, difference, sums[v]);
        }
      }
      for (int v = 0; v < block.vecs; ++v) {
        block.write(dz + d + v * kWidth, splat(2.0f * per_square) * sums[v]);
      }
    });
  });
  return true;
}

// ---- neighbor_attention ----------------------------------------------------------------------------------

constexpr int kEdgeTile = 64;  // edges whose scores are held at once: all of a usual row

// out += sum over a tile of p[e] v[column[e]], one head. first: out is not read.
template <class X>
UMDA_INLINE void add_values(float* out, const float* p, Heads v, const int32_t* column, int edges, int64_t h,
                            int64_t width, float rescale, bool first) {
  for_blocks<(kMaxVecs > 8 ? 8 : kMaxVecs)>(width, [&](auto block, int64_t d) UMDA_LAMBDA_INLINE {
    Vec sums[block.vecs];
    for (int i = 0; i < block.vecs; ++i) {
      sums[i] = first ? zero() : block.read(out + d + i * kWidth) * splat(rescale);
    }
    for (int e = 0; e < edges; ++e) {
      const X* const from = row_of<X>(v, column[e], h) + d;
      const Vec weight = splat(p[e]);
      for (int i = 0; i < block.vecs; ++i) {
        sums[i] = fma(weight, block.read(from + i * kWidth), sums[i]);
      }
    }
    for (int i = 0; i < block.vecs; ++i) {
      block.write(out + d + i * kWidth, sums[i]);
    }
  });
}

template <class X>
void attention_forward(const NeighborAttentionForward& a) {
  const NeighborTable& g = a.graph;
  const float scale = a.width == 0 ? 0.0f : 1.0f / __builtin_sqrtf(static_cast<float>(a.width));
  const int64_t ahead = edges_ahead(2 * a.heads * a.width * static_cast<int64_t>(sizeof(X)));
  const Chunks chunks(g.nodes, g.indptr, g.degree);
  parallel_items(chunks.count, [&](int64_t chunk) {
    const Scratch<float> scores(a.heads * kEdgeTile);
    const Scratch<float> acc(a.heads * a.width);
    const Scratch<float> peak(a.heads), total(a.heads);
    int32_t column[kEdgeTile];
    float bias[kEdgeTile];
    for (int64_t i = chunks.begin(chunk); i < chunks.end(chunk); ++i) {
      const int64_t end = row_begin(g, i + 1);
      int64_t e = row_begin(g, i);
      bool own = a.self_loop, first = true;
      for (int64_t h = 0; h < a.heads; ++h) {
        peak[h] = -__builtin_inff();
        total[h] = 0.0f;
      }
      while (own || e < end) {
        int edges = 0;
        if (own) {
          column[edges] = static_cast<int32_t>(i);
          bias[edges++] = 0.0f;
          own = false;
        }
        for (; e < end && edges < kEdgeTile; ++e) {
          if (present(g, g.neighbors[e])) {
            column[edges] = g.neighbors[e];
            bias[edges++] = a.log_weight == nullptr ? 0.0f : a.log_weight[e];
          }
          if (e + ahead < g.edges && present(g, g.neighbors[e + ahead])) {
            const int32_t next = g.neighbors[e + ahead];
            for (int64_t h = 0; h < a.heads; ++h) {
              prefetch_row(row_of<X>(a.k, next, h), a.width);
              prefetch_row(row_of<X>(a.v, next, h), a.width);
            }
          }
        }
        for (int64_t h = 0; h < a.heads; ++h) {
          const X* const q = row_of<X>(a.q, i, h);
          float* const s = &scores[h * kEdgeTile];
          float top = peak[h];
          for (int n = 0; n < edges; ++n) {
            s[n] = dot(q, row_of<X>(a.k, column[n], h), a.width) * scale + bias[n];
            top = s[n] > top ? s[n] : top;
          }
          const float shift = top == -__builtin_inff() ? 0.0f : top;
          const float rescale = exp(peak[h] - shift);
          Vec sums = zero();
          for (int n = 0; n < edges; n += kWidth) {
            const int count = edges - n < kWidth ? edges - n : kWidth;
            const Vec p = exp(load(s + n, count) - splat(shift));
            store(s + n, p, count);
            sums = sums + (count < kWidth ? load(s + n, count) : p);
          }
          total[h] = total[h] * rescale + sum(sums);
          peak[h] = top;
          add_values<X>(&acc[h * a.width], s, a.v, column, edges, h, a.width, rescale, first);
        }
        first = false;
      }
      for (int64_t h = 0; h < a.heads; ++h) {
        // 0: nothing to attend to, or only weights of 0.
        const bool nothing = total[h] == 0.0f;
        a.lse[i * a.heads + h] = nothing ? -__builtin_inff() : peak[h] + __builtin_logf(total[h]);
        X* const out = static_cast<X*>(a.out) + (i * a.heads + h) * a.width;
        const Vec factor = splat(1.0f / total[h]);
        for_blocks<1>(a.width, [&](auto block, int64_t d) UMDA_LAMBDA_INLINE {
          block.write(out + d, nothing ? zero() : block.read(&acc[h * a.width + d]) * factor);
        });
      }
    }
  });
}

// With alpha = exp(s - lse), delta[i] = d_out[i].out[i]:
//   ds = alpha (d_out[i].v[j] - delta[i]);  dv[j] += alpha d_out[i];  dk[j] += scale ds q[i];  dq[i] += scale ds k[j]
// First by target: q and d_out are gathered, dk and dv finished, ds kept ([edges, heads]); then by row: k is gathered.
template <class X>
bool attention_backward(const NeighborAttentionBackward& a) {
  const NeighborTable& g = a.graph;
  const Sources sources(g);
  if (!sources.valid) {
    return false;
  }
  constexpr int kTile = 16;  // edges whose rows stay in the level-1 cache between the two uses
  constexpr int kVecs = 4;   // of dk and of dv: with those of k and v, what registers hold
  const int64_t heads = a.heads, width = a.width;
  const float scale = width == 0 ? 0.0f : 1.0f / __builtin_sqrtf(static_cast<float>(width));
  const int64_t ahead = edges_ahead(2 * heads * width * static_cast<int64_t>(sizeof(X)));
  const Scratch<float> ds(g.edges * heads);
  const Scratch<float> own_ds(a.self_loop ? g.nodes * heads : 0);
  const Scratch<float> stats(g.nodes * heads * 2);  // lse, delta

  parallel_ranges(g.nodes, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t h = 0; h < heads; ++h) {
        const float lse = a.lse[i * heads + h];
        // exp(s - inf) = 0: a row with nothing to attend to gives no gradient.
        stats[(i * heads + h) * 2] = lse == -__builtin_inff() ? __builtin_inff() : lse;
        stats[(i * heads + h) * 2 + 1] = dot(row_of<X>(a.d_out, i, h), row_of<X>(a.out, i, h), width);
      }
    }
  });

  const Chunks targets(g.nodes, g.t_ptr, 0);
  parallel_items(targets.count, [&](int64_t chunk) {
    const Scratch<float> dk(width), dv(width);
    int32_t source[kTile];
    int64_t edge[kTile];
    float s[kTile], d_alpha[kTile], lse[kTile], delta[kTile], alpha[kTile], d_score[kTile];
    for (int64_t j = targets.begin(chunk); j < targets.end(chunk); ++j) {
      for (int64_t h = 0; h < heads; ++h) {
        const X* const k = row_of<X>(a.k, j, h);
        const X* const v = row_of<X>(a.v, j, h);
        int64_t p = g.t_ptr[j];
        const int64_t end = g.t_ptr[j + 1];
        bool own = a.self_loop, first = true;
        do {
          int edges = 0;
          if (own) {
            source[0] = static_cast<int32_t>(j);
            edge[0] = -1;
            s[edges++] = 0.0f;
            own = false;
          }
          for (; p < end && edges < kTile; ++p, ++edges) {
            source[edges] = sources.row[p];
            edge[edges] = g.t_edge[p];
            s[edges] = a.log_weight == nullptr ? 0.0f : a.log_weight[edge[edges]];
            if (p + ahead < sources.count) {
              const int32_t next = sources.row[p + ahead];
              prefetch_row(row_of<X>(a.q, next, h), width);
              prefetch_row(row_of<X>(a.d_out, next, h), width);
              if (h == 0) {
                prefetch(&stats[next * heads * 2]);
                prefetch(&ds[g.t_edge[p + ahead] * heads]);
                if (a.log_weight != nullptr) {
                  prefetch(a.log_weight + g.t_edge[p + ahead]);
                }
              }
            }
          }
          for (int n = 0; n < edges; ++n) {
            s[n] = dot(row_of<X>(a.q, source[n], h), k, width) * scale + s[n];
            d_alpha[n] = dot(row_of<X>(a.d_out, source[n], h), v, width);
            lse[n] = stats[(source[n] * heads + h) * 2];
            delta[n] = stats[(source[n] * heads + h) * 2 + 1];
          }
          for (int n = 0; n < edges; n += kWidth) {
            const int count = edges - n < kWidth ? edges - n : kWidth;
            const Vec probability = exp(load(s + n, count) - load(lse + n, count));
            store(alpha + n, probability, count);
            store(d_score + n, probability * (load(d_alpha + n, count) - load(delta + n, count)), count);
          }
          for (int n = 0; n < edges; ++n) {
            (edge[n] < 0 ? own_ds[j * heads + h] : ds[edge[n] * heads + h]) = d_score[n];
            d_score[n] *= scale;
          }
          for_blocks<kVecs>(width, [&](auto block, int64_t d) UMDA_LAMBDA_INLINE {
            Vec k_sums[block.vecs], v_sums[block.vecs];
            for (int i = 0; i < block.vecs; ++i) {
              k_sums[i] = first ? zero() : block.read(&dk[d + i * kWidth]);
              v_sums[i] = first ? zero() : block.read(&dv[d + i * kWidth]);
            }
            for (int n = 0; n < edges; ++n) {
              const X* const q = row_of<X>(a.q, source[n], h) + d;
              const X* const d_out = row_of<X>(a.d_out, source[n], h) + d;
              for (int i = 0; i < block.vecs; ++i) {
                k_sums[i] = fma(splat(d_score[n]), block.read(q + i * kWidth), k_sums[i]);
                v_sums[i] = fma(splat(alpha[n]), block.read(d_out + i * kWidth), v_sums[i]);
              }
            }
            for (int i = 0; i < block.vecs; ++i) {
              block.write(&dk[d + i * kWidth], k_sums[i]);
              block.write(&dv[d + i * kWidth], v_sums[i]);
            }
          });
          first = false;
        } while (p < end);
        X* const dk_out = static_cast<X*>(a.dk) + (j * heads + h) * width;
        X* const dv_out = static_cast<X*>(a.dv) + (j * heads + h) * width;
        for_blocks<1>(width, [&](auto block, int64_t d) UMDA_LAMBDA_INLINE {
          block.write(dk_out + d, block.read(&dk[d]));
          block.write(dv_out + d, block.read(&dv[d]));
        });
      }
    }
  });

  const Chunks rows(g.nodes, g.indptr, g.degree);
  const int64_t k_ahead = edges_ahead(heads * width * static_cast<int64_t>(sizeof(X)));
  rows.for_rows([&](int64_t i) {
    const int64_t begin = row_begin(g, i), end = row_begin(g, i + 1);
    for (int64_t e = begin; e < end; ++e) {
      float total = 0.0f;
      for (int64_t h = 0; h < heads && present(g, g.neighbors[e]); ++h) {
        total += ds[e * heads + h];
      }
      a.d_log_weight[e] = total;
    }
    for (int64_t h = 0; h < heads; ++h) {
      X* const dq = static_cast<X*>(a.dq) + (i * heads + h) * width;
      for_blocks<(kMaxVecs > 8 ? 8 : kMaxVecs)>(width, [&](auto block, int64_t d) UMDA_LAMBDA_INLINE {
        Vec sums[block.vecs];
        const Vec own = splat(a.self_loop ? scale * own_ds[i * heads + h] : 0.0f);
        const X* const k = row_of<X>(a.k, i, h) + d;
        for (int n = 0; n < block.vecs; ++n) {
          sums[n] = a.self_loop ? own * block.read(k + n * kWidth) : zero();
        }
        for (int64_t e = begin; e < end; ++e) {
          if (d == 0 && e + k_ahead < g.edges && present(g, g.neighbors[e + k_ahead])) {
            prefetch_row(row_of<X>(a.k, g.neighbors[e + k_ahead], h), width);
          }
          const int32_t j = g.neighbors[e];
          if (!present(g, j)) {
            continue;
          }
          const Vec weight = splat(scale * ds[e * heads + h]);
          const X* const from = row_of<X>(a.k, j, h) + d;
          for (int n = 0; n < block.vecs; ++n) {
            sums[n] = fma(weight, block.read(from + n * kWidth), sums[n]);
          }
        }
        for (int n = 0; n < block.vecs; ++n) {
          block.write(dq + d + n * kWidth, sums[n]);
        }
      });
    }
  });
  return true;
}

}  // namespace

void neighbor_sum_forward(const NeighborSumForward& a) { UMDA_DISPATCH_DTYPE(a.type, sum_forward<scalar_t>(a)); }

bool neighbor_sum_backward(const NeighborSumBackward& a) {
  UMDA_DISPATCH_DTYPE(a.type, return sum_backward<scalar_t>(a));
  return false;
}

void edge_cosine_forward(const EdgeCosineForward& a) { UMDA_DISPATCH_DTYPE(a.type, cosine_forward<scalar_t>(a)); }

bool edge_cosine_backward(const EdgeCosineBackward& a) {
  UMDA_DISPATCH_DTYPE(a.type, return cosine_backward<scalar_t>(a));
  return false;
}

void smoothness_forward(const SmoothnessForward& a) { UMDA_DISPATCH_DTYPE(a.type, smooth_forward<scalar_t>(a)); }

bool smoothness_backward(const SmoothnessBackward& a) {
  UMDA_DISPATCH_DTYPE(a.type, return smooth_backward<scalar_t>(a));
  return false;
}

void neighbor_attention_forward(const NeighborAttentionForward& a) {
  UMDA_DISPATCH_DTYPE(a.type, attention_forward<scalar_t>(a));
}

bool neighbor_attention_backward(const NeighborAttentionBackward& a) {
  UMDA_DISPATCH_DTYPE(a.type, return attention_backward<scalar_t>(a));
  return false;
}

}  // namespace umda::UMDA_ISA
