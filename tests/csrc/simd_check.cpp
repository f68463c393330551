// Checks csrc/cpu/simd.h of one instruction set: conversions of every 16-bit value, exp against double precision, partial
// loads and stores, sums. Prints what fails and returns how many did. Compiled and run by test_build.py.
#include <cmath>
#include <cstdio>
#include <initializer_list>

#include "cpu/simd.h"

namespace umda::UMDA_ISA {
namespace {

int failures = 0;

void expect(bool ok, const char* what, double got, double wanted) {
  if (!ok && ++failures < 20) {
    std::printf("%s: got %.9g, wanted %.9g\n", what, got, wanted);
  }
}

bool same(float a, float b) { return float_bits(a) == float_bits(b) || (std::isnan(a) && std::isnan(b)); }

// Every value of T goes to float and back, in vectors and alone; halfway cases round to even.
template <class T>
void check_storage() {
  for (uint32_t first = 0; first < 65536; first += kWidth) {
    T stored[kWidth], back[kWidth];
    for (int i = 0; i < kWidth; ++i) {
      stored[i].bits = static_cast<uint16_t>(first + static_cast<uint32_t>(i));
    }
    float wide[kWidth];
    store(wide, load(stored));
    store(back, load(wide));
    for (int i = 0; i < kWidth; ++i) {
      const float value = to_float(stored[i]);
      expect(same(wide[i], value), "widen", wide[i], value);
      if (!std::isnan(value)) {
        expect(back[i].bits == stored[i].bits, "narrow", back[i].bits, stored[i].bits);
        expect(from_float<T>(value).bits == stored[i].bits, "from_float", from_float<T>(value).bits, stored[i].bits);
      } else {
        expect(std::isnan(to_float(back[i])) && std::isnan(to_float(from_float<T>(value))), "NaN", to_float(back[i]), value);
      }
    }
  }
  // Between neighbours: exactly halfway, and a bit to either side.
  for (uint32_t bits = 0; bits < 0x7f00u; bits += 7) {
    const float low = to_float(T{static_cast<uint16_t>(bits)});
    const float high = to_float(T{static_cast<uint16_t>(bits + 1)});
    if (!std::isfinite(low) || !std::isfinite(high)) {
      continue;
    }
    const float middle = 0.5f * low + 0.5f * high;
    const uint16_t even = static_cast<uint16_t>(bits + (bits & 1));
    for (const float value : {middle, std::nextafter(middle, low), std::nextafter(middle, high)}) {
      const uint16_t wanted = value == middle ? even : static_cast<uint16_t>(value < middle ? bits : bits + 1);
      float lanes_in[kWidth];
      for (float& x : lanes_in) {
        x = value;
      }
      T out[kWidth];
      store(out, load(lanes_in));
      expect(out[0].bits == wanted, "round, vector", out[0].bits, wanted);
      expect(from_float<T>(value).bits == wanted, "round, scalar", from_float<T>(value).bits, wanted);
    }
  }
}

void check_exp() {
  double worst = 0.0;
  for (double x = -110.0; x < 95.0; x += 0.00037) {
    const float in = static_cast<float>(x);
    const double exact = std::exp(static_cast<double>(in));
    const float got = exp(in);
    if (exact > 3.4028235677973366e38) {
      expect(std::isinf(got), "exp overflow", got, exact);
      continue;
    }
    const double ulp = exact < 0x1p-126 ? 0x1p-149 : std::ldexp(1.0, std::ilogb(exact) - 23);
    const double error = std::fabs(static_cast<double>(got) - exact) / ulp;
    worst = error > worst ? error : worst;
  }
  expect(worst <= 1.5, "exp, error in ulp", worst, 1.5);
  expect(exp(-INFINITY) == 0.0f, "exp(-inf)", exp(-INFINITY), 0);
  expect(std::isinf(exp(INFINITY)), "exp(inf)", exp(INFINITY), INFINITY);
  expect(std::isnan(exp(NAN)), "exp(NaN)", exp(NAN), NAN);
  expect(exp(0.0f) == 1.0f, "exp(0)", exp(0.0f), 1);
}

template <class T>
void check_partial() {
  for (int n = 0; n <= kWidth; ++n) {
    T in[kWidth], out[kWidth + 1];
    for (int i = 0; i < kWidth; ++i) {
      in[i] = from_float<T>(static_cast<float>(i + 1));
    }
    for (T& x : out) {
      x = from_float<T>(-1.0f);
    }
    float wide[kWidth];
    store(wide, load(in, n));
    store(out, load(in), n);
    for (int i = 0; i < kWidth; ++i) {
      expect(wide[i] == (i < n ? static_cast<float>(i + 1) : 0.0f), "partial load", wide[i], i < n ? i + 1 : 0);
      expect(to_float(out[i]) == (i < n ? static_cast<float>(i + 1) : -1.0f), "partial store", to_float(out[i]), i + 1);
    }
    expect(to_float(out[kWidth]) == -1.0f, "store past the end", to_float(out[kWidth]), -1);
  }
}

void check_reductions() {
  float a[4][kWidth];
  float wanted[4] = {};
  float top = -1e9f;
  for (int r = 0; r < 4; ++r) {
    for (int i = 0; i < kWidth; ++i) {
      a[r][i] = static_cast<float>((r * 31 + i * 17) % 23 - 11);
      wanted[r] += a[r][i];
    }
  }
  for (int i = 0; i < kWidth; ++i) {
    top = a[0][i] > top ? a[0][i] : top;
  }
  float got[4];
  sums(load(a[0]), load(a[1]), load(a[2]), load(a[3]), got);
  for (int r = 0; r < 4; ++r) {
    expect(got[r] == wanted[r], "sums", got[r], wanted[r]);
    expect(sum(load(a[r])) == wanted[r], "sum", sum(load(a[r])), wanted[r]);
  }
  expect(largest(load(a[0])) == top, "largest", largest(load(a[0])), top);
  for (int n = 0; n <= kWidth; ++n) {
    float out[kWidth];
    store(out, load_or(a[0], n, -5.5f));
    for (int i = 0; i < kWidth; ++i) {
      expect(out[i] == (i < n ? a[0][i] : -5.5f), "load_or", out[i], a[0][i]);
    }
  }
}

template <int kPeriod>
void check_period() {
  if constexpr (kPeriod <= kWidth) {
    float a[kWidth], top[kWidth], total[kWidth];
    for (int i = 0; i < kWidth; ++i) {
      a[i] = static_cast<float>((i * 17) % 23 - 11);
    }
    store(top, largest_by_period<kPeriod>(load(a)));
    store(total, sum_by_period<kPeriod>(load(a)));
    for (int i = 0; i < kWidth; ++i) {
      float wanted_top = -1e9f, wanted_total = 0.0f;
      for (int other = i % kPeriod; other < kWidth; other += kPeriod) {
        wanted_top = a[other] > wanted_top ? a[other] : wanted_top;
        wanted_total += a[other];
      }
      expect(top[i] == wanted_top, "largest_by_period", top[i], wanted_top);
      expect(total[i] == wanted_total, "sum_by_period", total[i], wanted_total);
    }
  }
}

}  // namespace
}  // namespace umda::UMDA_ISA

int main() {
  using namespace umda;
  UMDA_ISA::check_storage<bfloat16>();
  UMDA_ISA::check_storage<float16>();
  UMDA_ISA::check_exp();
  UMDA_ISA::check_partial<float>();
  UMDA_ISA::check_partial<bfloat16>();
  UMDA_ISA::check_partial<float16>();
  UMDA_ISA::check_reductions();
  UMDA_ISA::check_period<1>();
  UMDA_ISA::check_period<2>();
  UMDA_ISA::check_period<4>();
  UMDA_ISA::check_period<8>();
  UMDA_ISA::check_period<16>();
  return UMDA_ISA::failures;
}
