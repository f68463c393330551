#include "cpu/scratch.h"

#include <new>

namespace umda {

void fail_to_allocate() { throw std::bad_alloc(); }

}  // namespace umda
