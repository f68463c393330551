#include "cuda/neighbors.h"

#include "cuda/binding.h"

namespace umda::cuda {
namespace {

// What the graph's arrays hold is not checked, that would wait for the device: an entry of neighbors or t_edge outside its
// range counts as absent, and indptr and t_ptr are validated by umda_fast.ops.
NeighborTable make_table(const Tensor& neighbors, const OptionalTensor& indptr, const Tensor& features) {
  const int64_t nodes = features.size(0);
  same_device(neighbors, features, "neighbors");
  check_type(neighbors, ScalarType::Int, "neighbors");
  STD_TORCH_CHECK(nodes <= INT32_MAX, "a graph has at most 2^31 - 1 nodes, got ", nodes);
  NeighborTable g{};
  g.nodes = nodes;
  g.edges = neighbors.numel();
  g.neighbors = neighbors.const_data_ptr<int32_t>();
  if (indptr.has_value()) {
    check_shape(neighbors, {-1}, "neighbors");
    STD_TORCH_CHECK(nodes > 0 || g.edges == 0, "a graph without nodes has no edges, got ", g.edges);
    g.indptr = indptr->const_data_ptr<int64_t>();
  } else {
    check_shape(neighbors, {nodes, -1}, "neighbors");
    g.degree = neighbors.size(1);
  }
  return g;
}

// The arrays of a graph as the kernels read them, and what owns their memory.
struct DeviceGraph {
  DeviceGraph(const Tensor& neighbors_any, const OptionalTensor& indptr_any, const Tensor& features)
      : neighbors(torch::stable::contiguous(neighbors_any)),
        indptr(contiguous_like(indptr_any, features, {features.size(0) + 1}, ScalarType::Long, "indptr")),
        table(make_table(neighbors, indptr, features)) {}
  DeviceGraph(const Tensor& neighbors_any, const OptionalTensor& indptr_any, const Tensor& features,
              const Tensor& t_ptr_any, const Tensor& t_edge_any)
      : DeviceGraph(neighbors_any, indptr_any, features) {
    t_ptr = contiguous_like(t_ptr_any, features, {table.nodes + 1}, ScalarType::Long, "t_ptr");
    t_edge = contiguous_like(t_edge_any, features, {table.edges}, ScalarType::Long, "t_edge");
    table.t_ptr = data_or_null<int64_t>(t_ptr);
    table.t_edge = data_or_null<int64_t>(t_edge);
  }
  Tensor neighbors;
  OptionalTensor indptr, t_ptr, t_edge;
  NeighborTable table;
};

// Edge values as the kernels read them: contiguous float32.
Tensor edge_values(const Tensor& t, const Tensor& neighbors, const char* name) {
  STD_TORCH_CHECK(t.numel() == neighbors.numel() && t.dim() == neighbors.dim(), name, " must have the shape of neighbors");
  same_device(t, neighbors, name);
  const Tensor contiguous = torch::stable::contiguous(t);
  return t.scalar_type() == ScalarType::Float ? contiguous : torch::stable::to(contiguous, ScalarType::Float);
}

Tensor like_edges(const Tensor& neighbors) {
  return torch::stable::new_empty(neighbors, neighbors.sizes(), ScalarType::Float);
}

// A gradient of edge values in the type that the values came in.
Tensor as_type_of(const Tensor& gradient, const Tensor& values) {
  return values.scalar_type() == ScalarType::Float ? gradient : torch::stable::to(gradient, values.scalar_type());
}

Heads rows(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), 0}; }

Heads heads(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1)}; }

Tensor like(const Tensor& t, const Tensor& as, const char* name) {
  STD_TORCH_CHECK(t.dim() == as.dim(), name, " must have ", as.dim(), " dimensions, got ", t.dim());
  for (int64_t d = 0; d < as.dim(); ++d) {
    STD_TORCH_CHECK(t.size(d) == as.size(d), name, " must have size ", as.size(d), " in dimension ", d, ", got ",
                    t.size(d));
  }
  check_type(t, as.scalar_type(), name);
  same_device(t, as, name);
  return inner_contiguous(t);
}

Tensor scalar(const Tensor& t, const Tensor& features, const char* name) {
  STD_TORCH_CHECK(t.numel() == 1, name, " must have one element, got ", t.numel());
  check_type(t, ScalarType::Float, name);
  same_device(t, features, name);
  return t;
}

