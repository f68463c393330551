// Message passing over a neighbour graph: arguments of the kernels in neighbors.cpp.
//
// Rows of features have an innermost stride of 1 and any row stride (in elements); outputs are contiguous. Values of
// edges (weights, cosines) are contiguous float32. "Absent" is any entry of `neighbors` outside [0, nodes).
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace umda {

struct NeighborTable {
  int64_t nodes;             // rows of the graph and of the features
  int64_t degree;            // of the fixed-degree table; unused with indptr
  int64_t edges;             // entries of `neighbors`, absent ones included
  const int32_t* neighbors;  // [nodes, degree], or [edges] with indptr
  const int64_t* indptr;     // [nodes + 1], or null
  const int64_t* t_ptr;      // [nodes + 1]: the transpose, for the backward kernels
  const int64_t* t_edge;     // positions in `neighbors`
};

struct Rows {
  const void* data;
  int64_t stride;
};

struct EdgeCosineForward {
  NeighborTable graph;
  int64_t width;
  DType type;
  Rows r;
  float* cosine;
};

struct EdgeCosineBackward {
  NeighborTable graph;
  int64_t width;
  DType type;
  Rows r;
  const float* d_cosine;
  void* dr;
};

struct NeighborSumForward {
  NeighborTable graph;
  int64_t width;
  DType type;
  Rows x;
  const float* weight;
  void* out;
};

struct NeighborSumBackward {
  NeighborTable graph;
  int64_t width;
  DType type;
  Rows x, d_out;
  const float* weight;
  void* dx;
  float* d_weight;
};

struct SmoothnessForward {
  NeighborTable graph;
  int64_t width;
  DType type;
  Rows z;
  const float* weight;
  float* energy;      // [1]
  float* weight_sum;  // [1]
};

struct SmoothnessBackward {
  NeighborTable graph;
  int64_t width;
  DType type;
  Rows z;
  const float* weight;
  float d_energy, energy, weight_sum;
  void* dz;
  float* d_weight;
};

// Rows of q, k, v, out: [heads, width], contiguous.
struct NeighborAttentionForward {
  NeighborTable graph;
  int64_t heads, width;
  DType type;
  Rows q, k, v;
  const float* log_weight;  // or null
  bool self_loop;
  void* out;   // [nodes, heads, width]
  float* lse;  // [nodes, heads]
};

struct NeighborAttentionBackward {
  NeighborTable graph;
  int64_t heads, width;
  DType type;
  Rows d_out, q, k, v, out;
  const float* log_weight;  // or null
  const float* lse;
  bool self_loop;
  void *dq, *dk, *dv;   // [nodes, heads, width]
  float* d_log_weight;  // as neighbors
};

}  // namespace umda

// t_ptr [nodes + 1] and t_edge [edges]: positions in `neighbors` by target, ascending; behind the last edge, -1.
UMDA_DECLARE_KERNEL(void, graph_transpose, const ::umda::NeighborTable&, int64_t* t_ptr, int64_t* t_edge)
// order [nodes]: all nodes, each near its neighbours. Needs the transpose; false, with order unwritten, as below.
UMDA_DECLARE_KERNEL(bool, graph_order, const ::umda::NeighborTable&, int64_t* order)
UMDA_DECLARE_KERNEL(void, neighbor_sum_forward, const ::umda::NeighborSumForward&)
// The backward kernels return false, and leave their outputs unwritten, when t_edge holds a position that does not exist.
UMDA_DECLARE_KERNEL(bool, neighbor_sum_backward, const ::umda::NeighborSumBackward&)
UMDA_DECLARE_KERNEL(void, edge_cosine_forward, const ::umda::EdgeCosineForward&)
UMDA_DECLARE_KERNEL(bool, edge_cosine_backward, const ::umda::EdgeCosineBackward&)
UMDA_DECLARE_KERNEL(void, smoothness_forward, const ::umda::SmoothnessForward&)
UMDA_DECLARE_KERNEL(bool, smoothness_backward, const ::umda::SmoothnessBackward&)
UMDA_DECLARE_KERNEL(void, neighbor_attention_forward, const ::umda::NeighborAttentionForward&)
UMDA_DECLARE_KERNEL(bool, neighbor_attention_backward, const ::umda::NeighborAttentionBackward&)
