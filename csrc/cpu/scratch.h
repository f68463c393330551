// Working memory of a kernel: cache-line aligned, uninitialised, freed at the end of the scope.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "isa.h"

namespace umda {

[[noreturn]] void fail_to_allocate();  // throws std::bad_alloc

}  // namespace umda

#ifdef UMDA_ISA
namespace umda::UMDA_ISA {

template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    const uint64_t bytes = (static_cast<uint64_t>(count) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(::aligned_alloc(64, bytes == 0 ? 64 : bytes));
    if (data_ == nullptr) {
      fail_to_allocate();
    }
  }
  ~Scratch() { ::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* data() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

}  // namespace umda::UMDA_ISA
#endif