// Gives the arguments their workspace and launches.
template <class A>
void launch(const OnDevice& device, const Tensor& features, A& arguments, int64_t (*size)(const A&),
            int (*function)(const A&, const Launch&)) {
  Tensor workspace = new_workspace(features, size(arguments));
  arguments.workspace = workspace.mutable_data_ptr();
  check_launch(function(arguments, device.launch()));
}

std::tuple<Tensor, Tensor> graph_transpose(const Tensor& neighbors_any, const OptionalTensor& indptr_any,
                                           int64_t num_nodes) {
  const OnDevice device(neighbors_any);
  check_type(neighbors_any, ScalarType::Int, "neighbors");
  STD_TORCH_CHECK(num_nodes >= 0 && num_nodes <= INT32_MAX, "num_nodes must lie in [0, 2^31), got ", num_nodes);
  const Tensor neighbors = torch::stable::contiguous(neighbors_any);
  const OptionalTensor indptr = contiguous_like(indptr_any, neighbors, {num_nodes + 1}, ScalarType::Long, "indptr");
  Tensor t_ptr = new_tensor(neighbors, {num_nodes + 1}, ScalarType::Long);
  Tensor t_edge = new_tensor(neighbors, {neighbors.numel()}, ScalarType::Long);
  GraphTranspose a{neighbors.const_data_ptr<int32_t>(),
                   data_or_null<int64_t>(indptr),
                   neighbors.numel(),
                   num_nodes,
                   t_ptr.mutable_data_ptr<int64_t>(),
                   t_edge.mutable_data_ptr<int64_t>(),
                   nullptr};
  launch(device, neighbors, a, graph_transpose_workspace, cuda::graph_transpose);
  return {t_ptr, t_edge};
}

Tensor edge_cosine(const Tensor& r_any, const Tensor& neighbors, const OptionalTensor& indptr,
                   const OptionalTensor& /*t_ptr*/, const OptionalTensor& /*t_edge*/) {
  const OnDevice device(r_any);
  check_shape(r_any, {-1, -1}, "r");
  const Tensor r = inner_contiguous(r_any);
  const DeviceGraph graph(neighbors, indptr, r);
  Tensor cosine = like_edges(graph.neighbors);
  EdgeCosineForward a{graph.table, r.size(1), storage_type(r, "r"), rows(r), cosine.mutable_data_ptr<float>(), nullptr};
  launch(device, r, a, edge_cosine_forward_workspace, edge_cosine_forward);
  return cosine;
}

Tensor edge_cosine_backward(const Tensor& d_cos, const Tensor& r_any, const Tensor& neighbors,
                            const OptionalTensor& indptr, const Tensor& t_ptr, const Tensor& t_edge) {
  const OnDevice device(r_any);
  check_shape(r_any, {-1, -1}, "r");
  const Tensor r = inner_contiguous(r_any);
  const DeviceGraph graph(neighbors, indptr, r, t_ptr, t_edge);
  const Tensor d_cosine = edge_values(d_cos, graph.neighbors, "d_cos");
  Tensor dr = new_tensor(r, {r.size(0), r.size(1)}, r.scalar_type());
  EdgeCosineBackward a{graph.table, r.size(1), storage_type(r, "r"), rows(r), d_cosine.const_data_ptr<float>(),
                       dr.mutable_data_ptr(), nullptr};
  launch(device, r, a, edge_cosine_backward_workspace, cuda::edge_cosine_backward);
  return dr;
}

Tensor neighbor_sum(const Tensor& x_any, const Tensor& weight_any, const Tensor& neighbors, const OptionalTensor& indptr,
                    const OptionalTensor& /*t_ptr*/, const OptionalTensor& /*t_edge*/) {
  const OnDevice device(x_any);
  check_shape(x_any, {-1, -1}, "x");
  const Tensor x = inner_contiguous(x_any);
  const DeviceGraph graph(neighbors, indptr, x);
  const Tensor weight = edge_values(weight_any, graph.neighbors, "weight");
  Tensor out = new_tensor(x, {x.size(0), x.size(1)}, x.scalar_type());
  NeighborSumForward a{graph.table, x.size(1), storage_type(x, "x"), rows(x), weight.const_data_ptr<float>(),
                       out.mutable_data_ptr(), nullptr};
  launch(device, x, a, neighbor_sum_forward_workspace, neighbor_sum_forward);
  return out;
}

