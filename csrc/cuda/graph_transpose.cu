// The transpose of a neighbour graph: its edges by target, stable.
//
// A radix sort of (target, position) by 8 bits of the target at a time, lowest first, each pass a stable counting sort;
// absent edges have target `nodes` and come last. Traffic per pass: 4 bytes read for the counts, 12 read and 12 written
// per edge to move it; passes: 1 up to 255 nodes, 2 up to 65,535, 3 up to 16,777,215. No arithmetic to speak of.
//
// Counts are integers, so the order in which they are made does not show; positions follow from them alone.
//
// A symmetric graph whose rows ascend (CSR) is its own transpose, and needs no sort: for every edge the one back is found
// by bisection (reverse_edges). The first edge without one sets a flag; while it is not set the passes of the sort return
// at once. The host does not look at it, so nothing waits and a CUDA graph can hold both.
#include "cuda/device.h"
#include "cuda/neighbors.h"

namespace umda::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kDigits = 256;  // one thread for each
constexpr int kWarps = kThreads / kWarp;
constexpr int kTile = 4096;  // edges whose digits are counted together
static_assert(kDigits == kThreads);

// Edges as one pass finds them: as they came in the first, sorted by the lower digits in the others.
struct Source {
  const int32_t* neighbors;  // first pass, else null
  const uint32_t* keys;
  const int64_t* positions;
  int64_t edges, nodes;

  __device__ __forceinline__ uint32_t key(int64_t i) const {
    if (neighbors == nullptr) {
      return keys[i];
    }
    const int32_t target = neighbors[i];
    return static_cast<uint32_t>(target >= 0 && target < nodes ? target : nodes);
  }
  __device__ __forceinline__ int64_t position(int64_t i) const { return neighbors == nullptr ? positions[i] : i; }
};

// Set where the graph is not symmetric; null: not tried.
__device__ __forceinline__ bool done(const int* differs) { return differs != nullptr && *differs == 0; }

__global__ void __launch_bounds__(kThreads) clear_flag(int* differs) {
  if (first_thread() == 0) {
    *differs = 0;
  }
}

// t_edge of a symmetric graph whose rows ascend, each neighbour once. One thread per edge.
__global__ void __launch_bounds__(kThreads) reverse_edges(const GraphTranspose a, int* differs) {
  for (int64_t i = first_thread(); i < a.edges; i += num_threads()) {
    if (*static_cast<volatile int*>(differs) != 0) {
      return;
    }
    const int64_t row = find_segment(a.indptr, a.nodes, i);
    const int other = a.neighbors[i];
    bool found = other >= 0 && other < a.nodes && (i == 0 || i == a.indptr[row] || a.neighbors[i - 1] < other);
    if (found) {
      const int64_t end = smaller(a.indptr[other + 1], a.edges);
      int64_t low = larger<int64_t>(a.indptr[other], 0), high = end;
      while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (a.neighbors[middle] < row) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      found = low < end && a.neighbors[low] == row;
      if (found) {
        a.t_edge[i] = low;
      }
    }
    if (!found) {
      *differs = 1;  // whoever else writes here writes the same
      return;
    }
  }
}

__device__ __forceinline__ int digit_of(uint32_t key, int shift) { return static_cast<int>(key >> shift & (kDigits - 1)); }

// counts[digit, tile]. One block per tile.
__global__ void __launch_bounds__(kThreads)
    count_digits(const Source from, int shift, int64_t tiles, int64_t* counts, const int* differs) {
  if (done(differs)) {
    return;
  }
  UMDA_SHARED_ARRAY(int, histogram, kDigits);
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    histogram[thread] = 0;
    __syncthreads();
    const int64_t end = smaller((tile + 1) * kTile, from.edges);
    for (int64_t i = tile * kTile + thread; i < end; i += kThreads) {
      atomicAdd(&histogram[digit_of(from.key(i), shift)], 1);
    }
    __syncthreads();
    counts[thread * tiles + tile] = histogram[thread];
    __syncthreads();
  }
}

