// Vectors of float32: `Vec`, kWidth lanes wide, one width per instruction set.
//
//   load(p) load(p, n) store(p, v) store(p, v, n)   p to float, bfloat16 or float16; n lanes only (the others
//                                                   read as 0 and are not written), 0 <= n <= kWidth
//   load_or(p, n, fill)                             the others read as fill
//   splat(x) zero() fma(a, b, c) = a*b+c  max(a, b) sum(v) largest(v) exp(v)
//   a + b, a - b, a * b, a / b                      the compiler's own vector operators
//   sums(a, b, c, d, to)                            to[0..3] = sum(a), sum(b), sum(c), sum(d), cheaper than four
//   stream(p, v)                                    store past the caches, p a multiple of the vector's size in T;
//                                                   stream_fence() before other threads may read it
//   to_float(x) from_float<T>(f)                    scalar conversions, round to nearest even
//   min(a, b) at_least(a, b)                        bit i of the latter: a[i] >= b[i], false for NaN
//   swap_lanes<n>(v)                                lane i is lane i ^ n of v
//   largest_by_period<n>(v) sum_by_period<n>(v)     of every n-th lane, in all of them
//
// sum() adds in one fixed order. Only for kernel files, which are compiled with UMDA_ISA set.
#pragma once

#include <cstdint>
#include <cstring>

#include "dtype.h"
#include "isa.h"

#ifndef UMDA_ISA
#error "simd.h is for kernel files, compiled once per instruction set"
#endif
#if UMDA_X86
#include <immintrin.h>
#endif

#define UMDA_INLINE inline __attribute__((always_inline))
// Before a loop whose arrays must end up in registers.
#if defined(__clang__)
#define UMDA_UNROLL _Pragma("clang loop unroll(full)")
#else
#define UMDA_UNROLL _Pragma("GCC unroll 16")
#endif
// After the parameter list of a lambda.
#define UMDA_LAMBDA_INLINE __attribute__((always_inline))

namespace umda::UMDA_ISA {

// ---- scalars ---------------------------------------------------------------------------------------------

UMDA_INLINE uint32_t float_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

UMDA_INLINE float bits_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

UMDA_INLINE float to_float(float x) { return x; }
UMDA_INLINE float to_float(bfloat16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }

UMDA_INLINE float to_float(float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // inf, NaN
    return bits_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  }
  if (magnitude >= 0x0400u) {
    return bits_float(sign | ((magnitude << 13) + 0x38000000u));
  }
  return bits_float(sign | float_bits(static_cast<float>(magnitude) * 0x1p-24f));
}

template <class T>
T from_float(float x);

template <>
UMDA_INLINE float from_float<float>(float x) {
  return x;
}

template <>
UMDA_INLINE bfloat16 from_float<bfloat16>(float x) {
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  }
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
UMDA_INLINE float16 from_float<float16>(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    return {static_cast<uint16_t>(sign | 0x7e00u)};
  }
  if (magnitude >= 0x477ff000u) {  // 65520 and beyond round to infinity
    return {static_cast<uint16_t>(sign | 0x7c00u)};
  }
  if (magnitude < 0x38800000u) {  // below 2^-14: the addition rounds to a multiple of 2^-24
    return {static_cast<uint16_t>(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u))};
  }
  return {static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13))};
}

// A number as a type, to pass a compile-time size to a lambda.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

template <class T>
UMDA_INLINE T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
UMDA_INLINE T larger(T a, T b) {
  return a < b ? b : a;
}

// ---- vectors ---------------------------------------------------------------------------------------------

#if defined(UMDA_ISA_AVX512)

using Vec = __m512;
constexpr int kWidth = 16;

UMDA_INLINE Vec zero() { return _mm512_setzero_ps(); }
UMDA_INLINE Vec splat(float x) { return _mm512_set1_ps(x); }
UMDA_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
UMDA_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }

UMDA_INLINE __mmask16 lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

UMDA_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
UMDA_INLINE Vec load(const float* p, int n) { return _mm512_maskz_loadu_ps(lanes(n), p); }
UMDA_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
UMDA_INLINE void store(float* p, Vec v, int n) { _mm512_mask_storeu_ps(p, lanes(n), v); }