std::tuple<Tensor, Tensor> neighbor_sum_backward(const Tensor& d_out_any, const Tensor& x_any, const Tensor& weight_any,
                                                 const Tensor& neighbors, const OptionalTensor& indptr,
                                                 const Tensor& t_ptr, const Tensor& t_edge) {
  const OnDevice device(x_any);
  check_shape(x_any, {-1, -1}, "x");
  const Tensor x = inner_contiguous(x_any), d_out = like(d_out_any, x, "d_out");
  const DeviceGraph graph(neighbors, indptr, x, t_ptr, t_edge);
  const Tensor weight = edge_values(weight_any, graph.neighbors, "weight");
  Tensor dx = new_tensor(x, {x.size(0), x.size(1)}, x.scalar_type());
  Tensor d_weight = like_edges(graph.neighbors);
  NeighborSumBackward a{graph.table,
                        x.size(1),
                        storage_type(x, "x"),
                        rows(x),
                        rows(d_out),
                        weight.const_data_ptr<float>(),
                        dx.mutable_data_ptr(),
                        d_weight.mutable_data_ptr<float>(),
                        nullptr};
  launch(device, x, a, neighbor_sum_backward_workspace, cuda::neighbor_sum_backward);
  return {dx, as_type_of(d_weight, weight_any)};
}

std::tuple<Tensor, Tensor> smoothness_energy(const Tensor& z_any, const Tensor& weight_any, const Tensor& neighbors,
                                             const OptionalTensor& indptr, const OptionalTensor& /*t_ptr*/,
                                             const OptionalTensor& /*t_edge*/) {
  const OnDevice device(z_any);
  check_shape(z_any, {-1, -1}, "z");
  const Tensor z = inner_contiguous(z_any);
  const DeviceGraph graph(neighbors, indptr, z);
  const Tensor weight = edge_values(weight_any, graph.neighbors, "weight");
  Tensor energy = new_tensor(z, {}, ScalarType::Float), weight_sum = new_tensor(z, {}, ScalarType::Float);
  SmoothnessForward a{graph.table,
                      z.size(1),
                      storage_type(z, "z"),
                      rows(z),
                      weight.const_data_ptr<float>(),
                      energy.mutable_data_ptr<float>(),
                      weight_sum.mutable_data_ptr<float>(),
                      nullptr};
  launch(device, z, a, smoothness_forward_workspace, smoothness_forward);
  return {energy, weight_sum};
}

std::tuple<Tensor, Tensor> smoothness_energy_backward(const Tensor& d_energy_any, const Tensor& z_any,
                                                      const Tensor& weight_any, const Tensor& neighbors,
                                                      const OptionalTensor& indptr, const Tensor& t_ptr,
                                                      const Tensor& t_edge, const Tensor& energy_any,
                                                      const Tensor& weight_sum_any) {
  const OnDevice device(z_any);
  check_shape(z_any, {-1, -1}, "z");
  const Tensor z = inner_contiguous(z_any);
  const Tensor d_energy = scalar(d_energy_any, z, "d_energy"), energy = scalar(energy_any, z, "energy");
  const Tensor weight_sum = scalar(weight_sum_any, z, "weight_sum");
  const DeviceGraph graph(neighbors, indptr, z, t_ptr, t_edge);
  const Tensor weight = edge_values(weight_any, graph.neighbors, "weight");
  Tensor dz = new_tensor(z, {z.size(0), z.size(1)}, z.scalar_type());
  Tensor d_weight = like_edges(graph.neighbors);
  SmoothnessBackward a{graph.table,
                       z.size(1),
                       storage_type(z, "z"),
                       rows(z),
                       weight.const_data_ptr<float>(),
                       d_energy.const_data_ptr<float>(),
                       energy.const_data_ptr<float>(),
                       weight_sum.const_data_ptr<float>(),
                       dz.mutable_data_ptr(),
                       d_weight.mutable_data_ptr<float>(),
                       nullptr};
  launch(device, z, a, smoothness_backward_workspace, smoothness_backward);
  return {dz, as_type_of(d_weight, weight_any)};
}