// Sum over the threads before this one; `total` over all of them. Both of `sums` may be used again after a barrier.
__device__ __forceinline__ int64_t sum_before(int64_t x, int64_t* sums, int64_t& total) {
  int64_t inclusive = x;
#pragma unroll
  for (unsigned offset = 1; offset < kWarp; offset *= 2) {
    const int64_t other = __shfl_up_sync(kFullWarp, inclusive, offset);
    inclusive += lane_id() >= static_cast<int>(offset) ? other : 0;
  }
  if (lane_id() == kWarp - 1) {
    sums[warp_id()] = inclusive;
  }
  __syncthreads();
  int64_t before = 0;
  total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    before += w < warp_id() ? sums[w] : 0;
    total += sums[w];
  }
  return before + inclusive - x;
}

// Replaces the counts of a digit by those of the tiles before, and sums them up. One block per digit.
__global__ void __launch_bounds__(kThreads)
    scan_tiles(int64_t tiles, int64_t* counts, int64_t* totals, const int* differs) {
  if (done(differs)) {
    return;
  }
  UMDA_SHARED_ARRAY(int64_t, sums, kWarps);
  for (int digit = static_cast<int>(blockIdx.x); digit < kDigits; digit += static_cast<int>(gridDim.x)) {
    int64_t before = 0;
    for (int64_t first = 0; first < tiles; first += kThreads) {
      const int64_t tile = first + threadIdx.x;
      const int64_t count = tile < tiles ? counts[digit * tiles + tile] : 0;
      int64_t total;
      const int64_t own = sum_before(count, sums, total);
      if (tile < tiles) {
        counts[digit * tiles + tile] = before + own;
      }
      before += total;
      __syncthreads();
    }
    if (threadIdx.x == 0) {
      totals[digit] = before;
    }
  }
}

// Lanes of the warp whose digit is the same; none for a digit of -1.
__device__ __forceinline__ unsigned lanes_with(int digit) {
  unsigned same = __ballot_sync(kFullWarp, digit >= 0);
#pragma unroll
  for (int bit = 1; bit < kDigits; bit *= 2) {
    const unsigned set = __ballot_sync(kFullWarp, (digit & bit) != 0);
    same &= (digit & bit) != 0 ? set : ~set;
  }
  return digit >= 0 ? same : 0;
}

// Moves every edge to its place. One block per tile, which it walks through in order, a thread per edge.
__global__ void __launch_bounds__(kThreads)
    move_edges(const Source from, int shift, int64_t tiles, const int64_t* counts, const int64_t* totals, uint32_t* keys,
               int64_t* positions, const int* differs) {
  if (done(differs)) {
    return;
  }
  UMDA_SHARED_ARRAY(int64_t, sums, kWarps);
  UMDA_SHARED_ARRAY(int64_t, next, kDigits);               // place of the digit's next edge
  UMDA_SHARED_ARRAY(int, per_warp, kWarps * kDigits);  // edges of each digit, this round
  const int thread = static_cast<int>(threadIdx.x), lane = lane_id(), warp = warp_id();
  int64_t all;
  const int64_t first_place = sum_before(totals[thread], sums, all);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    next[thread] = first_place + counts[thread * tiles + tile];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      per_warp[w * kDigits + thread] = 0;
    }
    __syncthreads();
    const int64_t end = smaller((tile + 1) * kTile, from.edges);
    for (int64_t first = tile * kTile; first < end; first += kThreads) {
      const int64_t i = first + thread;
      const uint32_t key = i < end ? from.key(i) : 0;
      const int digit = i < end ? digit_of(key, shift) : -1;
      const unsigned same = lanes_with(digit);
      const int rank = __popc(same & ((1u << lane) - 1));
      if (digit >= 0 && rank == 0) {
        per_warp[warp * kDigits + digit] = __popc(same);
      }
      __syncthreads();
      if (digit >= 0) {
        int64_t place = next[digit] + rank;
        for (int w = 0; w < warp; ++w) {
          place += per_warp[w * kDigits + digit];
        }
        keys[place] = key;
        positions[place] = from.position(i);
      }
      __syncthreads();
      int count = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        count += per_warp[w * kDigits + thread];
        per_warp[w * kDigits + thread] = 0;
      }
      next[thread] += count;
      __syncthreads();
    }
  }
}