UMDA_INLINE Vec widen(__m256i h, const bfloat16*) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
UMDA_INLINE Vec widen(__m256i h, const float16*) { return _mm512_cvtph_ps(h); }
UMDA_INLINE __m256i narrow(Vec v, const bfloat16*) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16));
}
UMDA_INLINE __m256i narrow(Vec v, const float16*) {
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

template <class T>
UMDA_INLINE Vec load(const T* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), p);
}
template <class T>
UMDA_INLINE Vec load(const T* p, int n) {
  return widen(_mm256_maskz_loadu_epi16(lanes(n), p), p);
}
template <class T>
UMDA_INLINE void store(T* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v, p));
}
template <class T>
UMDA_INLINE void store(T* p, Vec v, int n) {
  _mm256_mask_storeu_epi16(p, lanes(n), narrow(v, p));
}

UMDA_INLINE float sum4(__m128 v) {
  const __m128 pairs = _mm_add_ps(v, _mm_movehl_ps(v, v));
  return _mm_cvtss_f32(_mm_add_ss(pairs, _mm_movehdup_ps(pairs)));
}
UMDA_INLINE float sum(Vec v) {
  const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  return sum4(_mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}

UMDA_INLINE void sums(Vec a, Vec b, Vec c, Vec d, float* to) {
  const Vec ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const Vec cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const Vec all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, _MM_SHUFFLE(1, 0, 1, 0)),
                                _mm512_shuffle_ps(ab, cd, _MM_SHUFFLE(3, 2, 3, 2)));
  const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}
UMDA_INLINE void stream(float* p, Vec v) { _mm512_stream_ps(p, v); }
template <class T>
UMDA_INLINE void stream(T* p, Vec v) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(v, p));
}
UMDA_INLINE void stream_fence() { _mm_sfence(); }

// 2^n * x, n integral.
UMDA_INLINE Vec scale_by_power(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }
UMDA_INLINE Vec round_nearest(Vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

#else

#if defined(UMDA_ISA_AVX2)

using Vec = __m256;
constexpr int kWidth = 8;

UMDA_INLINE Vec zero() { return _mm256_setzero_ps(); }
UMDA_INLINE Vec splat(float x) { return _mm256_set1_ps(x); }
UMDA_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
UMDA_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }

UMDA_INLINE __m256i lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
UMDA_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
UMDA_INLINE Vec load(const float* p, int n) { return _mm256_maskload_ps(p, lanes(n)); }
UMDA_INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
UMDA_INLINE void store(float* p, Vec v, int n) { _mm256_maskstore_ps(p, lanes(n), v); }

UMDA_INLINE Vec widen(__m128i h, const bfloat16*) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
// Every machine with AVX2 has F16C.
UMDA_INLINE Vec widen(__m128i h, const float16*) { return _mm256_cvtph_ps(h); }
UMDA_INLINE __m128i narrow(Vec v, const bfloat16*) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
UMDA_INLINE __m128i narrow(Vec v, const float16*) {
  return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

template <class T>
UMDA_INLINE Vec load(const T* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), p);
}
template <class T>
UMDA_INLINE void store(T* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(v, p));
}

UMDA_INLINE float sum(Vec v) {
  const __m128 halves = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 pairs = _mm_add_ps(halves, _mm_movehl_ps(halves, halves));
  return _mm_cvtss_f32(_mm_add_ss(pairs, _mm_movehdup_ps(pairs)));
}

UMDA_INLINE void sums(Vec a, Vec b, Vec c, Vec d, float* to) {
  const Vec ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const Vec cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  const Vec all = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, _MM_SHUFFLE(1, 0, 1, 0)),
                                _mm256_shuffle_ps(ab, cd, _MM_SHUFFLE(3, 2, 3, 2)));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}
UMDA_INLINE void stream(float* p, Vec v) { _mm256_stream_ps(p, v); }
template <class T>
UMDA_INLINE void stream(T* p, Vec v) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow(v, p));
}
UMDA_INLINE void stream_fence() { _mm_sfence(); }

UMDA_INLINE Vec round_nearest(Vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

#else

using Vec = float __attribute__((vector_size(16)));
constexpr int kWidth = 4;

UMDA_INLINE Vec zero() { return Vec{0, 0, 0, 0}; }
UMDA_INLINE Vec splat(float x) { return Vec{x, x, x, x}; }
UMDA_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
// As x86's: the second one when either is NaN.
UMDA_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }

