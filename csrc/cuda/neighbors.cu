// Message passing over a neighbour graph: weighted sums, attention, cosines and the smoothness energy.
//
// All of it is made of two kernels over features and some small ones over values of edges:
//
//   pair_edges   a number per edge and head from the features at its two ends: x_i.y_j or ||x_i - y_j||^2
//   gather_rows  a row per node and head: sum over edges of a coefficient times the row at the other end, over the node's
//                own edges, over those that point at it (the transpose), or both
//
//   neighbor_sum        out = gather(w, x);         dx = gather^T(w, d_out), dw = pair(d_out, x)
//   edge_cosine         cos = pair(r, r) / norms;   dr = gather and gather^T of d_cos r / norms, projected
//   smoothness_energy   sum of w pair(z, z);        dz = gather and gather^T of w (z_i - z_j), dw from pair(z, z)
//   neighbor_attention  s = pair(q, k), p = softmax(s), out = gather(p, v)
//                       dp = pair(d_out, v), ds = p (dp - sum p dp), dq = gather(ds, k), dk = gather^T(ds, q),
//                       dv = gather^T(p, d_out)
//
// Traffic: with E edges, D columns (all heads) a pair_edges or gather_rows fetches E*D elements, from cache where nodes
// are neighbours of many; attention forward 2, backward 5 of them ([E,heads] floats of scores add 1/Dh to that; nothing of
// size E*D is stored). Reads and writes of whole tensors, N*D each, are small beside it. Work: 2 E*D per fetch, far below
// what the fetches cost.
//
// Balance: pair_edges takes edges by 32, whatever their rows. gather_rows takes a row at a time, but a row of more than
// kLong edges is summed beforehand in parts: a warp per kLong consecutive positions of the list of edges (gather_parts);
// the row then adds its parts, in order. So results do not depend on the grid, and one row of a million edges is no worse
// than many short ones.
#include "cuda/neighbors.h"

#include "cuda/device.h"

namespace umda::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kLong = 256;
constexpr float kNormEpsilon = 1e-8f;  // as in torch.nn.functional.cosine_similarity

// A graph, and the row of every edge where that takes a search (CSR).
struct Graph {
  NeighborTable table;
  const int32_t* edge_row;  // [edges], or null: fixed degree

  __device__ __forceinline__ int row(int64_t edge) const {
    if (edge_row != nullptr) {
      return edge_row[edge];
    }
    if (table.edges <= 0xffffffffll) {
      return static_cast<int>(static_cast<uint32_t>(edge) / static_cast<uint32_t>(table.degree));
    }
    return static_cast<int>(edge / table.degree);
  }
  // -1 where absent.
  __device__ __forceinline__ int column(int64_t edge) const {
    const int node = table.neighbors[edge];
    return node >= 0 && node < table.nodes ? node : -1;
  }
  // Kept inside the list of edges, whatever indptr holds.
  __device__ __forceinline__ void edges_of(int64_t node, int64_t& begin, int64_t& end) const {
    begin = table.indptr == nullptr ? node * table.degree : larger<int64_t>(table.indptr[node], 0);
    end = table.indptr == nullptr ? begin + table.degree : smaller(table.indptr[node + 1], table.edges);
  }
};

__global__ void __launch_bounds__(kThreads) find_rows(const NeighborTable table, int32_t* edge_row) {
  for (int64_t edge = first_thread(); edge < table.edges; edge += num_threads()) {
    edge_row[edge] = static_cast<int32_t>(find_segment(table.indptr, table.nodes, edge));
  }
}

template <class T>
__device__ __forceinline__ const T* row_of(const Heads& x, int64_t node, int64_t head) {
  return static_cast<const T*>(x.data) + node * x.stride + head * x.head_stride;
}

template <class T>
bool aligned_heads(const Heads& x, int64_t heads, int64_t width) {
  return aligned_rows<T>(x.data, x.stride, width) && (heads == 1 || x.head_stride % kRun<T> == 0);
}

// ---- pair_edges --------------------------------------------------------------------------------------------

// Entries [edges, edges + nodes) of `out` belong to the edges from every node to itself, when `self` is set.
struct Pairs {
  Graph graph;
  Heads x, y;  // at the row and at the neighbour
  int64_t heads, width;
  bool self;
  int lanes;
  float scale;
  const float* node_scale;  // [nodes], multiplied at both ends, or null
  const float* offset;      // [edges], added, or null
  float absent;             // what an edge gets that is not there
  float* out;               // [edges (+ nodes), heads]
};