std::tuple<Tensor, Tensor> neighbor_attention(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any,
                                              const OptionalTensor& log_weight_any, const Tensor& neighbors,
                                              const OptionalTensor& indptr, const OptionalTensor& /*t_ptr*/,
                                              const OptionalTensor& /*t_edge*/, bool self_loop) {
  const OnDevice device(q_any);
  check_shape(q_any, {-1, -1, -1}, "q");
  const Tensor q = inner_contiguous(q_any), k = like(k_any, q, "k"), v = like(v_any, q, "v");
  const DeviceGraph graph(neighbors, indptr, q);
  OptionalTensor log_weight;
  if (log_weight_any.has_value()) {
    log_weight = edge_values(*log_weight_any, graph.neighbors, "log_weight");
  }
  Tensor out = new_tensor(q, {q.size(0), q.size(1), q.size(2)}, q.scalar_type());
  Tensor lse = new_tensor(q, {q.size(0), q.size(1)}, ScalarType::Float);
  NeighborAttentionForward a{graph.table,
                             q.size(1),
                             q.size(2),
                             storage_type(q, "q"),
                             heads(q),
                             heads(k),
                             heads(v),
                             data_or_null<float>(log_weight),
                             self_loop,
                             out.mutable_data_ptr(),
                             lse.mutable_data_ptr<float>(),
                             nullptr};
  launch(device, q, a, neighbor_attention_forward_workspace, neighbor_attention_forward);
  return {out, lse};
}

// out and lse are not read: the softmax is found again from the scores, which keeps its digits.
std::tuple<Tensor, Tensor, Tensor, Tensor> neighbor_attention_backward(
    const Tensor& d_out_any, const Tensor& q_any, const Tensor& k_any, const Tensor& v_any,
    const OptionalTensor& log_weight_any, const Tensor& neighbors, const OptionalTensor& indptr, const Tensor& t_ptr,
    const Tensor& t_edge, bool self_loop, const Tensor& /*out*/, const Tensor& /*lse*/) {
  const OnDevice device(q_any);
  check_shape(q_any, {-1, -1, -1}, "q");
  const Tensor q = inner_contiguous(q_any), k = like(k_any, q, "k"), v = like(v_any, q, "v");
  const Tensor d_out = like(d_out_any, q, "d_out");
  const DeviceGraph graph(neighbors, indptr, q, t_ptr, t_edge);
  OptionalTensor log_weight;
  if (log_weight_any.has_value()) {
    log_weight = edge_values(*log_weight_any, graph.neighbors, "log_weight");
  }
  const auto like_q = [&] { return new_tensor(q, {q.size(0), q.size(1), q.size(2)}, q.scalar_type()); };
  Tensor dq = like_q(), dk = like_q(), dv = like_q(), d_log_weight = like_edges(graph.neighbors);
  NeighborAttentionBackward a{graph.table,
                              q.size(1),
                              q.size(2),
                              storage_type(q, "q"),
                              heads(d_out),
                              heads(q),
                              heads(k),
                              heads(v),
                              data_or_null<float>(log_weight),
                              self_loop,
                              dq.mutable_data_ptr(),
                              dk.mutable_data_ptr(),
                              dv.mutable_data_ptr(),
                              d_log_weight.mutable_data_ptr<float>(),
                              nullptr};
  launch(device, q, a, neighbor_attention_backward_workspace, cuda::neighbor_attention_backward);
  return {dq, dk, dv, log_weight_any.has_value() ? as_type_of(d_log_weight, *log_weight_any) : d_log_weight};
}

UMDA_CUDA_LIBRARY(m) {
  m.impl("graph_transpose", TORCH_BOX(&graph_transpose));
  m.impl("edge_cosine", TORCH_BOX(&edge_cosine));
  m.impl("edge_cosine_backward", TORCH_BOX(&edge_cosine_backward));
  m.impl("neighbor_attention", TORCH_BOX(&neighbor_attention));
  m.impl("neighbor_attention_backward", TORCH_BOX(&neighbor_attention_backward));
  m.impl("neighbor_sum", TORCH_BOX(&neighbor_sum));
  m.impl("neighbor_sum_backward", TORCH_BOX(&neighbor_sum_backward));
  m.impl("smoothness_energy", TORCH_BOX(&smoothness_energy));
  m.impl("smoothness_energy_backward", TORCH_BOX(&smoothness_energy_backward));
}

}  // namespace
}  // namespace umda::cuda
