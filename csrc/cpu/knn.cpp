// Exact k-nearest-neighbour graph inside ragged bags.
//
// Work: a bag of n instances has n(n-1)/2 pairs, each worth `width` multiply-adds, for a pair serves both of its
// instances (a library's search, which knows nothing of the symmetry, does n^2). Traffic is small beside it: a tile of
// 240 x 240 pairs reads 480 rows. So the floor is n^2 * width / 2 multiply-adds at the machine's rate.
//
// Rows are copied once into strips: kWidth rows side by side, component by component ([width][kWidth]). One layout
// serves both sides of a product: kRows rows of a strip, broadcast one by one, times three strips, held in registers
// for all components. Cosine: the rows are normalised on the way into the strips. Euclidean: differences are squared
// and summed, which costs the additions but keeps the digits that |x|^2 + |y|^2 - 2xy cancels, and makes the
// distance of equal rows 0.
//
// A similarity is summed over the components in one fixed order, wherever in a tile the pair lies and
// whichever of the two is the row: its bits depend on the two rows alone, so equal rows tie and ties can be broken by
// index. A candidate is one 64-bit key, similarity above and index below; the k largest keys are the same set in
// whatever order tiles are worked on, so the result does not depend on the threads.
//
// A bag is cut into blocks of rows and the pairs of blocks into items, handed out one by one. Finished similarities are
// compared, still in registers, with the k-th best of their row and of their column; few pass. Those enter a list of
// candidates that is cut back to the k best when it is full, at constant cost per candidate. While a thread works on an
// item it owns the lists of both blocks (a lock per block); items are ordered like the rounds of a tournament, in
// which all pairs of a round are disjoint, so threads hardly ever wait.
#include "knn.h"

#include <sched.h>

#include "parallel.h"
#include "scratch.h"
#include "simd.h"