// t_ptr from the sorted targets, and -1 for the edges that are absent; of a symmetric graph, indptr.
__global__ void __launch_bounds__(kThreads) finish(const uint32_t* keys, const GraphTranspose a, const int* differs) {
  if (done(differs)) {
    for (int64_t i = first_thread(); i <= a.nodes; i += num_threads()) {
      a.t_ptr[i] = a.indptr[i];
    }
    return;
  }
  for (int64_t i = first_thread(); i < larger(a.edges, a.nodes + 1); i += num_threads()) {
    if (i <= a.nodes) {
      int64_t low = 0, high = a.edges;
      while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (keys[middle] < static_cast<uint32_t>(i)) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      a.t_ptr[i] = low;
    }
    if (i < a.edges && keys[i] == static_cast<uint32_t>(a.nodes)) {
      a.t_edge[i] = -1;
    }
  }
}

struct Space {
  Space(const GraphTranspose& a, void* base) : space(base), tiles(divide_up(a.edges, kTile)) {
    keys[0] = space.take<uint32_t>(a.edges);
    keys[1] = space.take<uint32_t>(a.edges);
    positions = space.take<int64_t>(a.edges);
    counts = space.take<int64_t>(kDigits * tiles);
    totals = space.take<int64_t>(kDigits);
    differs = a.indptr != nullptr && a.edges > 0 && a.nodes > 0 ? space.take<int>(1) : nullptr;
  }
  Workspace space;
  int64_t tiles;
  uint32_t* keys[2];
  int64_t *positions, *counts, *totals;
  int* differs;
};

}  // namespace

int64_t graph_transpose_workspace(const GraphTranspose& a) { return Space(a, nullptr).space.size(); }

int graph_transpose(const GraphTranspose& a, const Launch& launch) {
  const Space space(a, a.workspace);
  int passes = 1;
  while (a.nodes >> 8 * passes != 0) {
    ++passes;
  }
  if (space.differs != nullptr) {
    run(launch, clear_flag, 1, 1, kThreads, 0, space.differs);
    run(launch, reverse_edges, a.edges, kThreads, kThreads, 0, a, space.differs);
  }
  // By turns into the workspace and t_edge, so that the last pass ends in t_edge.
  const uint32_t* keys = nullptr;
  const int64_t* positions = nullptr;
  for (int pass = 0; pass < passes && a.edges > 0; ++pass) {
    const int shift = 8 * pass;
    const Source from{pass == 0 ? a.neighbors : nullptr, keys, positions, a.edges, a.nodes};
    uint32_t* const to_keys = space.keys[pass % 2];
    int64_t* const to_positions = (passes - pass) % 2 == 1 ? a.t_edge : space.positions;
    run(launch, count_digits, space.tiles, 1, kThreads, 0, from, shift, space.tiles, space.counts,
        space.differs);
    run(launch, scan_tiles, kDigits, 1, kThreads, 0, space.tiles, space.counts, space.totals, space.differs);
    run(launch, move_edges, space.tiles, 1, kThreads, 0, from, shift, space.tiles, space.counts, space.totals, to_keys,
        to_positions, space.differs);
    keys = to_keys;
    positions = to_positions;
  }
  run(launch, finish, larger(a.edges, a.nodes + 1), kThreads, kThreads, 0, keys, a, space.differs);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace umda::cuda