// One warp per 32 edges and head: `lanes` lanes to an edge, 32 / lanes edges at a time.
template <class T, bool kDistance, bool kVector>
__global__ void __launch_bounds__(kThreads, 6) pair_edges(const Pairs a) {
  constexpr int kPairs = kVector ? 2 : 1;  // edges that a group of lanes has at hand
  const int lane = lane_id(), column_lane = lane % a.lanes, group = lane / a.lanes, groups = kWarp / a.lanes;
  const int width = static_cast<int>(a.width), tile_width = a.lanes * kPerLane;
  const int64_t edges = a.graph.table.edges, count = edges + (a.self ? a.graph.table.nodes : 0);
  const int64_t units = divide_up(count, kWarp) * a.heads;
  for (int64_t unit = first_warp(); unit < units; unit += num_warps()) {
    const int64_t first = unit / a.heads * kWarp, head = unit % a.heads, own = first + lane;
    int row = -1, column = -1;
    if (own < edges) {
      column = a.graph.column(own);
      row = column < 0 ? -1 : a.graph.row(own);
    } else if (own < count) {
      row = column = static_cast<int>(own - edges);
    }
    float result = 0.0f;
    const int steps = static_cast<int>(smaller<int64_t>(kWarp, count - first));
    for (int step = 0; step < steps; step += kPairs * groups) {
      int i[kPairs], j[kPairs];
      float sum[kPairs] = {};
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        i[p] = __shfl_sync(kFullWarp, row, step + p * groups + group);
        j[p] = __shfl_sync(kFullWarp, column, step + p * groups + group);
      }
      for (int tile = 0; tile < width; tile += tile_width) {
        float x[kPairs][kPerLane], y[kPairs][kPerLane];
#pragma unroll
        for (int p = 0; p < kPairs; ++p) {
          load8<kVector>(x[p], row_of<T>(a.x, i[p], head), width, tile, column_lane, a.lanes, i[p] >= 0);
          load8<kVector>(y[p], row_of<T>(a.y, j[p], head), width, tile, column_lane, a.lanes, i[p] >= 0);
        }
#pragma unroll
        for (int p = 0; p < kPairs; ++p) {
#pragma unroll
          for (int c = 0; c < kPerLane; ++c) {
            const float left = kDistance ? x[p][c] - y[p][c] : x[p][c];
            sum[p] = fmaf(left, kDistance ? left : y[p][c], sum[p]);
          }
        }
      }
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        const float total = __shfl_sync(kFullWarp, sum_lanes(sum[p], 1, a.lanes), lane % groups * a.lanes);
        result = lane - lane % groups == step + p * groups ? total : result;
      }
    }
    if (own < count) {
      if (row < 0) {
        result = a.absent;
      } else {
        result *= a.scale;
        if (a.node_scale != nullptr) {
          result = result * a.node_scale[row] * a.node_scale[column];
        }
        if (a.offset != nullptr && own < edges) {
          result += a.offset[own];
        }
      }
      a.out[own * a.heads + head] = result;
    }
  }
}

template <class T>
void pair(const Launch& launch, Pairs a, bool distance = false) {
  const bool vector = aligned_heads<T>(a.x, a.heads, a.width) && aligned_heads<T>(a.y, a.heads, a.width);
  a.lanes = lanes_for(a.width);
  const int64_t count = a.graph.table.edges + (a.self ? a.graph.table.nodes : 0);
  const auto kernel = vector ? (distance ? pair_edges<T, true, true> : pair_edges<T, false, true>)
                             : (distance ? pair_edges<T, true, false> : pair_edges<T, false, false>);
  run(launch, kernel, divide_up(count, kWarp) * a.heads, kWarps, kThreads, 0, a);
}

// ---- gather_rows -------------------------------------------------------------------------------------------

enum class Finish { plain, cosine, energy };

struct Gather {
  Graph graph;
  Heads rows;  // what is gathered, and for `difference` and `cosine` the node's own
  int64_t heads, width;
  bool used[2];       // the node's own edges; the edges that point at it
  bool has_parts[2];  // whether the list can have long rows
  bool difference;    // gathers row - own row
  int lanes;
  const float* coefficient;  // [edges, heads]
  const float* node_scale;   // [nodes], of the rows gathered, or null
  const float* self;         // [nodes, heads], coefficient of the node's own row, or null
  float* parts[2];           // [2 * units, heads, width]
  Finish finish;
  float scale;
  const float *d_energy, *weight_sum;  // for Finish::energy
  void* out;                           // [nodes, heads, width]
};

__device__ __forceinline__ int64_t list_size(const Gather& a, int list) {
  return list == 0 ? a.graph.table.edges : smaller(a.graph.table.t_ptr[a.graph.table.nodes], a.graph.table.edges);
}

// Positions of a node in a list; kept inside it, whatever t_ptr holds.
__device__ __forceinline__ void positions_of(const Gather& a, int list, int64_t node, int64_t& begin, int64_t& end) {
  if (list == 0) {
    a.graph.edges_of(node, begin, end);
  } else {
    begin = larger<int64_t>(a.graph.table.t_ptr[node], 0);
    end = smaller(a.graph.table.t_ptr[node + 1], a.graph.table.edges);
  }
}

