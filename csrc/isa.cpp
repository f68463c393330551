// Which instruction set the kernels run on.
#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace umda {
namespace {

Isa best_isa() {
#if UMDA_X86
  __builtin_cpu_init();
  // These ask the operating system too, whether it saves the wide registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::baseline;
#else
  return Isa::baseline;
#endif
}

Isa choose_isa() {
  const Isa best = best_isa();
  const char* variable = std::getenv("UMDA_FAST_CPU_ISA");
  if (variable == nullptr || *variable == '\0') {
    return best;
  }
  const std::string name(variable);
  Isa wanted = Isa::baseline;
  if (name == "avx2") {
    wanted = Isa::avx2;
  } else if (name == "avx512") {
    wanted = Isa::avx512;
  } else if (name != "baseline") {
    throw std::runtime_error("UMDA_FAST_CPU_ISA must be baseline, avx2 or avx512, got '" + name + "'");
  }
  if (wanted > best) {
    throw std::runtime_error("UMDA_FAST_CPU_ISA=" + name + ", but this machine does not have it");
  }
  return wanted;
}

}  // namespace

Isa active_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

}  // namespace umda

// For Python (ctypes): the set in use, or why there is none.
extern "C" __attribute__((visibility("default"))) const char* umda_fast_cpu_isa() {
  try {
    switch (umda::active_isa()) {
      case umda::Isa::avx512:
        return "avx512";
      case umda::Isa::avx2:
        return "avx2";
      case umda::Isa::baseline:
        return "baseline";
    }
  } catch (const std::exception& error) {
    static const std::string message = error.what();
    return message.c_str();
  }
  return "";
}