namespace umda::UMDA_ISA {
namespace {

// Registers: kRows * kStrips sums, kStrips of the right side and a broadcast.
constexpr int kRows = kWidth == 16 ? 8 : 4;
constexpr int kStrips = 3;
constexpr int64_t kColumns = kStrips * kWidth;
constexpr int64_t kBlock = 240;  // rows of a block at most; a multiple of kColumns for every instruction set
// Bags are taken together up to so many rows (a larger bag alone), so that strips and candidates stay bounded.
constexpr int64_t kWave = 1 << 14;
// Components added in one chain; chains are added up in turn. The rounding error of one long chain would be a multiple
// of what a library's product makes.
constexpr int64_t kChain = 128;
constexpr double kNormEpsilon = 1e-8;  // as torch.nn.functional.cosine_similarity

static_assert(kBlock % kColumns == 0 && kWidth % kRows == 0);

struct Bag {
  int64_t begin, size;       // rows of x
  int64_t first_strip;       // in this wave
  int64_t rows_per_block, blocks;
  int64_t first_lock;        // -1: one block, no lock
  int64_t degree;            // neighbours of each of its instances
  int64_t capacity;          // candidates held per instance
  int64_t first_key;
};

// Items [first_item, ...): one for several small bags, or all pairs of blocks of a large one.
struct Unit {
  int64_t first_bag, last_bag, first_item;
};

// ---- keys ------------------------------------------------------------------------------------------------

// Larger key: larger similarity, then lower index. No key of a number is 0.
UMDA_INLINE uint64_t make_key(float similarity, int64_t index) {
  const uint32_t bits = float_bits(similarity + 0.0f);  // one zero only
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return (static_cast<uint64_t>(ordered) << 32) | (0xffffffffu - static_cast<uint32_t>(index));
}

UMDA_INLINE float key_similarity(uint64_t key) {
  const uint32_t ordered = static_cast<uint32_t>(key >> 32);
  return bits_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

UMDA_INLINE int64_t key_index(uint64_t key) { return 0xffffffffu - static_cast<uint32_t>(key); }

// Brings the `want` largest of the distinct keys a[0:count) to the front, in any order; returns the least of them.
uint64_t select_largest(uint64_t* a, int64_t count, int64_t want) {
  int64_t low = 0, high = count;
  while (low < want && want < high) {
    const uint64_t first = a[low], middle = a[low + (high - low) / 2], last = a[high - 1];
    // The median of the three, moved to the end.
    int64_t at = high - 1;
    if ((first < middle) == (middle < last)) {
      at = low + (high - low) / 2;
    } else if ((middle < first) == (first < last)) {
      at = low;
    }
    const uint64_t pivot = a[at];
    a[at] = last;
    a[high - 1] = pivot;
    int64_t split = low;
    for (int64_t i = low; i < high - 1; ++i) {
      const uint64_t key = a[i];
      a[i] = a[split];
      a[split] = key;
      split += key > pivot;
    }
    a[high - 1] = a[split];
    a[split] = pivot;
    if (split >= want) {
      high = split;
    } else {
      low = split + 1;
    }
  }
  uint64_t least = a[0];
  for (int64_t i = 1; i < want; ++i) {
    least = smaller(least, a[i]);
  }
  return least;
}

void sift_down(uint64_t* heap, int64_t from, int64_t count) {
  const uint64_t key = heap[from];
  for (int64_t child = 2 * from + 1; child < count; child = 2 * from + 1) {
    child += child + 1 < count && heap[child + 1] < heap[child];
    if (key <= heap[child]) {
      break;
    }
    heap[from] = heap[child];
    from = child;
  }
  heap[from] = key;
}

void sort_descending(uint64_t* a, int64_t count) {
  if (count <= 48) {
    for (int64_t i = 1; i < count; ++i) {
      const uint64_t key = a[i];
      int64_t to = i;
      for (; to > 0 && a[to - 1] < key; --to) {
        a[to] = a[to - 1];
      }
      a[to] = key;
    }
    return;
  }
  for (int64_t i = count / 2; i-- > 0;) {
    sift_down(a, i, count);
  }
  for (int64_t last = count - 1; last > 0; --last) {
    const uint64_t least = a[0];
    a[0] = a[last];
    a[last] = least;
    sift_down(a, 0, last);
  }
}

// ---- candidates ------------------------------------------------------------------------------------------

// Best candidates so far of every row of the strips of a wave, padding included.
struct Candidates {
  float* threshold;  // similarity of `limit`, -inf as long as everything is a candidate
  uint64_t* limit;   // a key must be larger to be one of the best
  int32_t* count;
  uint64_t* keys;  // capacity per row, see Bag
};

UMDA_INLINE void offer(const Candidates& c, const Bag& bag, int64_t row, float similarity, int64_t other) {
  const int64_t slot = bag.first_strip * kWidth + row;
  const uint64_t key = make_key(similarity, other);
  if (key <= c.limit[slot]) {
    return;
  }
  uint64_t* const keys = c.keys + bag.first_key + row * bag.capacity;
  int32_t count = c.count[slot];
  keys[count++] = key;
  if (count == bag.capacity && count > bag.degree) {
    const uint64_t limit = select_largest(keys, count, bag.degree);
    c.limit[slot] = limit;
    c.threshold[slot] = key_similarity(limit);
    count = static_cast<int32_t>(bag.degree);
  }
  c.count[slot] = count;
}

// A tile of similarities, rows from `row` on and columns from `column` on (both in the bag); NaN where there is no pair.
template <int kTileStrips>
__attribute__((noinline)) void offer_tile(const Candidates& c, const Bag& bag, const float* tile, int64_t row,
                                          int64_t column) {
  const float* const thresholds = c.threshold + bag.first_strip * kWidth;
  for (int r = 0; r < kRows; ++r) {
    for (int s = 0; s < kTileStrips; ++s) {
      const float* const values = tile + (r * kTileStrips + s) * kWidth;
      const int64_t first = column + s * kWidth;
      const Vec v = load(values);
      uint32_t for_row = at_least(v, splat(thresholds[row + r]));
      uint32_t for_column = at_least(v, load(thresholds + first));
      for (; for_row != 0; for_row &= for_row - 1) {
        const int lane = __builtin_ctz(for_row);
        offer(c, bag, row + r, values[lane], first + lane);
      }
      for (; for_column != 0; for_column &= for_column - 1) {
        const int lane = __builtin_ctz(for_column);
        offer(c, bag, first + lane, values[lane], row + r);
      }
    }
  }
}

// Similarities of kRows rows, from `row` on, with kTileStrips strips, from `column` on.
template <bool kEuclidean, int kTileStrips>
UMDA_INLINE void tile(const Candidates& c, const Bag& bag, const float* strips, int64_t width, int64_t row,
                      int64_t column, bool on_diagonal) {
  const float* left = strips + (row / kWidth) * width * kWidth + row % kWidth;
  const float* right = strips + column * width;
  alignas(64) float values[kRows * kTileStrips * kWidth];
  Vec sums[kRows][kTileStrips];
  for (int64_t begin = 0; begin < width; begin += kChain) {
    for (int r = 0; r < kRows; ++r) {
      for (int s = 0; s < kTileStrips; ++s) {
        sums[r][s] = zero();
      }
    }
    const int64_t count = smaller(kChain, width - begin);
    for (int64_t d = 0; d < count; ++d, left += kWidth, right += kWidth) {
      Vec columns[kTileStrips];
      for (int s = 0; s < kTileStrips; ++s) {
        columns[s] = load(right + s * width * kWidth);
      }
      for (int r = 0; r < kRows; ++r) {
        const Vec x = splat(left[r]);
        for (int s = 0; s < kTileStrips; ++s) {
          if constexpr (kEuclidean) {
            const Vec difference = columns[s] - x;
            sums[r][s] = fma(difference, difference, sums[r][s]);
          } else {
            sums[r][s] = fma(x, columns[s], sums[r][s]);
          }
        }
      }
    }
    if (begin > 0) {
      for (int r = 0; r < kRows; ++r) {
        for (int s = 0; s < kTileStrips; ++s) {
          sums[r][s] = load(values + (r * kTileStrips + s) * kWidth) + sums[r][s];
        }
      }
    }
    if (begin + kChain < width) {
      for (int r = 0; r < kRows; ++r) {
        for (int s = 0; s < kTileStrips; ++s) {
          store(values + (r * kTileStrips + s) * kWidth, sums[r][s]);
        }
      }
    }
  }
  const float* const thresholds = c.threshold + bag.first_strip * kWidth;
  uint32_t passed = on_diagonal;
  for (int s = 0; s < kTileStrips; ++s) {
    const Vec column_threshold = load(thresholds + column + s * kWidth);
    for (int r = 0; r < kRows; ++r) {
      if constexpr (kEuclidean) {
        sums[r][s] = zero() - sums[r][s];
      }
      passed |= at_least(sums[r][s], min(splat(thresholds[row + r]), column_threshold));
    }
  }
  if (passed == 0) {
    return;
  }
  for (int r = 0; r < kRows; ++r) {
    for (int s = 0; s < kTileStrips; ++s) {
      store(values + (r * kTileStrips + s) * kWidth, sums[r][s]);
    }
  }
  if (on_diagonal) {
    for (int r = 0; r < kRows; ++r) {
      for (int64_t j = 0; j < kTileStrips * kWidth && column + j <= row + r; ++j) {
        values[r * kTileStrips * kWidth + j] = __builtin_nanf("");
      }
    }
  }
  offer_tile<kTileStrips>(c, bag, values, row, column);
}

// All pairs of two blocks, or of one with itself.
template <bool kEuclidean>
void block_pair(const Candidates& c, const Bag& bag, const float* all_strips, int64_t width, int64_t row_block,
                int64_t column_block) {
  const float* const strips = all_strips + bag.first_strip * kWidth * width;
  const int64_t row_begin = row_block * bag.rows_per_block;
  const int64_t row_end = smaller(row_begin + bag.rows_per_block, bag.size);
  const int64_t column_begin = column_block * bag.rows_per_block;
  const int64_t column_end = smaller(column_begin + bag.rows_per_block, bag.size);
  for (int64_t column = column_begin; column < column_end; column += kColumns) {
    const int64_t strips_left = (column_end - column + kWidth - 1) / kWidth;
    // The last row that some column lies right of; past it, only pairs that were seen the other way round.
    const int64_t stop = row_block == column_block ? smaller(row_end, column + kColumns) : row_end;
    for (int64_t row = row_begin; row < stop; row += kRows) {
      const bool on_diagonal = column < row + kRows && row < column + kColumns;
      if (strips_left >= 3) {
        tile<kEuclidean, 3>(c, bag, strips, width, row, column, on_diagonal);
      } else if (strips_left == 2) {
        tile<kEuclidean, 2>(c, bag, strips, width, row, column, on_diagonal);
      } else {
        tile<kEuclidean, 1>(c, bag, strips, width, row, column, on_diagonal);
      }
    }
  }
}

// ---- rows to strips --------------------------------------------------------------------------------------

// 1 / norm, in double: squares of what float32 holds do not overflow or vanish there.
double inverse_norm(const float* row, int64_t width) {
  constexpr int kSums = 8;
  double sums[kSums] = {};
  int64_t d = 0;
  for (; d + kSums <= width; d += kSums) {
    for (int i = 0; i < kSums; ++i) {
      const double value = static_cast<double>(row[d + i]);
      sums[i] += value * value;
    }
  }
  for (; d < width; ++d) {
    const double value = static_cast<double>(row[d]);
    sums[0] += value * value;
  }
  double total = 0.0;
  for (int i = 0; i < kSums; ++i) {
    total += sums[i];
  }
  const double norm = __builtin_sqrt(total);
  return 1.0 / (norm < kNormEpsilon ? kNormEpsilon : norm);
}

// One strip: kWidth rows from `begin` on; what is missing is NaN, which no threshold lets through.
template <class X>
void fill_strip(const KnnArguments& a, int64_t begin, int64_t end, float* strip, float* row) {
  for (int r = 0; r < kWidth; ++r) {
    if (begin + r >= end) {
      for (int64_t d = 0; d < a.width; ++d) {
        strip[d * kWidth + r] = __builtin_nanf("");
      }
      continue;
    }
    const X* const from = static_cast<const X*>(a.x) + (begin + r) * a.x_stride;
    for (int64_t d = 0; d < a.width; d += kWidth) {
      const int count = static_cast<int>(smaller<int64_t>(kWidth, a.width - d));
      store(row + d, load(from + d, count), count);
    }
    if (!a.euclidean) {
      const double scale = inverse_norm(row, a.width);
      for (int64_t d = 0; d < a.width; ++d) {
        row[d] = static_cast<float>(static_cast<double>(row[d]) * scale);
      }
    }
    for (int64_t d = 0; d < a.width; ++d) {
      strip[d * kWidth + r] = row[d];
    }
  }
}

// ---- results ---------------------------------------------------------------------------------------------

void write_row(const KnnArguments& a, const Candidates& c, const Bag& bag, int64_t row) {
  int32_t* const neighbors = a.neighbors + (bag.begin + row) * a.k;
  float* const similarity = a.similarity + (bag.begin + row) * a.k;
  uint64_t* const keys = c.keys + bag.first_key + row * bag.capacity;
  int64_t count = c.count[bag.first_strip * kWidth + row];
  if (count > bag.degree) {
    select_largest(keys, count, bag.degree);
    count = bag.degree;
  }
  sort_descending(keys, count);
  int64_t filled = 0;
  for (; filled < count && key_similarity(keys[filled]) > -__builtin_inff(); ++filled) {
    neighbors[filled] = static_cast<int32_t>(bag.begin + key_index(keys[filled]));
    similarity[filled] = key_similarity(keys[filled]);
  }
  // Too few numbers: the similarities with all others are -inf, those that are left among the keys, or NaN. They come
  // last, and share the last place, so by index. (Any -inf that was cut off had a higher index than those kept.)
  const int64_t numbers = filled;
  for (int64_t other = 0; filled < bag.degree; ++other) {
    int64_t i = 0;
    while (i < count && key_index(keys[i]) != other) {
      ++i;
    }
    if (i >= numbers && other != row) {
      neighbors[filled] = static_cast<int32_t>(bag.begin + other);
      similarity[filled++] = i < count ? -__builtin_inff() : __builtin_nanf("");
    }
  }
  for (; filled < a.k; ++filled) {
    neighbors[filled] = -1;
    similarity[filled] = -__builtin_inff();
  }
}

// ---- threads ---------------------------------------------------------------------------------------------

void lock(int32_t* flag) {
  while (__atomic_exchange_n(flag, 1, __ATOMIC_ACQUIRE) != 0) {
    while (__atomic_load_n(flag, __ATOMIC_RELAXED) != 0) {
      sched_yield();
    }
  }
}

void unlock(int32_t* flag) { __atomic_store_n(flag, 0, __ATOMIC_RELEASE); }

struct BlockPair {
  int64_t row, column;
};

// Pair `item` of n blocks: each with itself, then the rounds of a tournament by the circle method (m blocks turn,
// one stands still or sits out). row <= column.
BlockPair pair_of(int64_t item, int64_t n) {
  if (item < n) {
    return {item, item};
  }
  const int64_t per_round = n / 2, m = n % 2 == 1 ? n : n - 1;
  const int64_t round = (item - n) / per_round, place = (item - n) % per_round;
  int64_t first, second;
  if (n % 2 == 0 && place == 0) {
    first = round;
    second = n - 1;
  } else {
    const int64_t distance = n % 2 == 0 ? place : place + 1;
    first = (round + distance) % m;
    second = (round - distance + m) % m;
  }
  return first < second ? BlockPair{first, second} : BlockPair{second, first};
}

int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

template <class X>
void run_wave(const KnnArguments& a, int64_t first_bag, int64_t last_bag) {
  const Scratch<Bag> bags(last_bag - first_bag);
  const Scratch<Unit> units(last_bag - first_bag);
  const int64_t threads = num_threads();
  int64_t num_bags = 0, num_strips = 0, num_keys = 0, num_locks = 0, num_items = 0, num_units = 0;
  int64_t open_pairs = -1;  // pairs in the open unit of small bags, -1: none is open
  for (int64_t b = first_bag; b < last_bag; ++b) {
    const int64_t begin = a.ptr[b], n = a.ptr[b + 1] - begin;
    if (n == 0) {
      continue;
    }
    Bag bag{begin, n, num_strips, kBlock, 1, -1, smaller(a.k, n - 1), 0, num_keys};
    if (n > kBlock) {
      // Blocks enough that every thread finds a pair of free ones.
      bag.rows_per_block = smaller(kBlock, round_up((n + 4 * threads - 1) / (4 * threads), kColumns));
      bag.blocks = (n + bag.rows_per_block - 1) / bag.rows_per_block;
      bag.first_lock = num_locks;
      num_locks += bag.blocks;
    }
    // Twice as many as are wanted, so that cutting back costs little per candidate.
    bag.capacity = smaller(bag.degree + larger<int64_t>(bag.degree, 16), larger<int64_t>(n - 1, 1));
    num_keys += n * bag.capacity;
    num_strips += (n + kWidth - 1) / kWidth;
    if (bag.blocks > 1) {
      units[num_units++] = {num_bags, num_bags + 1, num_items};
      num_items += bag.blocks * (bag.blocks + 1) / 2;
      open_pairs = -1;
    } else {
      if (open_pairs < 0 || open_pairs > kBlock * kBlock / 2) {
        units[num_units++] = {num_bags, num_bags, num_items++};
        open_pairs = 0;
      }
      units[num_units - 1].last_bag = num_bags + 1;
      open_pairs += n * n / 2 + kColumns * kRows;
    }
    bags[num_bags++] = bag;
  }

  const int64_t slots = num_strips * kWidth;
  const Scratch<float> strips(slots * a.width);
  const Scratch<float> threshold(slots);
  const Scratch<uint64_t> limit(slots);
  const Scratch<int32_t> count(slots);
  const Scratch<uint64_t> keys(num_keys);
  const Scratch<int32_t> bag_of_strip(num_strips);
  const Scratch<int32_t> locks(num_locks);
  const Candidates candidates{threshold.data(), limit.data(), count.data(), keys.data()};
  __builtin_memset(locks.data(), 0, static_cast<size_t>(num_locks) * sizeof(int32_t));
  for (int64_t b = 0; b < num_bags; ++b) {
    const int64_t end = b + 1 < num_bags ? bags[b + 1].first_strip : num_strips;
    for (int64_t s = bags[b].first_strip; s < end; ++s) {
      bag_of_strip[s] = static_cast<int32_t>(b);
    }
  }

  parallel_ranges(num_strips, 16, [&](int64_t begin, int64_t end) {
    const Scratch<float> row(a.width);
    for (int64_t s = begin; s < end; ++s) {
      const Bag& bag = bags[bag_of_strip[s]];
      fill_strip<X>(a, bag.begin + (s - bag.first_strip) * kWidth, bag.begin + bag.size, &strips[s * kWidth * a.width],
                    row.data());
      for (int64_t slot = s * kWidth; slot < (s + 1) * kWidth; ++slot) {
        threshold[slot] = -__builtin_inff();
        limit[slot] = 0;
        count[slot] = 0;
      }
    }
  });

  const auto work = [&](const Bag& bag, int64_t row_block, int64_t column_block) {
    if (a.euclidean) {
      block_pair<true>(candidates, bag, strips.data(), a.width, row_block, column_block);
    } else {
      block_pair<false>(candidates, bag, strips.data(), a.width, row_block, column_block);
    }
  };
  parallel_items(num_items, [&](int64_t item) {
    int64_t low = 0, high = num_units;  // the unit that owns the item
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (units[middle].first_item <= item ? low : high) = middle;
    }
    const Unit& unit = units[low];
    const Bag& first = bags[unit.first_bag];
    if (first.blocks == 1) {
      for (int64_t b = unit.first_bag; b < unit.last_bag; ++b) {
        work(bags[b], 0, 0);
      }
      return;
    }
    const BlockPair pair = pair_of(item - unit.first_item, first.blocks);
    int32_t* const of_bag = &locks[first.first_lock];
    lock(of_bag + pair.row);
    if (pair.row != pair.column) {
      lock(of_bag + pair.column);
    }
    work(first, pair.row, pair.column);
    if (pair.row != pair.column) {
      unlock(of_bag + pair.column);
    }
    unlock(of_bag + pair.row);
  });

  parallel_ranges(num_strips, 64, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const Bag& bag = bags[bag_of_strip[s]];
      const int64_t first = (s - bag.first_strip) * kWidth;
      for (int64_t row = first; row < smaller(first + kWidth, bag.size); ++row) {
        write_row(a, candidates, bag, row);
      }
    }
  });
}

template <class X>
void run(const KnnArguments& a) {
  int64_t first = 0, rows = 0;
  for (int64_t b = 0; b < a.bags; ++b) {
    const int64_t padded = round_up(a.ptr[b + 1] - a.ptr[b], kWidth);
    if (rows > 0 && rows + padded > kWave) {
      run_wave<X>(a, first, b);
      first = b;
      rows = 0;
    }
    rows += padded;
  }
  if (rows > 0) {
    run_wave<X>(a, first, a.bags);
  }
}

}  // namespace

void knn(const KnnArguments& a) { UMDA_DISPATCH_DTYPE(a.x_type, run<scalar_t>(a)); }

}  // namespace umda::UMDA_ISA