// Adds coefficient * row over positions [begin, end) of a list: the tile's 8 columns of every lane, each group of lanes its
// own share of the edges.
template <class T, bool kVector>
__device__ __forceinline__ void add_edges(const Gather& a, int list, int64_t head, int64_t begin, int64_t end, int tile,
                                          const float (&own)[kPerLane], float (&sum)[kPerLane]) {
  const int lane = lane_id(), column_lane = lane % a.lanes, group = lane / a.lanes, groups = kWarp / a.lanes;
  const int width = static_cast<int>(a.width);
  for (int64_t first = begin; first < end; first += kWarp) {
    const int count = static_cast<int>(smaller<int64_t>(kWarp, end - first));
    int other = -1;
    float coefficient = 0.0f;
    if (lane < count) {
      const int64_t edge = list == 0 ? first + lane : a.graph.table.t_edge[first + lane];
      if (edge >= 0 && edge < a.graph.table.edges) {
        other = list == 0 ? a.graph.column(edge) : a.graph.row(edge);
        coefficient = other >= 0 ? a.coefficient[edge * a.heads + head] : 0.0f;
      }
      if (other >= 0 && a.node_scale != nullptr) {
        coefficient *= a.node_scale[other];
      }
    }
    for (int step = group; step - group < count; step += kBatch<kVector> * groups) {
      int j[kBatch<kVector>];
      float x[kBatch<kVector>][kPerLane], c[kBatch<kVector>];
#pragma unroll
      for (int i = 0; i < kBatch<kVector>; ++i) {
        j[i] = __shfl_sync(kFullWarp, other, step + i * groups);
        c[i] = __shfl_sync(kFullWarp, coefficient, step + i * groups);
      }
#pragma unroll
      for (int i = 0; i < kBatch<kVector>; ++i) {
        load8<kVector>(x[i], row_of<T>(a.rows, j[i], head), width, tile, column_lane, a.lanes, j[i] >= 0);
      }
#pragma unroll
      for (int i = 0; i < kBatch<kVector>; ++i) {
#pragma unroll
        for (int k = 0; k < kPerLane; ++k) {
          // Where nothing was gathered the node's own row, which may hold a NaN, does not count either.
          sum[k] = fmaf(c[i], j[i] >= 0 ? x[i][k] - own[k] : 0.0f, sum[k]);
        }
      }
    }
  }
}

template <class T, bool kVector>
__device__ __forceinline__ void load_own(const Gather& a, bool wanted, int64_t node, int64_t head, int tile,
                                         float (&own)[kPerLane]) {
#pragma unroll
  for (int k = 0; k < kPerLane; ++k) {
    own[k] = 0.0f;
  }
  if (wanted) {
    load8<kVector>(own, row_of<T>(a.rows, node, head), static_cast<int>(a.width), tile, lane_id() % a.lanes, a.lanes);
  }
}

__device__ __forceinline__ float* part_of(const Gather& a, int list, int64_t slot, int64_t head) {
  return a.parts[list] + (slot * a.heads + head) * a.width;
}

// One warp per kLong positions of a list and side: what the long row at their beginning has among them, in slot 2u,
// and the one that begins among them and reaches beyond, in slot 2u+1. There are no other long rows.
template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads, 5) gather_parts(const Gather a, int list) {
  const int lane = lane_id(), column_lane = lane % a.lanes, group = lane / a.lanes;
  const int width = static_cast<int>(a.width), tile_width = a.lanes * kPerLane;
  const NeighborTable& table = a.graph.table;
  const int64_t size = list_size(a, list), slots = divide_up(size, kLong) * 2;
  for (int64_t slot = first_warp(); slot < slots; slot += num_warps()) {
    const int64_t first = slot / 2 * kLong;
    const int64_t last = smaller(first + kLong, size), at = slot % 2 == 0 ? first : last - 1;
    const int64_t* const ptr = list == 0 ? table.indptr : table.t_ptr;
    const int64_t node = ptr == nullptr ? at / table.degree : find_segment(ptr, table.nodes, at);
    int64_t begin, end;
    positions_of(a, list, node, begin, end);
    if (end - begin <= kLong || (slot % 2 == 1 && begin <= first)) {
      continue;
    }
    for (int64_t head = 0; head < a.heads; ++head) {
      for (int tile = 0; tile < width; tile += tile_width) {
        float own[kPerLane], sum[kPerLane] = {};
        load_own<T, kVector>(a, a.difference, node, head, tile, own);
        add_edges<T, kVector>(a, list, head, larger(begin, first), smaller(end, last), tile, own, sum);
#pragma unroll
        for (int k = 0; k < kPerLane; ++k) {
          sum[k] = sum_lanes(sum[k], a.lanes, kWarp);
        }
        if (group == 0) {
          store8_float<T, kVector>(sum, part_of(a, list, slot, head), width, tile, column_lane, a.lanes);
        }
      }
    }
  }
}

