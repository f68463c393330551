#include "parallel.h"

#include <torch/csrc/stable/ops.h>

namespace umda {

void run_ranges(int64_t count, int64_t grain, RangeFunction f, void* context) {
  if (count > 0) {
    torch::stable::parallel_for(
        0, count, grain, [f, context](int64_t begin, int64_t end) { f(begin, end, context); });
  }
}

int64_t num_threads() { return static_cast<int64_t>(torch::stable::get_num_threads()); }

int64_t next_item(int64_t* counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED); }

}  // namespace umda