UMDA_INLINE Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
UMDA_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof(v)); }
UMDA_INLINE Vec load(const float* p, int n) {
  Vec v = zero();
  for (int i = 0; i < n; ++i) {
    v[i] = p[i];
  }
  return v;
}
UMDA_INLINE void store(float* p, Vec v, int n) {
  for (int i = 0; i < n; ++i) {
    p[i] = v[i];
  }
}
template <class T>
UMDA_INLINE Vec load(const T* p) {
  return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
template <class T>
UMDA_INLINE void store(T* p, Vec v) {
  for (int i = 0; i < kWidth; ++i) {
    p[i] = from_float<T>(v[i]);
  }
}

UMDA_INLINE float sum(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }

UMDA_INLINE void sums(Vec a, Vec b, Vec c, Vec d, float* to) {
  to[0] = sum(a);
  to[1] = sum(b);
  to[2] = sum(c);
  to[3] = sum(d);
}
template <class T>
UMDA_INLINE void stream(T* p, Vec v) {
  store(p, v);
}
UMDA_INLINE void stream_fence() {}

// The sum pushes the fraction out of the mantissa. |x| < 2^22.
UMDA_INLINE Vec round_nearest(Vec x) { return (x + splat(0x1.8p23f)) - splat(0x1.8p23f); }

#endif

template <class T>
UMDA_INLINE Vec load(const T* p, int n) {
  T lane[kWidth] = {};
  for (int i = 0; i < n; ++i) {
    lane[i] = p[i];
  }
  return load(lane);
}
template <class T>
UMDA_INLINE void store(T* p, Vec v, int n) {
  T lane[kWidth];
  store(lane, v);
  for (int i = 0; i < n; ++i) {
    p[i] = lane[i];
  }
}

// 2^n * x, n integral, |n| < 252: in two factors, so that results below 2^-126 are denormal and not zero.
UMDA_INLINE Vec scale_by_power(Vec x, Vec n) {
  using IVec = int __attribute__((vector_size(sizeof(Vec))));
  const IVec whole = __builtin_convertvector(n, IVec);
  const IVec half = whole >> 1;
  const IVec first = (half + 127) << 23;
  const IVec second = (whole - half + 127) << 23;
  return x * (Vec)first * (Vec)second;
}

#endif

// load(p, n), the other lanes being `fill`.
UMDA_INLINE Vec load_or(const float* p, int n, float fill) {
#if defined(UMDA_ISA_AVX512)
  return _mm512_mask_loadu_ps(splat(fill), lanes(n), p);
#elif defined(UMDA_ISA_AVX2)
  return _mm256_blendv_ps(splat(fill), _mm256_maskload_ps(p, lanes(n)), _mm256_castsi256_ps(lanes(n)));
#else
  Vec v = splat(fill);
  for (int i = 0; i < n; ++i) {
    v[i] = p[i];
  }
  return v;
#endif
}

UMDA_INLINE float largest(Vec v) {
#if defined(UMDA_ISA_AVX512)
  return _mm512_reduce_max_ps(v);
#else
  float lane[kWidth];
  store(lane, v);
  float result = lane[0];
  for (int i = 1; i < kWidth; ++i) {
    result = lane[i] > result ? lane[i] : result;
  }
  return result;
#endif
}

// Lane i ^ kDistance of v, in lane i.
template <int kDistance>
UMDA_INLINE Vec swap_lanes(Vec v) {
  static_assert(kDistance == 1 || kDistance == 2 || kDistance == 4 || kDistance == 8);
#if defined(UMDA_ISA_AVX512)
  if constexpr (kDistance == 1) {
    return _mm512_permute_ps(v, 0xb1);
  } else if constexpr (kDistance == 2) {
    return _mm512_permute_ps(v, 0x4e);
  } else {
    return _mm512_shuffle_f32x4(v, v, kDistance == 4 ? 0xb1 : 0x4e);
  }
#elif defined(UMDA_ISA_AVX2)
  if constexpr (kDistance == 4) {
    return _mm256_permute2f128_ps(v, v, 1);
  } else {
    return _mm256_permute_ps(v, kDistance == 1 ? 0xb1 : 0x4e);
  }
#else
  return kDistance == 1 ? Vec{v[1], v[0], v[3], v[2]} : Vec{v[2], v[3], v[0], v[1]};
#endif
}

// In every lane, the largest of the lanes whose number leaves the same remainder by kPeriod, a power of two.
template <int kPeriod, int kDistance = kWidth / 2>
UMDA_INLINE Vec largest_by_period(Vec v) {
  if constexpr (kDistance >= kPeriod && kDistance > 0) {
    return largest_by_period<kPeriod, kDistance / 2>(max(v, swap_lanes<kDistance>(v)));
  } else {
    return v;
  }
}

// The same with their sum.
template <int kPeriod, int kDistance = kWidth / 2>
UMDA_INLINE Vec sum_by_period(Vec v) {
  if constexpr (kDistance >= kPeriod && kDistance > 0) {
    return sum_by_period<kPeriod, kDistance / 2>(v + swap_lanes<kDistance>(v));
  } else {
    return v;
  }
}

// exp, to 1 ulp; denormal results, 0, inf and NaN as they should be. exp(x) = 2^n exp(r), |r| <= log(2)/2,
// exp(r) = 1 + r + r^2 p(r), p a minimax polynomial (relative error of the whole 3e-9).
UMDA_INLINE Vec exp(Vec x) {
  // Beyond these bounds the result is inf or 0 anyway. max(bound, x) keeps a NaN.
  x = max(splat(-105.0f), x);
  x = zero() - max(splat(-90.0f), zero() - x);
  const Vec n = round_nearest(x * splat(0x1.715476p+0f));
  Vec r = fma(n, splat(-0x1.62e4p-1f), x);  // exact: log(2)'s upper part has 16 bits
  r = fma(n, splat(-0x1.7f7d1cp-20f), r);
  Vec p = splat(0x1.6a2432p-10f);
  p = fma(p, r, splat(0x1.1239e2p-7f));
  p = fma(p, r, splat(0x1.5558f2p-5f));
  p = fma(p, r, splat(0x1.555492p-3f));
  p = fma(p, r, splat(0x1.fffffcp-2f));
  return scale_by_power(fma(p * r, r, r) + splat(1.0f), n);
}

UMDA_INLINE float exp(float x) {
  // The same bits as the vector form gives, whatever the lane.
  const Vec v = exp(splat(x));
  float lane[kWidth];
  store(lane, v);
  return lane[0];
}

// ---- comparisons -----------------------------------------------------------------------------------------

// As x86's: the second one when either is NaN.
UMDA_INLINE Vec min(Vec a, Vec b) {
#if defined(UMDA_ISA_AVX512)
  return _mm512_min_ps(a, b);
#elif defined(UMDA_ISA_AVX2)
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

UMDA_INLINE uint32_t at_least(Vec a, Vec b) {
#if defined(UMDA_ISA_AVX512)
  return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ);
#elif defined(UMDA_ISA_AVX2)
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
#elif UMDA_X86
  return static_cast<uint32_t>(_mm_movemask_ps((__m128)(a >= b)));
#else
  uint32_t mask = 0;
  for (int i = 0; i < kWidth; ++i) {
    mask |= static_cast<uint32_t>(a[i] >= b[i]) << i;
  }
  return mask;
#endif
}

// Whether to write rows of `width` elements at p past the caches: when they would not be found there later anyway, as
// there are too many of them, a store to the cache only costs the read of the line it replaces.
template <class T>
UMDA_INLINE bool worth_streaming(const T* p, int64_t rows, int64_t width) {
  const int64_t vector = kWidth * static_cast<int64_t>(sizeof(T));
  const int64_t bytes = width * static_cast<int64_t>(sizeof(T));
  return rows * bytes > (int64_t{32} << 20) && bytes % vector == 0 && reinterpret_cast<uintptr_t>(p) % vector == 0;
}

// Vectors of T in a cache line of 64 bytes.
template <class T>
constexpr int kVecsPerLine = 64 / (kWidth * static_cast<int>(sizeof(T)));

// Asks for a line, into the second-level cache: it keeps more misses under way than the first.
UMDA_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace umda::UMDA_ISA