// One warp per node and head.
template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads, 5) gather_rows(const Gather a) {
  const int lane = lane_id(), column_lane = lane % a.lanes, group = lane / a.lanes, groups = kWarp / a.lanes;
  const int width = static_cast<int>(a.width), tile_width = a.lanes * kPerLane;
  const bool cosine = a.finish == Finish::cosine;
  float scale = a.scale;
  if (a.finish == Finish::energy) {
    // d energy / d z_i = 2 w (z_i - z_j) / (D W), and what is gathered is w (z_j - z_i).
    const float total = *a.weight_sum;
    scale = total == 0.0f ? 0.0f : -2.0f * *a.d_energy / (static_cast<float>(a.width) * total);
  }
  for (int64_t item = first_warp(); item < a.graph.table.nodes * a.heads; item += num_warps()) {
    const int64_t node = item / a.heads, head = item % a.heads;
    float along = 0.0f;  // the sum's component along the node's own unit vector
    // The cosine's gradient needs the whole sum before it can write any of it: a row of several tiles is summed twice.
    for (int pass = cosine && width > tile_width ? 0 : 1; pass < 2; ++pass) {
      for (int tile = 0; tile < width; tile += tile_width) {
        float own[kPerLane], sum[kPerLane] = {};
        load_own<T, kVector>(a, a.difference, node, head, tile, own);
        for (int list = 0; list < 2; ++list) {
          if (!a.used[list]) {
            continue;
          }
          int64_t begin, end;
          positions_of(a, list, node, begin, end);
          if (a.has_parts[list] && end - begin > kLong) {
            const int64_t unit = begin / kLong, units = (end - 1) / kLong - unit + 1;
            for (int64_t u = group; u < units; u += groups) {
              const int64_t slot = 2 * (unit + u) + (u == 0 && begin > unit * kLong ? 1 : 0);
              float x[kPerLane];
              load8_float<T, kVector>(x, part_of(a, list, slot, head), width, tile, column_lane, a.lanes);
#pragma unroll
              for (int k = 0; k < kPerLane; ++k) {
                sum[k] += x[k];
              }
            }
          } else {
            add_edges<T, kVector>(a, list, head, begin, end, tile, own, sum);
          }
        }
#pragma unroll
        for (int k = 0; k < kPerLane; ++k) {
          sum[k] = sum_lanes(sum[k], a.lanes, kWarp);
        }
        if (cosine) {
          // With u = r / |r|: dr = (sum - u (u.sum)) / |r|; where |r| is clamped it is a constant, and dr = sum / |r|.
          const float inverse = a.node_scale[node];
          const bool clamped = inverse >= 1.0f / kNormEpsilon;
          load_own<T, kVector>(a, true, node, head, tile, own);
          if (pass == 0 || width <= tile_width) {
            float dot = 0.0f;
#pragma unroll
            for (int k = 0; k < kPerLane; ++k) {
              dot = fmaf(own[k] * inverse, sum[k], dot);
            }
            along += clamped ? 0.0f : sum_lanes(dot, 1, a.lanes);
          }
#pragma unroll
          for (int k = 0; k < kPerLane; ++k) {
            sum[k] = (sum[k] - own[k] * inverse * along) * inverse;
          }
        } else if (a.self != nullptr) {
          load_own<T, kVector>(a, true, node, head, tile, own);
          const float c = a.self[item];
#pragma unroll
          for (int k = 0; k < kPerLane; ++k) {
            sum[k] = fmaf(c, own[k], sum[k]);
          }
        }
#pragma unroll
        for (int k = 0; k < kPerLane; ++k) {
          sum[k] *= scale;
        }
        if (pass == 1 && group == 0) {
          store8<kVector>(sum, static_cast<T*>(a.out) + item * a.width, width, tile, column_lane, a.lanes);
        }
      }
    }
  }
}

// Workspace of a gather over the lists used.
void plan_parts(Gather& a, Workspace& space) {
  for (int list = 0; list < 2; ++list) {
    const bool ragged = list == 1 || a.graph.table.indptr != nullptr || a.graph.table.degree > kLong;
    a.has_parts[list] = a.used[list] && ragged && a.graph.table.edges > kLong;
    a.parts[list] = a.has_parts[list]
                        ? space.take<float>(2 * divide_up(a.graph.table.edges, kLong) * a.heads * a.width)
                        : nullptr;
  }
}

template <class T>
void gather(const Launch& launch, Gather a) {
  const bool vector = aligned_heads<T>(a.rows, a.heads, a.width);
  a.lanes = lanes_for(a.width);
  for (int list = 0; list < 2; ++list) {
    if (a.has_parts[list]) {
      run(launch, vector ? gather_parts<T, true> : gather_parts<T, false>,
          divide_up(a.graph.table.edges, kLong) * 2, kWarps, kThreads, 0, a, list);
    }
  }
  run(launch, vector ? gather_rows<T, true> : gather_rows<T, false>, a.graph.table.nodes * a.heads, kWarps, kThreads, 0, a);
}

// ---- small kernels -----------------------------------------------------------------------------------------

