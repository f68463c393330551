// Random bits without a state: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//
// A counter of 64 bits (the other 64 are 0) and a key of 64 give four words of 32 bits, lower half of each first eight
// numbers of 16 bits: those of eight consecutive elements of a row. Rows begin a new counter, so that the first of row i
// is i * counters_per_row(width). umda_fast/reference/philox.py and kernels/_philox.py give the same bits.
//
// Counters are in the 64-bit lanes of a vector, where the product of two words fits. What a round leaves in the upper
// half of a lane is garbage that the next product does not read.
#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace umda::UMDA_ISA {

constexpr int64_t kCounterElements = 8;     // numbers that a counter gives
constexpr int kCounterLanes = kWidth / 2;   // counters of a vector
constexpr int64_t kRandomElements = kCounterElements * kCounterLanes;

UMDA_INLINE int64_t counters_per_row(int64_t width) { return (width + kCounterElements - 1) / kCounterElements; }

using Words = uint64_t __attribute__((vector_size(sizeof(Vec))));

UMDA_INLINE Words all_words(uint64_t x) { return Words{} + x; }

// The products of the lower halves of all lanes, 64 bits each.
UMDA_INLINE Words product(Words a, Words b) {
#if defined(UMDA_ISA_AVX512)
  return (Words)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(UMDA_ISA_AVX2)
  return (Words)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif UMDA_X86
  return (Words)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// Even lanes of a and b in turn, and odd ones.
UMDA_INLINE void interleave(Words a, Words b, Words& even, Words& odd) {
#if defined(UMDA_ISA_AVX512)
  even = (Words)_mm512_unpacklo_epi64((__m512i)a, (__m512i)b);
  odd = (Words)_mm512_unpackhi_epi64((__m512i)a, (__m512i)b);
#elif defined(UMDA_ISA_AVX2)
  even = (Words)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b);
  odd = (Words)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
#else
  even = Words{a[0], b[0]};
  odd = Words{a[1], b[1]};
#endif
}

// The numbers of `count` counters from `first` on, 8 each; `to` has room for a multiple of kRandomElements.
UMDA_INLINE void random_numbers(uint64_t seed, int64_t first, int64_t count, uint16_t* to) {
  // So that the even lanes hold the first half of a vector's counters: the results then are in order.
  Words counter = all_words(static_cast<uint64_t>(first));
  for (int i = 0; i < kCounterLanes; ++i) {
    counter[i] += static_cast<uint64_t>(i % 2 == 0 ? i / 2 : i / 2 + kCounterLanes / 2);
  }
  for (int64_t done = 0; done < count; done += kCounterLanes) {
    Words c0 = counter, c1 = counter >> 32, c2 = {}, c3 = {};
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    UMDA_UNROLL
    for (int round = 0; round < 10; ++round) {
      const Words of_c0 = product(c0, all_words(0xD2511F53u)), of_c2 = product(c2, all_words(0xCD9E8D57u));
      c0 = (of_c2 >> 32) ^ c1 ^ all_words(k0);
      c1 = of_c2;
      c2 = (of_c0 >> 32) ^ c3 ^ all_words(k1);
      c3 = of_c0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const Words low = all_words(0xffffffffu);
    Words even, odd;
    interleave((c0 & low) | (c1 << 32), (c2 & low) | (c3 << 32), even, odd);
    uint16_t* const here = to + done * kCounterElements;
    __builtin_memcpy(here, &even, sizeof(even));
    __builtin_memcpy(here + kRandomElements / 2, &odd, sizeof(odd));
    counter += static_cast<uint64_t>(kCounterLanes);
  }
}

// By what elements that are kept are multiplied.
inline float dropout_scale(bool dropped, int threshold) {
  return dropped ? static_cast<float>(65536.0 / (65536 - threshold)) : 1.0f;
}

// x where the number is at least the threshold, else 0, whatever x is.
UMDA_INLINE Vec keep(Vec x, const uint16_t* numbers, int threshold) {
  using Halves = uint16_t __attribute__((vector_size(kWidth * sizeof(uint16_t))));
  using Integers = int __attribute__((vector_size(sizeof(Vec))));
  Halves halves;
  __builtin_memcpy(&halves, numbers, sizeof(halves));
  const Integers kept = __builtin_convertvector(halves, Integers) >= (Integers{} + threshold);
  return (Vec)((Integers)x & kept);
}

}  // namespace umda::UMDA_ISA
