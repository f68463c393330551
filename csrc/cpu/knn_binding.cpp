#include "cpu/knn.h"

#include <string>

#include "cpu/binding.h"

namespace umda {
namespace {

std::tuple<Tensor, Tensor> knn(const Tensor& x_any, const Tensor& ptr, int64_t k, const std::string& metric) {
  check_shape(x_any, {-1, -1}, "x");
  STD_TORCH_CHECK(x_any.size(1) >= 1, "x must have at least one column");
  check_ptr(ptr, x_any.size(0), "ptr");
  STD_TORCH_CHECK(k >= 1, "k must be at least 1, got ", k);
  STD_TORCH_CHECK(metric == "cosine" || metric == "euclidean", "metric must be 'cosine' or 'euclidean', got '", metric,
                  "'");
  STD_TORCH_CHECK(x_any.size(0) < (int64_t{1} << 31), "x must have fewer than 2^31 rows, got ", x_any.size(0));
  const Tensor x = inner_contiguous(x_any);
  const int64_t instances = x.size(0);
  Tensor neighbors = new_tensor(x, {instances, k}, ScalarType::Int);
  Tensor similarity = new_tensor(x, {instances, k}, ScalarType::Float);
  const KnnArguments arguments{ptr.size(0) - 1,
                               instances,
                               x.size(1),
                               ptr.const_data_ptr<int64_t>(),
                               x.const_data_ptr(),
                               x.stride(0),
                               storage_type(x, "x"),
                               k,
                               metric == "euclidean",
                               neighbors.mutable_data_ptr<int32_t>(),
                               similarity.mutable_data_ptr<float>()};
  UMDA_CALL_KERNEL(knn, arguments);
  return {neighbors, similarity};
}

STABLE_TORCH_LIBRARY_IMPL(umda_fast, CPU, m) { m.impl("knn", TORCH_BOX(&knn)); }

}  // namespace
}  // namespace umda