// 1 / max(|row|, epsilon). One warp per row.
template <class T>
__global__ void __launch_bounds__(kThreads)
    invert_norms(const Heads x, int64_t nodes, int width, bool aligned, float* inverse) {
  for (int64_t node = first_warp(); node < nodes; node += num_warps()) {
    float sum = 0.0f;
    for (int tile = 0; tile < width; tile += kWarp * kPerLane) {
      float v[kPerLane];
      if (aligned) {
        load8<true>(v, row_of<T>(x, node, 0), width, tile, lane_id(), kWarp);
      } else {
        load8<false>(v, row_of<T>(x, node, 0), width, tile, lane_id(), kWarp);
      }
#pragma unroll
      for (int c = 0; c < kPerLane; ++c) {
        sum = fmaf(v[c], v[c], sum);
      }
    }
    const float norm = sqrtf(sum_warp(sum));
    if (lane_id() == 0) {
      inverse[node] = 1.0f / (norm > kNormEpsilon || norm != norm ? norm : kNormEpsilon);
    }
  }
}

// Softmax over the edges of every row and head, and over the edge to itself. `share` lanes to a row and head.
struct Softmax {
  Graph graph;
  int64_t heads;
  bool self;
  int share;
  float* scores;    // [edges (+ nodes), heads]: becomes p (forward) or p still (backward)
  float* d_scores;  // backward: dp, becomes p (dp - sum p dp); forward: null
  float* lse;       // forward: [nodes, heads]
};

__global__ void __launch_bounds__(kThreads) softmax_rows(const Softmax a) {
  const int lane = lane_id(), within = lane % a.share, group = lane / a.share, groups = kWarp / a.share;
  const int64_t items = a.graph.table.nodes * a.heads;
  for (int64_t first = first_warp() * groups; first < items; first += num_warps() * groups) {
    const int64_t item = first + group, node = item / a.heads, head = item % a.heads;
    int64_t begin = 0, end = 0;
    if (item < items) {
      a.graph.edges_of(node, begin, end);
      begin += within;
      // The edge to itself is the one behind the last.
      end += a.self ? 1 : 0;
    }
    const auto at = [&](int64_t edge) {
      return (a.self && edge == end - 1 ? a.graph.table.edges + node : edge) * a.heads + head;
    };
    float top = -infinity();
    for (int64_t edge = begin; edge < end; edge += a.share) {
      top = fmaxf(top, a.scores[at(edge)]);
    }
    for (int offset = 1; offset < a.share; offset *= 2) {
      top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, offset));
    }
    const float shift = top == -infinity() ? 0.0f : top;
    float sum = 0.0f, weighted = 0.0f;
    for (int64_t edge = begin; edge < end; edge += a.share) {
      const float p = expf(a.scores[at(edge)] - shift);
      sum += p;
      // An edge without weight may have any dp, NaN as well.
      if (a.d_scores != nullptr && p != 0.0f) {
        weighted = fmaf(p, a.d_scores[at(edge)], weighted);
      }
    }
    sum = sum_lanes(sum, 1, a.share);
    weighted = sum_lanes(weighted, 1, a.share);
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum, mean = weighted * inverse;
    for (int64_t edge = begin; edge < end; edge += a.share) {
      const float p = expf(a.scores[at(edge)] - shift) * inverse;
      a.scores[at(edge)] = p;
      if (a.d_scores != nullptr) {
        a.d_scores[at(edge)] = p == 0.0f ? 0.0f : p * (a.d_scores[at(edge)] - mean);
      }
    }
    if (a.lse != nullptr && item < items && within == 0) {
      a.lse[item] = sum == 0.0f ? -infinity() : top + logf(sum);
    }
  }
}

void softmax(const Launch& launch, Softmax a) {
  const int64_t edges = a.graph.table.edges + (a.self ? a.graph.table.nodes : 0);
  a.share = 1;
  while (a.share < kWarp && a.share * a.graph.table.nodes < edges) {
    a.share *= 2;
  }
  run(launch, softmax_rows, a.graph.table.nodes * a.heads, kThreads / a.share, kThreads, 0, a);
}

// Sum over the heads. One thread per edge.
__global__ void __launch_bounds__(kThreads) sum_heads(const float* values, int64_t edges, int64_t heads, float* out) {
  for (int64_t edge = first_thread(); edge < edges; edge += num_threads()) {
    float sum = 0.0f;
    for (int64_t head = 0; head < heads; ++head) {
      sum += values[edge * heads + head];
    }
    out[edge] = sum;
  }
}

// Sums of w d and of w over kEnergyChunk edges. One block per chunk.
constexpr int64_t kEnergyChunk = 4096;

__device__ __forceinline__ double sum_block(double x, double* sums) {
  x = sum_lanes(x, 1, kWarp);
  if (lane_id() == 0) {
    sums[warp_id()] = x;
  }
  __syncthreads();
  double total = 0.0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    total += sums[w];
  }
  __syncthreads();
  return total;
}

