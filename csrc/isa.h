// Instruction sets: every kernel source in csrc/cpu is compiled once per set into its own namespace
// umda::<set>, and the caller picks one at run time.
//
// What keeps an AVX-512 instruction off a machine that has none: nothing a kernel object defines may be shared
// with another object. So all code of a kernel file, headers included, lives in namespace umda::UMDA_ISA, and
// kernel files use no templates or inline functions of the standard library (the linker would keep one copy of
// such a function for all objects, maybe the one with the newest instructions). tests/csrc checks the symbols.
#pragma once

namespace umda {

enum class Isa { baseline, avx2, avx512 };

// The set in use: the best that cpuid reports, or the one named by the environment variable
// UMDA_FAST_CPU_ISA=baseline|avx2|avx512. Decided at the first call and fixed from then on.
// Throws std::runtime_error when the variable names a set that is unknown or that this machine lacks.
Isa active_isa();

}  // namespace umda

#if defined(__x86_64__) || defined(_M_X64)
#define UMDA_X86 1
// Declares a kernel entry point in the namespace of every set.
#define UMDA_DECLARE_KERNEL(result, name, ...)          \
  namespace umda::baseline { result name(__VA_ARGS__); } \
  namespace umda::avx2 { result name(__VA_ARGS__); }     \
  namespace umda::avx512 { result name(__VA_ARGS__); }
// Calls the entry point of the set in use.
#define UMDA_CALL_KERNEL(name, ...)                                                     \
  (::umda::active_isa() == ::umda::Isa::avx512 ? ::umda::avx512::name(__VA_ARGS__)      \
   : ::umda::active_isa() == ::umda::Isa::avx2 ? ::umda::avx2::name(__VA_ARGS__)        \
                                               : ::umda::baseline::name(__VA_ARGS__))
#else
#define UMDA_X86 0
#define UMDA_DECLARE_KERNEL(result, name, ...) \
  namespace umda::baseline { result name(__VA_ARGS__); }
#define UMDA_CALL_KERNEL(name, ...) ::umda::baseline::name(__VA_ARGS__)
#endif
