#include "cpu/neighbors.h"

#include "cpu/binding.h"

namespace umda {
namespace {

NeighborTable make_table(const Tensor& neighbors, const OptionalTensor& indptr, int64_t nodes) {
  check_type(neighbors, ScalarType::Int, "neighbors");
  STD_TORCH_CHECK(neighbors.is_contiguous(), "neighbors must be contiguous");
  STD_TORCH_CHECK(nodes <= INT32_MAX, "a graph has at most 2^31 - 1 nodes, got ", nodes);
  NeighborTable g{};
  g.nodes = nodes;
  g.edges = neighbors.numel();
  g.neighbors = neighbors.const_data_ptr<int32_t>();
  if (indptr.has_value()) {
    check_shape(neighbors, {-1}, "neighbors");
    check_shape(*indptr, {nodes + 1}, "indptr");
    check_ptr(*indptr, g.edges, "indptr");
    g.indptr = indptr->const_data_ptr<int64_t>();
  } else {
    check_shape(neighbors, {nodes, -1}, "neighbors");
    g.degree = neighbors.size(1);
  }
  return g;
}

// With the transpose, for the backward kernels.
NeighborTable make_table(const Tensor& neighbors, const OptionalTensor& indptr, int64_t nodes, const Tensor& t_ptr,
                         const Tensor& t_edge) {
  NeighborTable g = make_table(neighbors, indptr, nodes);
  check_type(t_edge, ScalarType::Long, "t_edge");
  check_shape(t_edge, {g.edges}, "t_edge");
  STD_TORCH_CHECK(t_edge.is_contiguous(), "t_edge must be contiguous");
  check_type(t_ptr, ScalarType::Long, "t_ptr");
  check_shape(t_ptr, {nodes + 1}, "t_ptr");
  STD_TORCH_CHECK(t_ptr.is_contiguous(), "t_ptr must be contiguous");
  g.t_ptr = t_ptr.const_data_ptr<int64_t>();
  const int64_t used = g.t_ptr[nodes];
  STD_TORCH_CHECK(used >= 0 && used <= g.edges, "t_ptr must end within t_edge, got ", used);
  check_ptr(t_ptr, used, "t_ptr");
  g.t_edge = t_edge.const_data_ptr<int64_t>();
  return g;
}

void check_transpose(bool valid) { STD_TORCH_CHECK(valid, "t_edge holds a position outside neighbors"); }

// Edge values as the kernels read them: contiguous float32.
Tensor edge_values(const Tensor& t, const Tensor& neighbors, const char* name) {
  STD_TORCH_CHECK(t.numel() == neighbors.numel() && t.dim() == neighbors.dim(), name, " must have the shape of neighbors");
  const Tensor contiguous = torch::stable::contiguous(t);
  return t.scalar_type() == ScalarType::Float ? contiguous : torch::stable::to(contiguous, ScalarType::Float);
}

Tensor like_edges(const Tensor& neighbors) { return torch::stable::new_empty(neighbors, neighbors.sizes(), ScalarType::Float); }

// A gradient of edge values in the type that the values came in.
Tensor as_type_of(const Tensor& gradient, const Tensor& values) {
  return values.scalar_type() == ScalarType::Float ? gradient : torch::stable::to(gradient, values.scalar_type());
}

Rows rows(const Tensor& t) { return {t.const_data_ptr(), t.stride(0)}; }

// [nodes, heads, width] as rows of heads * width: a copy unless the last two dimensions are contiguous.
Tensor packed_heads(const Tensor& t) {
  const bool inner = t.size(2) <= 1 || t.stride(2) == 1;
  const bool outer = t.size(1) <= 1 || t.stride(1) == t.size(2);
  return inner && outer ? t : torch::stable::contiguous(t);
}

// float32 scalar argument, whatever holds it.
float scalar(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.numel() == 1, name, " must have one element, got ", t.numel());
  check_type(t, ScalarType::Float, name);
  return *t.const_data_ptr<float>();
}

std::tuple<Tensor, Tensor> graph_transpose(const Tensor& neighbors, const OptionalTensor& indptr, int64_t num_nodes) {
  STD_TORCH_CHECK(num_nodes >= 0, "num_nodes must not be negative, got ", num_nodes);
  const Tensor table = torch::stable::contiguous(neighbors);
  Tensor t_ptr = new_tensor(table, {num_nodes + 1}, ScalarType::Long);
  Tensor t_edge = new_tensor(table, {table.numel()}, ScalarType::Long);
  UMDA_CALL_KERNEL(graph_transpose, make_table(table, indptr, num_nodes), t_ptr.mutable_data_ptr<int64_t>(),
                   t_edge.mutable_data_ptr<int64_t>());
  return {t_ptr, t_edge};
}

Tensor graph_order(const Tensor& neighbors, const OptionalTensor& indptr, const Tensor& t_ptr, const Tensor& t_edge) {
  const Tensor table = torch::stable::contiguous(neighbors);
  const NeighborTable g = make_table(table, indptr, t_ptr.numel() - 1, t_ptr, t_edge);
  Tensor order = new_tensor(table, {g.nodes}, ScalarType::Long);
  check_transpose(UMDA_CALL_KERNEL(graph_order, g, order.mutable_data_ptr<int64_t>()));
  return order;
}

Tensor edge_cosine(const Tensor& r_any, const Tensor& neighbors_any, const OptionalTensor& indptr,
                   const OptionalTensor& /*t_ptr*/, const OptionalTensor& /*t_edge*/) {
  check_shape(r_any, {-1, -1}, "r");
  const Tensor r = inner_contiguous(r_any), neighbors = torch::stable::contiguous(neighbors_any);
  Tensor cosine = like_edges(neighbors);
  const EdgeCosineForward arguments{make_table(neighbors, indptr, r.size(0)), r.size(1), storage_type(r, "r"), rows(r),
                                    cosine.mutable_data_ptr<float>()};
  UMDA_CALL_KERNEL(edge_cosine_forward, arguments);
  return cosine;
}

Tensor edge_cosine_backward(const Tensor& d_cos, const Tensor& r_any, const Tensor& neighbors_any,
                            const OptionalTensor& indptr, const Tensor& t_ptr, const Tensor& t_edge) {
  check_shape(r_any, {-1, -1}, "r");
  const Tensor r = inner_contiguous(r_any), neighbors = torch::stable::contiguous(neighbors_any);
  const Tensor d_cosine = edge_values(d_cos, neighbors, "d_cos");
  Tensor dr = new_tensor(r, {r.size(0), r.size(1)}, r.scalar_type());
  const EdgeCosineBackward arguments{make_table(neighbors, indptr, r.size(0), t_ptr, t_edge),
                                     r.size(1),
                                     storage_type(r, "r"),
                                     rows(r),
                                     d_cosine.const_data_ptr<float>(),
                                     dr.mutable_data_ptr()};
  check_transpose(UMDA_CALL_KERNEL(edge_cosine_backward, arguments));
  return dr;
}

Tensor neighbor_sum(const Tensor& x_any, const Tensor& weight_any, const Tensor& neighbors_any,
                    const OptionalTensor& indptr, const OptionalTensor& /*t_ptr*/, const OptionalTensor& /*t_edge*/) {
  check_shape(x_any, {-1, -1}, "x");
  const Tensor x = inner_contiguous(x_any), neighbors = torch::stable::contiguous(neighbors_any);
  const Tensor weight = edge_values(weight_any, neighbors, "weight");
  Tensor out = new_tensor(x, {x.size(0), x.size(1)}, x.scalar_type());
  const NeighborSumForward arguments{make_table(neighbors, indptr, x.size(0)),
                                     x.size(1),
                                     storage_type(x, "x"),
                                     rows(x),
                                     weight.const_data_ptr<float>(),
                                     out.mutable_data_ptr()};
  UMDA_CALL_KERNEL(neighbor_sum_forward, arguments);
  return out;
}

std::tuple<Tensor, Tensor> neighbor_sum_backward(const Tensor& d_out_any, const Tensor& x_any, const Tensor& weight_any,
                                                 const Tensor& neighbors_any, const OptionalTensor& indptr,
                                                 const Tensor& t_ptr, const Tensor& t_edge) {
  check_shape(x_any, {-1, -1}, "x");
  check_shape(d_out_any, {x_any.size(0), x_any.size(1)}, "d_out");
  check_type(d_out_any, x_any.scalar_type(), "d_out");
  const Tensor x = inner_contiguous(x_any), d_out = inner_contiguous(d_out_any);
  const Tensor neighbors = torch::stable::contiguous(neighbors_any);
  const Tensor weight = edge_values(weight_any, neighbors, "weight");
  Tensor dx = new_tensor(x, {x.size(0), x.size(1)}, x.scalar_type());
  Tensor d_weight = like_edges(neighbors);
  const NeighborSumBackward arguments{make_table(neighbors, indptr, x.size(0), t_ptr, t_edge),
                                      x.size(1),
                                      storage_type(x, "x"),
                                      rows(x),
                                      rows(d_out),
                                      weight.const_data_ptr<float>(),
                                      dx.mutable_data_ptr(),
                                      d_weight.mutable_data_ptr<float>()};
  check_transpose(UMDA_CALL_KERNEL(neighbor_sum_backward, arguments));
  return {dx, as_type_of(d_weight, weight_any)};
}

std::tuple<Tensor, Tensor> smoothness_energy(const Tensor& z_any, const Tensor& weight_any, const Tensor& neighbors_any,
                                             const OptionalTensor& indptr, const OptionalTensor& /*t_ptr*/,
                                             const OptionalTensor& /*t_edge*/) {
  check_shape(z_any, {-1, -1}, "z");
  const Tensor z = inner_contiguous(z_any), neighbors = torch::stable::contiguous(neighbors_any);
  const Tensor weight = edge_values(weight_any, neighbors, "weight");
  Tensor energy = new_tensor(z, {}, ScalarType::Float), weight_sum = new_tensor(z, {}, ScalarType::Float);
  const SmoothnessForward arguments{make_table(neighbors, indptr, z.size(0)),
                                    z.size(1),
                                    storage_type(z, "z"),
                                    rows(z),
                                    weight.const_data_ptr<float>(),
                                    energy.mutable_data_ptr<float>(),
                                    weight_sum.mutable_data_ptr<float>()};
  UMDA_CALL_KERNEL(smoothness_forward, arguments);
  return {energy, weight_sum};
}

std::tuple<Tensor, Tensor> smoothness_energy_backward(const Tensor& d_energy, const Tensor& z_any,
                                                      const Tensor& weight_any, const Tensor& neighbors_any,
                                                      const OptionalTensor& indptr, const Tensor& t_ptr,
                                                      const Tensor& t_edge, const Tensor& energy,
                                                      const Tensor& weight_sum) {
  check_shape(z_any, {-1, -1}, "z");
  const Tensor z = inner_contiguous(z_any), neighbors = torch::stable::contiguous(neighbors_any);
  const Tensor weight = edge_values(weight_any, neighbors, "weight");
  Tensor dz = new_tensor(z, {z.size(0), z.size(1)}, z.scalar_type());
  Tensor d_weight = like_edges(neighbors);
  const SmoothnessBackward arguments{make_table(neighbors, indptr, z.size(0), t_ptr, t_edge),
                                     z.size(1),
                                     storage_type(z, "z"),
                                     rows(z),
                                     weight.const_data_ptr<float>(),
                                     scalar(d_energy, "d_energy"),
                                     scalar(energy, "energy"),
                                     scalar(weight_sum, "weight_sum"),
                                     dz.mutable_data_ptr(),
                                     d_weight.mutable_data_ptr<float>()};
  check_transpose(UMDA_CALL_KERNEL(smoothness_backward, arguments));
  return {dz, as_type_of(d_weight, weight_any)};
}

void check_heads(const Tensor& t, const Tensor& q, const char* name) {
  check_shape(t, {q.size(0), q.size(1), q.size(2)}, name);
  check_type(t, q.scalar_type(), name);
}

std::tuple<Tensor, Tensor> neighbor_attention(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any,
                                              const OptionalTensor& log_weight_any, const Tensor& neighbors_any,
                                              const OptionalTensor& indptr, const OptionalTensor& /*t_ptr*/,
                                              const OptionalTensor& /*t_edge*/, bool self_loop) {
  check_shape(q_any, {-1, -1, -1}, "q");
  check_heads(k_any, q_any, "k");
  check_heads(v_any, q_any, "v");
  const Tensor q = packed_heads(q_any), k = packed_heads(k_any), v = packed_heads(v_any);
  const Tensor neighbors = torch::stable::contiguous(neighbors_any);
  OptionalTensor log_weight;
  if (log_weight_any.has_value()) {
    log_weight = edge_values(*log_weight_any, neighbors, "log_weight");
  }
  Tensor out = new_tensor(q, {q.size(0), q.size(1), q.size(2)}, q.scalar_type());
  Tensor lse = new_tensor(q, {q.size(0), q.size(1)}, ScalarType::Float);
  const NeighborAttentionForward arguments{make_table(neighbors, indptr, q.size(0)),
                                           q.size(1),
                                           q.size(2),
                                           storage_type(q, "q"),
                                           rows(q),
                                           rows(k),
                                           rows(v),
                                           log_weight ? log_weight->const_data_ptr<float>() : nullptr,
                                           self_loop,
                                           out.mutable_data_ptr(),
                                           lse.mutable_data_ptr<float>()};
  UMDA_CALL_KERNEL(neighbor_attention_forward, arguments);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> neighbor_attention_backward(
    const Tensor& d_out_any, const Tensor& q_any, const Tensor& k_any, const Tensor& v_any,
    const OptionalTensor& log_weight_any, const Tensor& neighbors_any, const OptionalTensor& indptr,
    const Tensor& t_ptr, const Tensor& t_edge, bool self_loop, const Tensor& out_any, const Tensor& lse_any) {
  check_shape(q_any, {-1, -1, -1}, "q");
  check_heads(k_any, q_any, "k");
  check_heads(v_any, q_any, "v");
  check_heads(d_out_any, q_any, "d_out");
  check_heads(out_any, q_any, "out");
  check_shape(lse_any, {q_any.size(0), q_any.size(1)}, "lse");
  check_type(lse_any, ScalarType::Float, "lse");
  const Tensor q = packed_heads(q_any), k = packed_heads(k_any), v = packed_heads(v_any);
  const Tensor d_out = packed_heads(d_out_any), out = packed_heads(out_any);
  const Tensor lse = torch::stable::contiguous(lse_any), neighbors = torch::stable::contiguous(neighbors_any);
  OptionalTensor log_weight;
  if (log_weight_any.has_value()) {
    log_weight = edge_values(*log_weight_any, neighbors, "log_weight");
  }
  const auto like_q = [&] { return new_tensor(q, {q.size(0), q.size(1), q.size(2)}, q.scalar_type()); };
  Tensor dq = like_q(), dk = like_q(), dv = like_q(), d_log_weight = like_edges(neighbors);
  const NeighborAttentionBackward arguments{make_table(neighbors, indptr, q.size(0), t_ptr, t_edge),
                                            q.size(1),
                                            q.size(2),
                                            storage_type(q, "q"),
                                            rows(d_out),
                                            rows(q),
                                            rows(k),
                                            rows(v),
                                            rows(out),
                                            log_weight ? log_weight->const_data_ptr<float>() : nullptr,
                                            lse.const_data_ptr<float>(),
                                            self_loop,
                                            dq.mutable_data_ptr(),
                                            dk.mutable_data_ptr(),
                                            dv.mutable_data_ptr(),
                                            d_log_weight.mutable_data_ptr<float>()};
  check_transpose(UMDA_CALL_KERNEL(neighbor_attention_backward, arguments));
  return {dq, dk, dv, log_weight_any.has_value() ? as_type_of(d_log_weight, *log_weight_any) : d_log_weight};
}

STABLE_TORCH_LIBRARY_IMPL(umda_fast, CPU, m) {
  m.impl("graph_transpose", TORCH_BOX(&graph_transpose));
  m.impl("graph_order", TORCH_BOX(&graph_order));
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
}  // namespace umda