__global__ void __launch_bounds__(kThreads)
    sum_energy(const NeighborTable table, const float* weight, const float* distance, double* sums) {
  UMDA_SHARED_ARRAY(double, shared, kWarps);
  for (int64_t chunk = blockIdx.x; chunk < divide_up(table.edges, kEnergyChunk); chunk += gridDim.x) {
    const int64_t end = smaller((chunk + 1) * kEnergyChunk, table.edges);
    double energy = 0.0, total = 0.0;
    for (int64_t edge = chunk * kEnergyChunk + threadIdx.x; edge < end; edge += kThreads) {
      const int node = table.neighbors[edge];
      if (node >= 0 && node < table.nodes) {
        energy += static_cast<double>(weight[edge]) * distance[edge];
        total += weight[edge];
      }
    }
    energy = sum_block(energy, shared);
    total = sum_block(total, shared);
    if (threadIdx.x == 0) {
      sums[2 * chunk] = energy;
      sums[2 * chunk + 1] = total;
    }
  }
}

// One block.
__global__ void __launch_bounds__(kThreads)
    finish_energy(const double* sums, int64_t chunks, int64_t width, float* energy_out, float* weight_sum) {
  UMDA_SHARED_ARRAY(double, shared, kWarps);
  double energy = 0.0, total = 0.0;
  for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += kThreads) {
    energy += sums[2 * chunk];
    total += sums[2 * chunk + 1];
  }
  energy = sum_block(energy, shared);
  total = sum_block(total, shared);
  if (threadIdx.x == 0) {
    const float rounded = static_cast<float>(total);
    *weight_sum = rounded;
    *energy_out = rounded == 0.0f || width == 0 ? 0.0f : static_cast<float>(energy / (static_cast<double>(width) * total));
  }
}

// d energy / d w = (d / D - energy) / W, in place of the squared distances d. One thread per edge.
__global__ void __launch_bounds__(kThreads)
    finish_d_weight(const NeighborTable table, int64_t width, const float* d_energy, const float* energy,
                    const float* weight_sum, float* values) {
  const float total = *weight_sum;
  const float factor = total == 0.0f ? 0.0f : *d_energy / total;
  for (int64_t edge = first_thread(); edge < table.edges; edge += num_threads()) {
    const int node = table.neighbors[edge];
    const bool there = node >= 0 && node < table.nodes;
    values[edge] = there ? factor * (values[edge] / static_cast<float>(width) - *energy) : 0.0f;
  }
}

// ---- operations --------------------------------------------------------------------------------------------

// The rows of a CSR graph's edges, found where they are needed.
struct GraphSpace {
  GraphSpace(const NeighborTable& table, Workspace& space)
      : rows(table.indptr == nullptr ? nullptr : space.take<int32_t>(table.edges)), graph{table, rows} {}
  void find(const Launch& launch) const {
    if (rows != nullptr) {
      run(launch, find_rows, graph.table.edges, kThreads, kThreads, 0, graph.table, rows);
    }
  }
  int32_t* rows;
  Graph graph;
};

Pairs make_pairs(const Graph& graph, const Heads& x, const Heads& y, int64_t heads, int64_t width, float* out) {
  Pairs a{};
  a.graph = graph;
  a.x = x;
  a.y = y;
  a.heads = heads;
  a.width = width;
  a.scale = 1.0f;
  a.out = out;
  return a;
}

Gather make_gather(const Graph& graph, const Heads& rows, int64_t heads, int64_t width, bool own, bool pointing,
                   const float* coefficient, void* out) {
  Gather a{};
  a.graph = graph;
  a.rows = rows;
  a.heads = heads;
  a.width = width;
  a.used[0] = own;
  a.used[1] = pointing;
  a.coefficient = coefficient;
  a.finish = Finish::plain;
  a.scale = 1.0f;
  a.out = out;
  return a;
}

// Each operation lays out its workspace in one place, used for the size (without memory) and for the launch alike.

struct SumForward {
  SumForward(const NeighborSumForward& a, void* base)
      : space(base), out(make_gather({a.graph, nullptr}, a.x, 1, a.width, true, false, a.weight, a.out)) {
    plan_parts(out, space);
  }
  Workspace space;
  Gather out;
};

struct SumBackward {
  SumBackward(const NeighborSumBackward& a, void* base)
      : space(base),
        graph(a.graph, space),
        dx(make_gather(graph.graph, a.d_out, 1, a.width, false, true, a.weight, a.dx)),
        d_weight(make_pairs(graph.graph, a.d_out, a.x, 1, a.width, a.d_weight)) {
    plan_parts(dx, space);
  }
  Workspace space;
  GraphSpace graph;
  Gather dx;
  Pairs d_weight;
};

struct CosineForward {
  CosineForward(const EdgeCosineForward& a, void* base)
      : space(base),
        graph(a.graph, space),
        inverse(space.take<float>(a.graph.nodes)),
        cosine(make_pairs(graph.graph, a.r, a.r, 1, a.width, a.cosine)) {
    cosine.node_scale = inverse;
  }
  Workspace space;
  GraphSpace graph;
  float* inverse;
  Pairs cosine;
};

struct CosineBackward {
  CosineBackward(const EdgeCosineBackward& a, void* base)
      : space(base),
        graph(a.graph, space),
        inverse(space.take<float>(a.graph.nodes)),
        dr(make_gather(graph.graph, a.r, 1, a.width, true, true, a.d_cosine, a.dr)) {
    dr.node_scale = inverse;
    dr.finish = Finish::cosine;
    plan_parts(dr, space);
  }
  Workspace space;
  GraphSpace graph;
  float* inverse;
  Gather dr;
};

