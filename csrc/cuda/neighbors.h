// Message passing over a neighbour graph: arguments of the launchers in neighbors.cu.
//
// Rows of features have an innermost stride of 1 and any row stride (in elements); outputs are contiguous. Values of
// edges (weights, cosines) are contiguous float32. "Absent" is any entry of `neighbors` outside [0, nodes).
#pragma once

#include <cstdint>

#include "cuda/launch.h"
#include "dtype.h"

namespace umda::cuda {

struct NeighborTable {
  int64_t nodes;             // rows of the graph and of the features
  int64_t degree;            // of the fixed-degree table; unused with indptr
  int64_t edges;             // entries of `neighbors`, absent ones included
  const int32_t* neighbors;  // [nodes, degree], or [edges] with indptr
  const int64_t* indptr;     // [nodes + 1], or null
  const int64_t* t_ptr;      // [nodes + 1]: the transpose, for the backward kernels
  const int64_t* t_edge;     // [edges], positions in `neighbors`
};

// [nodes, heads, width], with a stride per node and per head.
struct Heads {
  const void* data;
  int64_t stride, head_stride;
};

// Every struct ends with its workspace: of <name>_workspace bytes, aligned to 16.

struct GraphTranspose {
  const int32_t* neighbors;  // [edges]
  const int64_t* indptr;     // [nodes + 1], or null
  int64_t edges, nodes;
  int64_t* t_ptr;   // [nodes + 1]
  int64_t* t_edge;  // [edges]
  void* workspace;
};

struct EdgeCosineForward {
  NeighborTable graph;
  int64_t width;
  DType type;
  Heads r;
  float* cosine;
  void* workspace;
};

struct EdgeCosineBackward {
  NeighborTable graph;
  int64_t width;
  DType type;
  Heads r;
  const float* d_cosine;
  void* dr;
  void* workspace;
};

struct NeighborSumForward {
  NeighborTable graph;
  int64_t width;
  DType type;
  Heads x;
  const float* weight;
  void* out;
  void* workspace;
};

struct NeighborSumBackward {
  NeighborTable graph;
  int64_t width;
  DType type;
  Heads x, d_out;
  const float* weight;
  void* dx;
  float* d_weight;
  void* workspace;
};

struct SmoothnessForward {
  NeighborTable graph;
  int64_t width;
  DType type;
  Heads z;
  const float* weight;
  float* energy;      // [1]
  float* weight_sum;  // [1]
  void* workspace;
};

struct SmoothnessBackward {
  NeighborTable graph;
  int64_t width;
  DType type;
  Heads z;
  const float* weight;
  const float *d_energy, *energy, *weight_sum;  // [1] each, on the device
  void* dz;
  float* d_weight;
  void* workspace;
};

struct NeighborAttentionForward {
  NeighborTable graph;
  int64_t heads, width;
  DType type;
  Heads q, k, v;
  const float* log_weight;  // or null
  bool self_loop;
  void* out;   // [nodes, heads, width]
  float* lse;  // [nodes, heads]
  void* workspace;
};

struct NeighborAttentionBackward {
  NeighborTable graph;
  int64_t heads, width;
  DType type;
  Heads d_out, q, k, v;
  const float* log_weight;  // or null
  bool self_loop;
  void *dq, *dk, *dv;   // [nodes, heads, width]
  float* d_log_weight;  // as neighbors
  void* workspace;
};

int64_t graph_transpose_workspace(const GraphTranspose& a);
int64_t edge_cosine_forward_workspace(const EdgeCosineForward& a);
int64_t edge_cosine_backward_workspace(const EdgeCosineBackward& a);
int64_t neighbor_sum_forward_workspace(const NeighborSumForward& a);
int64_t neighbor_sum_backward_workspace(const NeighborSumBackward& a);
int64_t smoothness_forward_workspace(const SmoothnessForward& a);
int64_t smoothness_backward_workspace(const SmoothnessBackward& a);
int64_t neighbor_attention_forward_workspace(const NeighborAttentionForward& a);
int64_t neighbor_attention_backward_workspace(const NeighborAttentionBackward& a);

// Each returns a cudaError_t. Every output element is written.
int graph_transpose(const GraphTranspose& a, const Launch& launch);
int edge_cosine_forward(const EdgeCosineForward& a, const Launch& launch);
int edge_cosine_backward(const EdgeCosineBackward& a, const Launch& launch);
int neighbor_sum_forward(const NeighborSumForward& a, const Launch& launch);
int neighbor_sum_backward(const NeighborSumBackward& a, const Launch& launch);
int smoothness_forward(const SmoothnessForward& a, const Launch& launch);
int smoothness_backward(const SmoothnessBackward& a, const Launch& launch);
int neighbor_attention_forward(const NeighborAttentionForward& a, const Launch& launch);
int neighbor_attention_backward(const NeighborAttentionBackward& a, const Launch& launch);

}  // namespace umda::cuda
