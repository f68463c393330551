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
// output is summed by one thread in one order, whatever the number of threads. Random rows are limited by how many
// misses are under way: every loop asks for the row it will need about kAheadBytes of rows later, into the second-level
// cache, which can wait for more lines than the first. Cutting the width into column blocks that fit a cache was measured
// and lost. Passes over one random tensor at a time find more of it in the last-level cache than passes over two: the
// attention scores are written down ([edges, heads]) between the pass over k and that over v.
//
// Work is cut by edges, not rows: a chunk holds about kChunkEdges of them.
#include "neighbors.h"

#include "parallel.h"
#include "scratch.h"
#include "simd.h"

namespace umda::UMDA_ISA {
namespace {

constexpr int64_t kChunkEdges = 2048;
constexpr int64_t kAheadBytes = 16384;
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
      stream_fence();
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

// How many edges ahead to ask for rows of this many bytes.
UMDA_INLINE int64_t edges_ahead(int64_t row_bytes) {
  const int64_t edges = kAheadBytes / (row_bytes < 1 ? 1 : row_bytes);
  return edges < 4 ? 4 : edges > 32 ? 32 : edges;
}

// The node that the edge `ahead` places after e points at; where there is none, `here`, which is at hand.
UMDA_INLINE int64_t target_ahead(const NeighborTable& g, int64_t e, int64_t ahead, int64_t here) {
  if (e + ahead >= g.edges) {
    return here;
  }
  const int32_t j = g.neighbors[e + ahead];
  return present(g, j) ? j : here;
}

// Between so many random rows the machine does not notice what is read in order, a little per row of the graph. These ask
// for it: the values of edges a few rows on, and the features of row i.
template <class T>
UMDA_INLINE void prefetch_values(const T* values, int64_t e) {
  if (values != nullptr) {
    prefetch(reinterpret_cast<const char*>(values + e) + 256);
  }
}

template <class X>
UMDA_INLINE void prefetch_row(const NeighborTable& g, Rows rows, int64_t i, int64_t width) {
  const X* const p = row_of<X>(rows, i < g.nodes ? i : g.nodes - 1);
  for (int64_t d = 0; d < width; d += 64 / static_cast<int64_t>(sizeof(X))) {
    prefetch(p + d);
  }
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
  // write, past the caches if kStream.
  template <bool kStream, class X>
  UMDA_INLINE void put(X* p, Vec v) const {
    if constexpr (kStream && !kTail) {
      stream(p, v);
    } else {
      write(p, v);
    }
  }
  // Asks for the lines of the block that starts at p.
  template <class X>
  UMDA_INLINE void ahead(const X* p) const {
    for (int v = 0; v < kVecs; v += kVecsPerLine<X>) {
      prefetch(p + v * kWidth);
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

// a.b, in four chains; asks for the row `next` on the way.
template <class X, class Y>
UMDA_INLINE float dot(const X* a, const Y* b, const Y* next, int64_t width) {
  Vec chains[4] = {zero(), zero(), zero(), zero()};
  for_blocks<kMaxVecs>(width, [&](auto block, int64_t d) UMDA_LAMBDA_INLINE {
    block.ahead(next + d);
    for (int v = 0; v < block.vecs; ++v) {
      chains[v % 4] = fma(block.read(a + d + v * kWidth), block.read(b + d + v * kWidth), chains[v % 4]);
    }
  });
  return sum((chains[0] + chains[1]) + (chains[2] + chains[3]));
}

// The transpose as the backward kernels walk it: position p in t_edge -> the row its edge starts from.
//
// In a symmetric graph whose rows ascend, that is what `neighbors` holds at p itself; for CSR this is tried first.
struct Sources {
  explicit Sources(const NeighborTable& g) : row(g.t_ptr[g.nodes]), count(g.t_ptr[g.nodes]) {
    if (g.indptr == nullptr) {
      find(g, [&](int64_t, int64_t e) { return static_cast<int32_t>(e / g.degree); });
      return;
    }
    find(g, [&](int64_t p, int64_t e) {
      const int32_t i = g.neighbors[p];
      return present(g, i) && g.indptr[i] <= e && e < g.indptr[i + 1] ? i : -1;
    });
    if (valid) {
      return;
    }
    const Scratch<int32_t> edge_row(g.edges);
    parallel_ranges(g.nodes, 1024, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t e = g.indptr[i]; e < g.indptr[i + 1]; ++e) {
          edge_row[e] = static_cast<int32_t>(i);
        }
      }
    });
    find(g, [&](int64_t, int64_t e) { return edge_row[e]; });
  }

  // The position `distance` after p, or the last one.
  UMDA_INLINE int64_t ahead(int64_t p, int64_t distance) const { return p + distance < count ? p + distance : count - 1; }

  Scratch<int32_t> row;
  int64_t count;
  bool valid;

 private:
  // row_of_edge(p, e): the row of edge e at position p, or -1 where it is not known.
  template <class F>
  void find(const NeighborTable& g, const F& row_of_edge) {
    int64_t bad = 0;
    parallel_ranges(count, 8192, [&](int64_t begin, int64_t end) {
      int64_t wrong = 0;
      for (int64_t p = begin; p < end; ++p) {
        const int64_t e = g.t_edge[p];
        const int32_t i = e >= 0 && e < g.edges ? row_of_edge(p, e) : -1;
        wrong += i < 0 ? 1 : 0;
        row[p] = i < 0 ? 0 : i;
      }
      if (wrong > 0) {
        __atomic_store_n(&bad, 1, __ATOMIC_RELAXED);
      }
    });
    valid = bad == 0;
  }
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

void graph_transpose(const NeighborTable& g, int64_t* t_ptr, int64_t* t_edge) {
  const int64_t nodes = g.nodes, edges = g.edges;
  const int32_t* const neighbors = g.neighbors;
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
  if (total < edges) {
    __builtin_memset(t_edge + total, -1, static_cast<size_t>(edges - total) * sizeof(int64_t));
  }
}

// ---- order -----------------------------------------------------------------------------------------------
//
// Breadth first over edges in both directions, from the first node not reached so far: what lies near in the graph lies
// near in the order (Cuthill and McKee 1969, without their sorting by degree). Reads every edge twice; no arithmetic.

bool graph_order(const NeighborTable& g, int64_t* order) {
  const Sources sources(g);
  if (!sources.valid) {
    return false;
  }
  const Scratch<uint8_t> reached(g.nodes);
  __builtin_memset(reached.data(), 0, static_cast<size_t>(g.nodes));
  int64_t count = 0;
  const auto reach = [&](int64_t i) {
    order[count] = i;  // written over by the next one if i was there already
    count += 1 - reached[i];
    reached[i] = 1;
  };
  int64_t first = 0;
  for (int64_t at = 0; at < g.nodes; ++at) {
    if (at == count) {
      while (reached[first] != 0) {
        ++first;
      }
      reach(first);
    }
    const int64_t i = order[at];
    for (int64_t e = row_begin(g, i); e < row_begin(g, i + 1) && count < g.nodes; ++e) {
      if (present(g, g.neighbors[e])) {
        reach(g.neighbors[e]);
      }
    }
    for (int64_t p = g.t_ptr[i]; p < g.t_ptr[i + 1] && count < g.nodes; ++p) {
      reach(sources.row[p]);
    }
  }
  return true;
}

namespace {

// ---- neighbor_sum ----------------------------------------------------------------------------------------

template <bool kStream, class X>
void sum_forward(const NeighborSumForward& a) {
  const NeighborTable& g = a.graph;
  const int64_t ahead = edges_ahead(a.width * static_cast<int64_t>(sizeof(X)));
  Chunks(g.nodes, g.indptr, g.degree).for_rows([&](int64_t i) {
    const int64_t begin = row_begin(g, i), end = row_begin(g, i + 1);
    X* const out = static_cast<X*>(a.out) + i * a.width;
    prefetch_values(g.neighbors, end + ahead);
    prefetch_values(a.weight, end);
    for_blocks<kMaxVecs>(a.width, [&](auto block, int64_t d) UMDA_LAMBDA_INLINE {
      Vec sums[block.vecs];
      for (int v = 0; v < block.vecs; ++v) {
        sums[v] = zero();
      }
      for (int64_t e = begin; e < end; ++e) {
        block.ahead(row_of<X>(a.x, target_ahead(g, e, ahead, i)) + d);
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
        block.template put<kStream>(out + d + v * kWidth, sums[v]);
      }
    });
  });
}

template <class X>
void sum_forward_any(const NeighborSumForward& a) {
  if (worth_streaming(static_cast<X*>(a.out), a.graph.nodes, a.width)) {
    sum_forward<true, X>(a);
  } else {
    sum_forward<false, X>(a);
  }
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
    prefetch_row<X>(g, a.x, j + 1, a.width);
    prefetch_values(g.t_edge, g.t_ptr[j + 1] + ahead);
    prefetch_values(sources.row.data(), g.t_ptr[j + 1] + ahead);
    for_blocks<kMaxVecs>(a.width, [&](auto block, int64_t d) UMDA_LAMBDA_INLINE {
      Vec sums[block.vecs];
      for (int v = 0; v < block.vecs; ++v) {
        sums[v] = zero();
      }
      for (int64_t p = g.t_ptr[j]; p < g.t_ptr[j + 1]; ++p) {
        const int64_t e = g.t_edge[p], later = sources.ahead(p, ahead);
        block.ahead(row_of<X>(a.d_out, sources.row[later]) + d);
        prefetch(a.weight + g.t_edge[later]);
        prefetch(a.d_weight + g.t_edge[later]);
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
      const float norm = __builtin_sqrtf(dot(row, row, row, width));
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
    prefetch_row<X>(g, a.r, i + 1, a.width);
    prefetch_values(g.neighbors, row_begin(g, i + 1) + ahead);
    for (int64_t e = row_begin(g, i); e < row_begin(g, i + 1); ++e) {
      const int32_t j = g.neighbors[e];
      const X* const next = row_of<X>(a.r, target_ahead(g, e, ahead, i));
      a.cosine[e] = present(g, j) ? dot(own, row_of<X>(a.r, j), next, a.width) * inverse[i] * inverse[j] : 0.0f;
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
      prefetch_row<X>(g, a.r, i + 1, a.width);
      prefetch_values(g.neighbors, row_begin(g, i + 1) + ahead);
      prefetch_values(a.d_cosine, row_begin(g, i + 1));
      prefetch_values(g.t_edge, g.t_ptr[i + 1] + ahead);
      prefetch_values(sources.row.data(), g.t_ptr[i + 1] + ahead);
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
          block.ahead(row_of<X>(a.r, target_ahead(g, e, ahead, i)) + d);
          const int32_t j = g.neighbors[e];
          if (present(g, j)) {
            add(j, a.d_cosine[e] * inverse[j]);
          }
        }
        for (int64_t p = g.t_ptr[i]; p < g.t_ptr[i + 1]; ++p) {
          const int64_t later = sources.ahead(p, ahead);
          block.ahead(row_of<X>(a.r, sources.row[later]) + d);
          prefetch(a.d_cosine + g.t_edge[later]);
          const int32_t source = sources.row[p];
          add(source, a.d_cosine[g.t_edge[p]] * inverse[source]);
        }
        for (int v = 0; v < block.vecs; ++v) {
          block.write(&total[d + v * kWidth], sums[v]);
        }
      });
      const bool clamped = inverse[i] >= 1.0f / kNormEpsilon;
      const float along = clamped ? 0.0f : dot(total.data(), own, own, a.width) * inverse[i] * inverse[i];
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
      prefetch_row<X>(g, a.z, i + 1, a.width);
      prefetch_values(g.neighbors, row_begin(g, i + 1) + ahead);
      prefetch_values(a.weight, row_begin(g, i + 1));
      Vec sums[4] = {zero(), zero(), zero(), zero()};
      for (int64_t e = row_begin(g, i); e < row_begin(g, i + 1); ++e) {
        const X* const next = row_of<X>(a.z, target_ahead(g, e, ahead, i));
        const int32_t j = g.neighbors[e];
        if (!present(g, j)) {
          continue;
        }
        weight_sum += static_cast<double>(a.weight[e]);
        const Vec weight = splat(a.weight[e]);
        const X* const other = row_of<X>(a.z, j);
        for_blocks<kMaxVecs>(a.width, [&](auto block, int64_t d) UMDA_LAMBDA_INLINE {
          block.ahead(next + d);
          for (int v = 0; v < block.vecs; ++v) {
            const Vec difference = block.read(own + d + v * kWidth) - block.read(other + d + v * kWidth);
            sums[v % 4] = fma(weight * difference, difference, sums[v % 4]);
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
    prefetch_row<X>(g, a.z, i + 1, a.width);
    prefetch_values(g.neighbors, row_begin(g, i + 1) + ahead);
    prefetch_values(a.weight, row_begin(g, i + 1));
    prefetch_values(a.d_weight, row_begin(g, i + 1));
    prefetch_values(g.t_edge, g.t_ptr[i + 1] + ahead);
    prefetch_values(sources.row.data(), g.t_ptr[i + 1] + ahead);
    for_blocks<kMaxVecs>(a.width, [&](auto block, int64_t d) UMDA_LAMBDA_INLINE {
      Vec sums[block.vecs];
      for (int v = 0; v < block.vecs; ++v) {
        sums[v] = zero();
      }
      for (int64_t e = row_begin(g, i); e < row_begin(g, i + 1); ++e) {
        block.ahead(row_of<X>(a.z, target_ahead(g, e, ahead, i)) + d);
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
        const int64_t later = sources.ahead(p, ahead);
        block.ahead(row_of<X>(a.z, sources.row[later]) + d);
        prefetch(a.weight + g.t_edge[later]);
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
//
// Between the dot products and the weighted sums, the numbers of an edge are kept together: head h of edge n of a tile is
// lane n * kLanes + h, so that a vector holds several edges, and a reduction over edges serves all heads at once.

// Edges handled at once: their rows of k (and of v) are in cache for the second use.
constexpr int kTile = 32;
constexpr int kMostHeads = 16;  // handled at once; more are several rounds
static_assert(kTile % kWidth == 0);

// Numbers of one edge or node, kLanes of them: a vector or several, or a part of one.
template <int kLanes>
struct Lanes {
  static constexpr int vecs = kLanes > kWidth ? kLanes / kWidth : 1;
  static constexpr int room = kLanes > kWidth ? kLanes : kWidth;  // of a whole vector
};

// Some edges of one row or column of the graph.
template <int kLanes>
struct EdgeList {
  int32_t node[kTile];
  int32_t next[kTile];                              // a node needed some edges later
  alignas(64) float bias[kTile * kLanes + kWidth];  // -inf behind the last edge
  int count = 0;

  UMDA_INLINE void add(int64_t at, int64_t later, float log_weight) {
    node[count] = static_cast<int32_t>(at);
    next[count] = static_cast<int32_t>(later);
    for (int h = 0; h < kLanes; ++h) {
      bias[count * kLanes + h] = log_weight;
    }
    ++count;
  }
  UMDA_INLINE void close() { store(bias + count * kLanes, splat(-__builtin_inff())); }
  // Lanes in whole vectors.
  UMDA_INLINE int lanes() const { return (count * kLanes + kWidth - 1) / kWidth * kWidth; }
  // Clears the last vector of p: what lies behind the last edge takes part in vector arithmetic and must not be a NaN.
  UMDA_INLINE void clear_last(float* p) const {
    if (kLanes < kWidth && count > 0) {
      store(p + lanes() - kWidth, zero());
    }
  }
  // The next edges of row i, from e on, its self loop first; e and own are moved on.
  UMDA_INLINE void fill(const NeighborTable& g, int64_t i, int64_t& e, int64_t end, bool& own, int64_t ahead,
                        const float* log_weight) {
    count = 0;
    if (own) {
      add(i, i, 0.0f);
      own = false;
    }
    for (; e < end && count < kTile; ++e) {
      if (present(g, g.neighbors[e])) {
        add(g.neighbors[e], target_ahead(g, e, ahead, i), log_weight == nullptr ? 0.0f : log_weight[e]);
      }
    }
    close();
  }
};

// How a block of kVecs vectors falls into heads of kHeadVecs whole vectors (0: the block lies within one head).
template <int kHeadVecs, int kVecs>
struct HeadsOf {
  static constexpr int vecs = kHeadVecs == 0 || kHeadVecs > kVecs ? kVecs : kHeadVecs;  // of one head, in the block
  static constexpr int heads = kVecs / vecs;
};

template <int kHeadVecs, int kLanes, class X>
void list_dots_vectors(const X* own, Rows rows, const EdgeList<kLanes>& list, int64_t heads, int64_t width, float* to) {
  for_blocks<kMaxVecs>(heads * width, [&](auto block, int64_t d) UMDA_LAMBDA_INLINE {
    using Split = HeadsOf<kHeadVecs, block.vecs>;
    const bool first = d % width == 0;
    float* const at = to + d / width;
    Vec query[block.vecs];
    for (int v = 0; v < block.vecs; ++v) {
      query[v] = block.read(own + d + v * kWidth);
    }
    for (int n = 0; n < list.count; ++n) {
      const X* const from = row_of<X>(rows, list.node[n]) + d;
      block.ahead(row_of<X>(rows, list.next[n]) + d);
      float* const lane = at + n * kLanes;
      if constexpr (Split::heads == 1) {
        constexpr int kChains = block.vecs < 4 ? block.vecs : 4;
        Vec chains[4] = {zero(), zero(), zero(), zero()};
        for (int v = 0; v < block.vecs; ++v) {
          chains[v % kChains] = fma(query[v], block.read(from + v * kWidth), chains[v % kChains]);
        }
        const float dot = sum((chains[0] + chains[1]) + (chains[2] + chains[3]));
        *lane = first ? dot : *lane + dot;
      } else {
        Vec chains[Split::heads < 4 ? 4 : Split::heads];
        UMDA_UNROLL
        for (int v = 0; v < block.vecs; ++v) {
          const Vec before = v % Split::vecs == 0 ? zero() : chains[v / Split::vecs];
          chains[v / Split::vecs] = fma(query[v], block.read(from + v * kWidth), before);
        }
        if constexpr (Split::heads >= 4) {
          for (int h = 0; h < Split::heads; h += 4) {
            sums(chains[h], chains[h + 1], chains[h + 2], chains[h + 3], lane + h);
          }
        } else {
          float four[4];
          chains[2] = chains[3] = zero();
          sums(chains[0], chains[1], chains[2], chains[3], four);
          for (int h = 0; h < Split::heads; ++h) {
            lane[h] = four[h];
          }
        }
      }
    }
  });
}

// f(Constant<vectors of a head>, first head, number of heads) for groups of heads that can be read in one go.
template <class F>
UMDA_INLINE void by_head_size(int64_t heads, int64_t width, F&& f) {
  if (heads == 1 || width % (kMaxVecs * kWidth) == 0) {
    f(Constant<0>{}, int64_t{0}, heads);
  } else if (width == kWidth) {
    f(Constant<1>{}, int64_t{0}, heads);
  } else if (width == 2 * kWidth) {
    f(Constant<2>{}, int64_t{0}, heads);
  } else if (width == 4 * kWidth) {
    f(Constant<4>{}, int64_t{0}, heads);
  } else if (width == 8 * kWidth) {
    f(Constant<8>{}, int64_t{0}, heads);
  } else {
    for (int64_t h = 0; h < heads; ++h) {
      f(Constant<0>{}, h, int64_t{1});
    }
  }
}

template <class X>
UMDA_INLINE Rows from_head(Rows rows, int64_t h, int64_t width) {
  return {static_cast<const X*>(rows.data) + h * width, rows.stride};
}

// to[n * kLanes + h] = own[h].rows[node[n], h] for the edges of the list.
template <int kLanes, class X>
void list_dots(const X* own, Rows rows, const EdgeList<kLanes>& list, int64_t heads, int64_t width, float* to) {
  list.clear_last(to);
  if (width == 0) {
    __builtin_memset(to, 0, static_cast<size_t>(list.lanes()) * sizeof(float));
  }
  by_head_size(heads, width, [&](auto head_vecs, int64_t h, int64_t count) UMDA_LAMBDA_INLINE {
    list_dots_vectors<head_vecs.value>(own + h * width, from_head<X>(rows, h, width), list, count, width, to + h);
  });
}

template <bool kAhead, int kHeadVecs, int kLanes, class X>
void list_add_vectors(float* acc, const float* weight, Rows rows, const EdgeList<kLanes>& list, int64_t heads,
                      int64_t width) {
  for_blocks<kMaxVecs>(heads * width, [&](auto block, int64_t d) UMDA_LAMBDA_INLINE {
    using Split = HeadsOf<kHeadVecs, block.vecs>;
    const float* const w = weight + d / width;
    Vec total[block.vecs];
    for (int v = 0; v < block.vecs; ++v) {
      total[v] = block.read(acc + d + v * kWidth);
    }
    for (int n = 0; n < list.count; ++n) {
      const X* const from = row_of<X>(rows, list.node[n]) + d;
      if constexpr (kAhead) {
        block.ahead(row_of<X>(rows, list.next[n]) + d);
      }
      for (int v = 0; v < block.vecs; ++v) {
        total[v] = fma(splat(w[n * kLanes + v / Split::vecs]), block.read(from + v * kWidth), total[v]);
      }
    }
    for (int v = 0; v < block.vecs; ++v) {
      block.write(acc + d + v * kWidth, total[v]);
    }
  });
}

// acc[h] += sum over the list of weight[n * kLanes + h] rows[node[n], h]. kAhead: whether to ask for the rows needed later.
template <bool kAhead, class X, int kLanes>
void list_add(float* acc, const float* weight, Rows rows, const EdgeList<kLanes>& list, int64_t heads, int64_t width) {
  by_head_size(heads, width, [&](auto head_vecs, int64_t h, int64_t count) UMDA_LAMBDA_INLINE {
    list_add_vectors<kAhead, head_vecs.value, kLanes, X>(acc + h * width, weight + h, from_head<X>(rows, h, width), list,
                                                         count, width);
  });
}

template <bool kStream, class X>
UMDA_INLINE void put_row(X* to, const float* from, float factor, int64_t width) {
  for_blocks<4>(width, [&](auto block, int64_t d) UMDA_LAMBDA_INLINE {
    for (int v = 0; v < block.vecs; ++v) {
      block.template put<kStream>(to + d + v * kWidth, block.read(from + d + v * kWidth) * splat(factor));
    }
  });
}

// to = factor * from, in to's type; past the caches if `streaming`, with a fence to follow.
template <class X>
UMDA_INLINE void convert_row(X* to, const float* from, float factor, int64_t width, bool streaming = false) {
  if (streaming) {
    put_row<true>(to, from, factor, width);
  } else {
    put_row<false>(to, from, factor, width);
  }
}

UMDA_INLINE void fill_zero(float* p, int64_t count) {
  __builtin_memset(p, 0, static_cast<size_t>(count) * sizeof(float));
}

// f(Constant<lanes>, first head, number of heads) for at most kMostHeads heads at a time, with lanes for all of them.
template <class F>
UMDA_INLINE void by_heads(int64_t heads, F&& f) {
  for (int64_t h = 0; h < heads; h += kMostHeads) {
    const int64_t count = smaller<int64_t>(kMostHeads, heads - h);
    if (count == 1) {
      f(Constant<1>{}, h, count);
    } else if (count <= 4) {
      f(Constant<4>{}, h, count);
    } else if (count <= 8) {
      f(Constant<8>{}, h, count);
    } else {
      f(Constant<16>{}, h, count);
    }
  }
}

// Heads [head, head + heads).
template <int kLanes, class X>
void attention_forward(const NeighborAttentionForward& a, int64_t head, int64_t heads) {
  constexpr int kVecs = Lanes<kLanes>::vecs, kRoom = Lanes<kLanes>::room;
  const NeighborTable& g = a.graph;
  const int64_t width = a.width;
  const float scale = width == 0 ? 0.0f : 1.0f / __builtin_sqrtf(static_cast<float>(width));
  const Rows q = from_head<X>(a.q, head, width), k = from_head<X>(a.k, head, width), v = from_head<X>(a.v, head, width);
  const int64_t ahead = edges_ahead(heads * width * static_cast<int64_t>(sizeof(X)));
  const bool streaming = worth_streaming(static_cast<X*>(a.out), g.nodes * a.heads, width);
  const Chunks chunks(g.nodes, g.indptr, g.degree);
  const Scratch<float> scores((g.edges + g.nodes) * kLanes);  // of each row, its self loop's first if there is one
  parallel_items(chunks.count, [&](int64_t chunk) {
    EdgeList<kLanes> list;
    alignas(64) float p[kTile * kLanes] = {};
    for (int64_t i = chunks.begin(chunk); i < chunks.end(chunk); ++i) {
      const int64_t end = row_begin(g, i + 1);
      int64_t e = row_begin(g, i);
      float* to = &scores[(e + i) * kLanes];
      bool own = a.self_loop;
      prefetch_row<X>(g, q, i + 1, heads * width);
      prefetch_values(g.neighbors, end + ahead);
      while (own || e < end) {
        list.fill(g, i, e, end, own, ahead, nullptr);
        list_dots(row_of<X>(q, i), k, list, heads, width, p);
        __builtin_memcpy(to, p, static_cast<size_t>(list.count * kLanes) * sizeof(float));
        to += list.count * kLanes;
      }
    }
  });
  parallel_items(chunks.count, [&](int64_t chunk) {
    const Scratch<float> acc(heads * width);
    EdgeList<kLanes> list;
    alignas(64) float p[kTile * kLanes] = {}, tops[kRoom], totals[kRoom];
    for (int64_t i = chunks.begin(chunk); i < chunks.end(chunk); ++i) {
      const int64_t end = row_begin(g, i + 1);
      int64_t e = row_begin(g, i);
      fill_zero(acc.data(), heads * width);
      Vec peak[kVecs], total[kVecs];  // of the lanes' heads: the largest score, and each lane's share of the sum
      for (int u = 0; u < kVecs; ++u) {
        peak[u] = splat(-__builtin_inff());
        total[u] = zero();
      }
      bool own = a.self_loop, first = true;
      const float* from = &scores[(e + i) * kLanes];
      prefetch_values(g.neighbors, end + ahead);
      prefetch_values(a.log_weight, end);
      prefetch_values(from, 16 * kLanes);
      while (own || e < end) {
        list.fill(g, i, e, end, own, ahead, a.log_weight);
        list.clear_last(p);
        __builtin_memcpy(p, from, static_cast<size_t>(list.count * kLanes) * sizeof(float));
        from += list.count * kLanes;
        Vec top[kVecs], shift[kVecs];
        for (int u = 0; u < kVecs; ++u) {
          top[u] = peak[u];
        }
        for (int n = 0; n < list.lanes(); n += kVecs * kWidth) {
          for (int u = 0; u < kVecs; ++u) {
            const Vec score = fma(load(p + n + u * kWidth), splat(scale), load(list.bias + n + u * kWidth));
            store(p + n + u * kWidth, score);
            top[u] = max(score, top[u]);
          }
        }
        for (int u = 0; u < kVecs; ++u) {
          top[u] = largest_by_period<kLanes>(top[u]);
          shift[u] = max(top[u], splat(-__FLT_MAX__));  // -inf - -inf would be a NaN
          const Vec rescale = exp(peak[u] - shift[u]);
          total[u] = total[u] * rescale;
          store(totals + u * kWidth, rescale);
          peak[u] = top[u];
        }
        for (int n = 0; n < list.lanes(); n += kVecs * kWidth) {
          for (int u = 0; u < kVecs; ++u) {
            const Vec probability = exp(load(p + n + u * kWidth) - shift[u]);
            store(p + n + u * kWidth, probability);
            total[u] = total[u] + probability;
          }
        }
        if (!first) {
          for (int64_t h = 0; h < heads; ++h) {
            convert_row(&acc[h * width], &acc[h * width], totals[h], width);
          }
        }
        list_add<true, X>(acc.data(), p, v, list, heads, width);
        first = false;
      }
      for (int u = 0; u < kVecs; ++u) {
        store(tops + u * kWidth, peak[u]);
        store(totals + u * kWidth, sum_by_period<kLanes>(total[u]));
      }
      X* const out = static_cast<X*>(a.out) + (i * a.heads + head) * width;
      for (int64_t h = 0; h < heads; ++h) {
        // 0: nothing to attend to, or only weights of 0.
        const bool nothing = totals[h] == 0.0f;
        a.lse[i * a.heads + head + h] = nothing ? -__builtin_inff() : tops[h] + __builtin_logf(totals[h]);
        if (nothing) {
          fill_zero(&acc[h * width], width);
        }
        convert_row(out + h * width, &acc[h * width], nothing ? 0.0f : 1.0f / totals[h], width, streaming);
      }
    }
    stream_fence();
  });
}

// With alpha = exp(s - lse), delta[i] = d_out[i].out[i]:
//   ds = alpha (d_out[i].v[j] - delta[i]);  dv[j] += alpha d_out[i];  dk[j] += scale ds q[i];  dq[i] += scale ds k[j]
// First by target: q and d_out are gathered, dk and dv finished, ds kept ([edges, heads]); then by row: k is gathered.
// Heads [head, head + heads).
template <int kLanes, class X>
void attention_backward(const NeighborAttentionBackward& a, const Sources& sources, int64_t head, int64_t heads) {
  constexpr int kVecs = Lanes<kLanes>::vecs, kRoom = Lanes<kLanes>::room;
  const NeighborTable& g = a.graph;
  const int64_t width = a.width, row_width = heads * width, out_stride = a.heads * width;
  const float scale = width == 0 ? 0.0f : 1.0f / __builtin_sqrtf(static_cast<float>(width));
  const Rows q = from_head<X>(a.q, head, width), k = from_head<X>(a.k, head, width), v = from_head<X>(a.v, head, width);
  const Rows d_outs = from_head<X>(a.d_out, head, width), outs = from_head<X>(a.out, head, width);
  const int64_t ahead = edges_ahead(row_width * static_cast<int64_t>(sizeof(X)));
  const Scratch<float> ds(g.edges * kLanes);
  const Scratch<float> own_ds(a.self_loop ? g.nodes * kLanes : 0);
  const Scratch<float> stats(g.nodes * kLanes * 2);  // of every node lse, then delta
  const auto copy = [](float* to, const float* from) UMDA_LAMBDA_INLINE { __builtin_memcpy(to, from, kLanes * sizeof(float)); };

  const auto worth = [&](void* p) { return worth_streaming(static_cast<X*>(p), g.nodes * a.heads, width); };
  const bool streaming = worth(a.dq) && worth(a.dk) && worth(a.dv);
  const Chunks rows(g.nodes, g.indptr, g.degree);
  parallel_items(rows.count, [&](int64_t chunk) {
    EdgeList<kLanes> list;
    alignas(64) float scores[kTile * kLanes] = {}, d_alpha[kTile * kLanes] = {};
    for (int64_t i = rows.begin(chunk); i < rows.end(chunk); ++i) {
      float* const lse = &stats[i * kLanes * 2];
      float* const delta = lse + kLanes;
      const X* const d_out = row_of<X>(d_outs, i);
      fill_zero(lse, 2 * kLanes);
      for (int64_t h = 0; h < heads; ++h) {
        const float value = a.lse[i * a.heads + head + h];
        // exp(s - inf) = 0: a row with nothing to attend to gives no gradient.
        lse[h] = value == -__builtin_inff() ? __builtin_inff() : value;
      }
      if constexpr (sizeof(X) == sizeof(float)) {
        list.count = 0;
        list.add(i, i + 1 < g.nodes ? i + 1 : i, 0.0f);
        list_dots(d_out, outs, list, heads, width, scores);
        for (int64_t h = 0; h < heads; ++h) {
          delta[h] = scores[h];
        }
        continue;
      }
      // out has lost digits that d_log_weight, in float32, would miss: delta = sum alpha d_out.v / sum alpha instead.
      // All alpha of a row share the rounding of lse; divided by their sum it does not meet the difference
      // d_out.v - delta, which may cancel.
      const int64_t end = row_begin(g, i + 1);
      int64_t e = row_begin(g, i);
      bool own = a.self_loop;
      alignas(64) float of_lanes[kRoom];
      for (int lane = 0; lane < kRoom; ++lane) {
        of_lanes[lane] = lse[lane % kLanes];
      }
      Vec total[kVecs], sum[kVecs];
      for (int u = 0; u < kVecs; ++u) {
        total[u] = sum[u] = zero();
      }
      while (own || e < end) {
        list.fill(g, i, e, end, own, ahead, a.log_weight);
        list_dots(row_of<X>(q, i), k, list, heads, width, scores);
        list_dots(d_out, v, list, heads, width, d_alpha);
        for (int n = 0; n < list.lanes(); n += kVecs * kWidth) {
          for (int u = 0; u < kVecs; ++u) {
            const int at = n + u * kWidth;
            const Vec score = fma(load(scores + at), splat(scale), load(list.bias + at));
            const Vec alpha = exp(score - load(of_lanes + u * kWidth));
            total[u] = fma(alpha, load(d_alpha + at), total[u]);
            sum[u] = sum[u] + alpha;
          }
        }
      }
      alignas(64) float sums[kRoom];
      for (int u = 0; u < kVecs; ++u) {
        store(of_lanes + u * kWidth, sum_by_period<kLanes>(total[u]));
        store(sums + u * kWidth, sum_by_period<kLanes>(sum[u]));
      }
      for (int64_t h = 0; h < heads; ++h) {
        delta[h] = sums[h] > 0.0f ? of_lanes[h] / sums[h] : 0.0f;
      }
    }
  });

  const Chunks targets(g.nodes, g.t_ptr, 0);
  parallel_items(targets.count, [&](int64_t chunk) {
    const Scratch<float> dk(row_width), dv(row_width);
    EdgeList<kLanes> list;
    int64_t edge[kTile];
    alignas(64) float alpha[kTile * kLanes] = {}, d_score[kTile * kLanes] = {};
    alignas(64) float lse[kTile * kLanes] = {}, delta[kTile * kLanes] = {};
    for (int64_t j = targets.begin(chunk); j < targets.end(chunk); ++j) {
      int64_t p = g.t_ptr[j];
      const int64_t end = g.t_ptr[j + 1];
      fill_zero(dk.data(), row_width);
      fill_zero(dv.data(), row_width);
      prefetch_row<X>(g, k, j + 1, row_width);
      prefetch_row<X>(g, v, j + 1, row_width);
      prefetch_values(g.t_edge, end + ahead);
      prefetch_values(sources.row.data(), end + ahead);
      bool own = a.self_loop;
      const auto add = [&](int64_t at, int64_t row, int64_t later, float log_weight) UMDA_LAMBDA_INLINE {
        edge[list.count] = at;
        copy(lse + list.count * kLanes, &stats[row * kLanes * 2]);
        copy(delta + list.count * kLanes, &stats[row * kLanes * 2 + kLanes]);
        list.add(row, later, log_weight);
      };
      while (own || p < end) {
        list.count = 0;
        if (own) {
          add(-1, j, j, 0.0f);
          own = false;
        }
        for (; p < end && list.count < kTile; ++p) {
          const int64_t later = sources.ahead(p, ahead);
          add(g.t_edge[p], sources.row[p], sources.row[later], a.log_weight == nullptr ? 0.0f : a.log_weight[g.t_edge[p]]);
          prefetch(&stats[sources.row[later] * kLanes * 2]);
          prefetch(&ds[g.t_edge[later] * kLanes]);
          if (a.log_weight != nullptr) {
            prefetch(a.log_weight + g.t_edge[later]);
          }
        }
        list.close();
        list_dots(row_of<X>(k, j), q, list, heads, width, alpha);
        list_dots(row_of<X>(v, j), d_outs, list, heads, width, d_score);
        for (int n = 0; n < list.lanes(); n += kWidth) {
          const Vec score = fma(load(alpha + n), splat(scale), load(list.bias + n));
          const Vec weight = exp(score - load(lse + n));
          store(alpha + n, weight);
          store(d_score + n, weight * (load(d_score + n) - load(delta + n)));
        }
        for (int n = 0; n < list.count; ++n) {
          copy(edge[n] < 0 ? &own_ds[j * kLanes] : &ds[edge[n] * kLanes], d_score + n * kLanes);
        }
        list_add<false, X>(dk.data(), d_score, q, list, heads, width);
        list_add<false, X>(dv.data(), alpha, d_outs, list, heads, width);
      }
      convert_row(static_cast<X*>(a.dk) + j * out_stride + head * width, dk.data(), scale, row_width, streaming);
      convert_row(static_cast<X*>(a.dv) + j * out_stride + head * width, dv.data(), 1.0f, row_width, streaming);
    }
    stream_fence();
  });

  parallel_items(rows.count, [&](int64_t chunk) {
    const Scratch<float> dq(row_width);
    EdgeList<kLanes> list;
    alignas(64) float weight[kTile * kLanes];
    for (int64_t i = rows.begin(chunk); i < rows.end(chunk); ++i) {
      const int64_t end = row_begin(g, i + 1);
      int64_t e = row_begin(g, i);
      fill_zero(dq.data(), row_width);
      prefetch_values(g.neighbors, end + ahead);
      for (int64_t next = end; next < 2 * end - e; next += 16 / kLanes) {
        prefetch(&ds[next * kLanes]);
      }
      bool own = a.self_loop;
      while (own || e < end) {
        list.count = 0;
        if (own) {
          copy(weight, &own_ds[i * kLanes]);
          list.add(i, i, 0.0f);
          own = false;
        }
        for (; e < end && list.count < kTile; ++e) {
          float total = 0.0f;
          if (present(g, g.neighbors[e])) {
            for (int64_t h = 0; h < heads; ++h) {
              total += ds[e * kLanes + h];
            }
            copy(weight + list.count * kLanes, &ds[e * kLanes]);
            list.add(g.neighbors[e], target_ahead(g, e, ahead, i), 0.0f);
          }
          a.d_log_weight[e] = head == 0 ? total : a.d_log_weight[e] + total;
        }
        list_add<true, X>(dq.data(), weight, k, list, heads, width);
      }
      convert_row(static_cast<X*>(a.dq) + i * out_stride + head * width, dq.data(), scale, row_width, streaming);
    }
    stream_fence();
  });
}

template <class X>
void attention_forward_any(const NeighborAttentionForward& a) {
  by_heads(a.heads, [&](auto lanes, int64_t head, int64_t heads) { attention_forward<lanes.value, X>(a, head, heads); });
}

template <class X>
bool attention_backward_any(const NeighborAttentionBackward& a) {
  const Sources sources(a.graph);
  if (!sources.valid) {
    return false;
  }
  if (a.heads == 0) {
    fill_zero(a.d_log_weight, a.graph.edges);
  }
  by_heads(a.heads, [&](auto lanes, int64_t head, int64_t heads) {
    attention_backward<lanes.value, X>(a, sources, head, heads);
  });
  return true;
}

}  // namespace

void neighbor_sum_forward(const NeighborSumForward& a) { UMDA_DISPATCH_DTYPE(a.type, sum_forward_any<scalar_t>(a)); }

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
  UMDA_DISPATCH_DTYPE(a.type, attention_forward_any<scalar_t>(a));
}

bool neighbor_attention_backward(const NeighborAttentionBackward& a) {
  UMDA_DISPATCH_DTYPE(a.type, return attention_backward_any<scalar_t>(a));
  return false;
}

}  // namespace umda::UMDA_ISA