struct EnergyForward {
  EnergyForward(const SmoothnessForward& a, void* base)
      : space(base),
        graph(a.graph, space),
        distance(space.take<float>(a.graph.edges)),
        sums(space.take<double>(2 * divide_up(a.graph.edges, kEnergyChunk))),
        pairs(make_pairs(graph.graph, a.z, a.z, 1, a.width, distance)) {}
  Workspace space;
  GraphSpace graph;
  float* distance;
  double* sums;
  Pairs pairs;
};

struct EnergyBackward {
  EnergyBackward(const SmoothnessBackward& a, void* base)
      : space(base),
        graph(a.graph, space),
        dz(make_gather(graph.graph, a.z, 1, a.width, true, true, a.weight, a.dz)),
        d_weight(make_pairs(graph.graph, a.z, a.z, 1, a.width, a.d_weight)) {
    dz.difference = true;
    dz.finish = Finish::energy;
    dz.d_energy = a.d_energy;
    dz.weight_sum = a.weight_sum;
    plan_parts(dz, space);
  }
  Workspace space;
  GraphSpace graph;
  Gather dz;
  Pairs d_weight;
};

int64_t score_count(const NeighborTable& graph, bool self_loop, int64_t heads) {
  return (graph.edges + (self_loop ? graph.nodes : 0)) * heads;
}

float score_scale(int64_t width) { return width == 0 ? 1.0f : static_cast<float>(1.0 / sqrt(static_cast<double>(width))); }

// q.k / sqrt(width) + log_weight of every edge, -inf where absent.
Pairs make_scores(const Graph& graph, const Heads& q, const Heads& k, int64_t heads, int64_t width, bool self_loop,
                  const float* log_weight, float* out) {
  Pairs scores = make_pairs(graph, q, k, heads, width, out);
  scores.self = self_loop;
  scores.scale = score_scale(width);
  scores.offset = log_weight;
  scores.absent = -INFINITY;
  return scores;
}

struct AttentionForward {
  AttentionForward(const NeighborAttentionForward& a, void* base)
      : space(base),
        graph(a.graph, space),
        p(space.take<float>(score_count(a.graph, a.self_loop, a.heads))),
        scores(make_scores(graph.graph, a.q, a.k, a.heads, a.width, a.self_loop, a.log_weight, p)),
        out(make_gather(graph.graph, a.v, a.heads, a.width, true, false, p, a.out)) {
    out.self = a.self_loop && p != nullptr ? p + a.graph.edges * a.heads : nullptr;
    plan_parts(out, space);
  }
  Workspace space;
  GraphSpace graph;
  float* p;
  Pairs scores;
  Gather out;
};

struct AttentionBackward {
  AttentionBackward(const NeighborAttentionBackward& a, void* base)
      : space(base),
        graph(a.graph, space),
        p(space.take<float>(score_count(a.graph, a.self_loop, a.heads))),
        ds(space.take<float>(score_count(a.graph, a.self_loop, a.heads))),
        scores(make_scores(graph.graph, a.q, a.k, a.heads, a.width, a.self_loop, a.log_weight, p)),
        dp(make_pairs(graph.graph, a.d_out, a.v, a.heads, a.width, ds)),
        dq(make_gather(graph.graph, a.k, a.heads, a.width, true, false, ds, a.dq)),
        dk(make_gather(graph.graph, a.q, a.heads, a.width, false, true, ds, a.dk)),
        dv(make_gather(graph.graph, a.d_out, a.heads, a.width, false, true, p, a.dv)) {
    dp.self = a.self_loop;
    dq.scale = dk.scale = score_scale(a.width);
    if (a.self_loop && p != nullptr) {
      dv.self = p + a.graph.edges * a.heads;
      dq.self = dk.self = ds + a.graph.edges * a.heads;
    }
    // One after another on the same stream, so that they can share the parts.
    plan_parts(dq, space);
    plan_parts(dk, space);
    dv.has_parts[1] = dk.has_parts[1];
    dv.parts[1] = dk.parts[1];
  }
  Workspace space;
  GraphSpace graph;
  float *p, *ds;
  Pairs scores, dp;
  Gather dq, dk, dv;
};

template <class T>
void invert(const Launch& launch, const Heads& r, int64_t nodes, int64_t width, float* inverse) {
  run(launch, invert_norms<T>, nodes, kWarps, kThreads, 0, r, nodes, static_cast<int>(width),
      aligned_heads<T>(r, 1, width), inverse);
}

}  // namespace

