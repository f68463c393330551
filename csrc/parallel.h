// Threads, for kernel files, which include no torch header. Runs on torch's own pool.
#pragma once

#include <cstdint>

namespace umda {

using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);

// Calls f(begin, end, context) on disjoint ranges that cover [0, count), from several threads. The ranges
// depend on the number of threads: anything summed across items must be stored per item (or per fixed group of
// items) and added up afterwards in a fixed order, or the result would depend on it as well.
void run_ranges(int64_t count, int64_t grain, RangeFunction f, void* context);

// Threads that run_ranges uses at most.
int64_t num_threads();

// Next free item of a shared counter (relaxed), for run_items below.
int64_t next_item(int64_t* counter);

}  // namespace umda

#ifdef UMDA_ISA
namespace umda::UMDA_ISA {

// f(begin, end) on disjoint ranges that cover [0, count), each of at least `grain` items.
template <class F>
inline void parallel_ranges(int64_t count, int64_t grain, const F& f) {
  run_ranges(
      count, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// f(item) for every item in [0, count), handed out one by one to whichever thread is free: for items of
// unequal or unknown cost. Items should cost some tens of microseconds.
template <class F>
inline void parallel_items(int64_t count, const F& f) {
  struct Shared {
    const F* f;
    int64_t count;
    alignas(64) int64_t counter;
  } shared{&f, count, 0};
  const int64_t threads = num_threads();
  run_ranges(
      threads < count ? threads : count, 1,
      [](int64_t begin, int64_t end, void* context) {
        Shared& s = *static_cast<Shared*>(context);
        (void)begin;
        (void)end;
        for (int64_t item = next_item(&s.counter); item < s.count; item = next_item(&s.counter)) {
          (*s.f)(item);
        }
      },
      &shared);
}

}  // namespace umda::UMDA_ISA
#endif