int64_t neighbor_sum_forward_workspace(const NeighborSumForward& a) { return SumForward(a, nullptr).space.size(); }
int64_t neighbor_sum_backward_workspace(const NeighborSumBackward& a) { return SumBackward(a, nullptr).space.size(); }
int64_t edge_cosine_forward_workspace(const EdgeCosineForward& a) { return CosineForward(a, nullptr).space.size(); }
int64_t edge_cosine_backward_workspace(const EdgeCosineBackward& a) { return CosineBackward(a, nullptr).space.size(); }
int64_t smoothness_forward_workspace(const SmoothnessForward& a) { return EnergyForward(a, nullptr).space.size(); }
int64_t smoothness_backward_workspace(const SmoothnessBackward& a) { return EnergyBackward(a, nullptr).space.size(); }
int64_t neighbor_attention_forward_workspace(const NeighborAttentionForward& a) {
  return AttentionForward(a, nullptr).space.size();
}
int64_t neighbor_attention_backward_workspace(const NeighborAttentionBackward& a) {
  return AttentionBackward(a, nullptr).space.size();
}

int neighbor_sum_forward(const NeighborSumForward& a, const Launch& launch) {
  const SumForward s(a, a.workspace);
  UMDA_DISPATCH_DTYPE(a.type, gather<scalar_t>(launch, s.out));
  return static_cast<int>(cudaGetLastError());
}

int neighbor_sum_backward(const NeighborSumBackward& a, const Launch& launch) {
  const SumBackward s(a, a.workspace);
  s.graph.find(launch);
  UMDA_DISPATCH_DTYPE(a.type, {
    gather<scalar_t>(launch, s.dx);
    pair<scalar_t>(launch, s.d_weight);
  });
  return static_cast<int>(cudaGetLastError());
}

int edge_cosine_forward(const EdgeCosineForward& a, const Launch& launch) {
  const CosineForward s(a, a.workspace);
  s.graph.find(launch);
  UMDA_DISPATCH_DTYPE(a.type, {
    invert<scalar_t>(launch, a.r, a.graph.nodes, a.width, s.inverse);
    pair<scalar_t>(launch, s.cosine);
  });
  return static_cast<int>(cudaGetLastError());
}

int edge_cosine_backward(const EdgeCosineBackward& a, const Launch& launch) {
  const CosineBackward s(a, a.workspace);
  s.graph.find(launch);
  UMDA_DISPATCH_DTYPE(a.type, {
    invert<scalar_t>(launch, a.r, a.graph.nodes, a.width, s.inverse);
    gather<scalar_t>(launch, s.dr);
  });
  return static_cast<int>(cudaGetLastError());
}

int smoothness_forward(const SmoothnessForward& a, const Launch& launch) {
  const EnergyForward s(a, a.workspace);
  s.graph.find(launch);
  UMDA_DISPATCH_DTYPE(a.type, pair<scalar_t>(launch, s.pairs, true));
  const int64_t chunks = divide_up(a.graph.edges, kEnergyChunk);
  run(launch, sum_energy, chunks, 1, kThreads, 0, a.graph, a.weight, s.distance, s.sums);
  run(launch, finish_energy, 1, 1, kThreads, 0, s.sums, chunks, a.width, a.energy, a.weight_sum);
  return static_cast<int>(cudaGetLastError());
}

int smoothness_backward(const SmoothnessBackward& a, const Launch& launch) {
  const EnergyBackward s(a, a.workspace);
  s.graph.find(launch);
  UMDA_DISPATCH_DTYPE(a.type, {
    gather<scalar_t>(launch, s.dz);
    pair<scalar_t>(launch, s.d_weight, true);
  });
  run(launch, finish_d_weight, a.graph.edges, kThreads, kThreads, 0, a.graph, a.width, a.d_energy, a.energy, a.weight_sum,
      a.d_weight);
  return static_cast<int>(cudaGetLastError());
}

int neighbor_attention_forward(const NeighborAttentionForward& a, const Launch& launch) {
  const AttentionForward s(a, a.workspace);
  s.graph.find(launch);
  UMDA_DISPATCH_DTYPE(a.type, {
    pair<scalar_t>(launch, s.scores);
    softmax(launch, {s.graph.graph, a.heads, a.self_loop, 0, s.p, nullptr, a.lse});
    gather<scalar_t>(launch, s.out);
  });
  return static_cast<int>(cudaGetLastError());
}

// The softmax is found again from the scores: kept from the forward it would cost [edges, heads] floats of memory, and
// from lse alone it would carry lse's rounding.
int neighbor_attention_backward(const NeighborAttentionBackward& a, const Launch& launch) {
  const AttentionBackward s(a, a.workspace);
  s.graph.find(launch);
  UMDA_DISPATCH_DTYPE(a.type, {
    pair<scalar_t>(launch, s.scores);
    pair<scalar_t>(launch, s.dp);
    softmax(launch, {s.graph.graph, a.heads, a.self_loop, 0, s.p, s.ds, nullptr});
    gather<scalar_t>(launch, s.dq);
    gather<scalar_t>(launch, s.dk);
    gather<scalar_t>(launch, s.dv);
  });
  run(launch, sum_heads, a.graph.edges, kThreads, kThreads, 0, s.ds, a.graph.edges, a.heads, a.d_log_weight);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace umda::cuda
