// The scheduler behind cuda_emulation.h: one fiber per thread, blocks in turn.
#include "cuda_emulation.h"

#include <sys/mman.h>

#include <cstdio>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulation {

Thread* current = nullptr;

namespace {

constexpr size_t kStack = 64 << 10, kGuard = 64;
constexpr unsigned kMaxThreads = 1024, kWarp = 32;
constexpr unsigned char kGuardByte = 0xa5, kPoison = 0xff;

// ---- fibers ----------------------------------------------------------------------------------------------

#if defined(__x86_64__)
// Saves the registers that a function must preserve on the running stack, and takes up the other one.
extern "C" void emulation_switch(void** save, void* load);
asm(R"(
.text
.local emulation_switch
.type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch, .-emulation_switch
)");

struct Context {
  void* stack_pointer;
};
void prepare(Context& context, unsigned char* stack, void (*entry)()) {
  // As if emulation_switch had been called by entry's caller: six registers, then the address to return to.
  void** top = reinterpret_cast<void**>(stack + kStack);
  *--top = nullptr;  // keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) {
    *--top = nullptr;
  }
  context.stack_pointer = top;
}
void change(Context& from, Context& to) { emulation_switch(&from.stack_pointer, to.stack_pointer); }
#else
struct Context {
  ucontext_t context;
};
void prepare(Context& context, unsigned char* stack, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = kStack;
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
}
void change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
#endif

enum class State { ready, at_warp, at_block, done };

struct Fiber : Thread {
  Context context;
  State state;
  Site site;  // where it waits
};

struct Warp {
  uint64_t values[2][kWarp];  // by turns, so that nobody overwrites what another lane has still to read
  unsigned arrived = 0, turn = 0;
  Site site;
};

struct SharedArray {
  const void* key;  // null: the dynamic memory
  std::vector<unsigned char> memory;
  size_t bytes;
  unsigned char* data() { return memory.data() + kGuard + (16 - reinterpret_cast<uintptr_t>(memory.data()) % 16) % 16; }
};

struct Machine {
  unsigned char* stacks = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<SharedArray> shared;
  Context scheduler;
  unsigned arrived = 0;  // at the block's barrier
  Site site;
  Body body;
  void* argument;
  std::string error;
  unsigned order = 0;
  uint64_t random = 0;
  std::string told;
};
Machine machine;

unsigned thread_number() { return current->thread.x; }

void pause() {
  Fiber& fiber = machine.fibers[thread_number()];
  change(fiber.context, machine.scheduler);
}

void enter() {
  machine.body(machine.argument);
  machine.fibers[thread_number()].state = State::done;
  pause();
}

std::string describe(const Site& site) {
  return std::string(site.operation) + " at " + site.file + ":" + std::to_string(site.line);
}

bool same(const Site& a, const Site& b) {
  return a.line == b.line && std::strcmp(a.operation, b.operation) == 0 && std::strcmp(a.file, b.file) == 0;
}

void stop(const std::string& message) {
  if (machine.error.empty()) {
    machine.error = message + " (block " + std::to_string(current->block.x) + ", thread " +
                    std::to_string(current->thread.x) + ")";
  }
  pause();  // for good: the scheduler gives up a grid that has failed
}

// ---- shared memory -----------------------------------------------------------------------------------------

void poison(SharedArray& array) {
  std::memset(array.data() - kGuard, kGuardByte, kGuard);
  std::memset(array.data(), kPoison, array.bytes);
  std::memset(array.data() + array.bytes, kGuardByte, kGuard);
}

bool intact(SharedArray& array) {
  for (size_t i = 0; i < kGuard; ++i) {
    if (array.data()[-static_cast<ptrdiff_t>(i) - 1] != kGuardByte || array.data()[array.bytes + i] != kGuardByte) {
      return false;
    }
  }
  return true;
}

SharedArray& allocate(const void* key, size_t bytes) {
  machine.shared.push_back({key, std::vector<unsigned char>(bytes + 2 * kGuard + 16), bytes});
  poison(machine.shared.back());
  return machine.shared.back();
}

// ---- schedule ----------------------------------------------------------------------------------------------

// Visits 0..count-1: upwards, downwards, or in an order drawn anew each time.
std::vector<unsigned> visit(unsigned count) {
  std::vector<unsigned> order(count);
  for (unsigned i = 0; i < count; ++i) {
    order[i] = machine.order == 1 ? count - 1 - i : i;
  }
  for (unsigned i = count; machine.order > 1 && i > 1; --i) {
    machine.random = machine.random * 6364136223846793005u + 1442695040888963407u;
    std::swap(order[i - 1], order[(machine.random >> 33) % i]);
  }
  return order;
}

void run_block(unsigned block, unsigned blocks, unsigned threads, size_t shared_bytes) {
  machine.shared.clear();
  machine.shared.reserve(64);  // pointers into it stay valid
  allocate(nullptr, shared_bytes);
  machine.arrived = 0;
  machine.warps.assign(threads / kWarp, Warp{});
  machine.fibers.resize(threads);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = machine.fibers[i];
    fiber.thread = {i, 0, 0};
    fiber.block = {block, 0, 0};
    fiber.block_size = {threads, 1, 1};
    fiber.grid_size = {blocks, 1, 1};
    fiber.state = State::ready;
    unsigned char* const stack = machine.stacks + i * kStack;
    std::memset(stack, kGuardByte, kGuard);
    prepare(fiber.context, stack, enter);
  }
  const std::vector<unsigned> warps = visit(threads / kWarp), lanes = visit(kWarp);
  for (bool progress = true; progress && machine.error.empty();) {
    progress = false;
    for (const unsigned warp : warps) {
      for (bool again = true; again && machine.error.empty();) {
        again = false;
        for (const unsigned lane : lanes) {
          Fiber& fiber = machine.fibers[warp * kWarp + lane];
          if (fiber.state == State::ready && machine.error.empty()) {
            current = &fiber;
            change(machine.scheduler, fiber.context);
            again = progress = true;
          }
        }
      }
    }
  }
  for (unsigned i = 0; i < threads && machine.error.empty(); ++i) {
    current = &machine.fibers[i];
    if (machine.fibers[i].state != State::done) {
      machine.error = "not all threads reached " + describe(machine.fibers[i].site) + " (block " +
                      std::to_string(block) + ", thread " + std::to_string(i) + " waits there)";
    }
    for (size_t b = 0; b < kGuard; ++b) {
      if (machine.stacks[i * kStack + b] != kGuardByte && machine.error.empty()) {
        machine.error = "a thread's stack overflowed";
      }
    }
  }
  for (SharedArray& array : machine.shared) {
    if (machine.error.empty() && !intact(array)) {
      machine.error = "written outside shared memory (block " + std::to_string(block) + ")";
    }
  }
}

}  // namespace

int lane() { return static_cast<int>(thread_number() % kWarp); }

bool is_shared(const void* p) {
  for (SharedArray& array : machine.shared) {
    if (p >= array.data() && p < array.data() + array.bytes) {
      return true;
    }
  }
  return false;
}

void fail(const char* what, const char* file, int line) { stop(describe({what, file, line})); }

void* dynamic_shared() { return machine.shared.front().data(); }

void* static_shared(const void* key, size_t bytes) {
  for (SharedArray& array : machine.shared) {
    if (array.key == key) {
      return array.data();
    }
  }
  return allocate(key, bytes).data();
}

void meet_block(const Site& site) {
  Fiber& fiber = machine.fibers[thread_number()];
  fiber.site = site;
  if (machine.arrived == 0) {
    machine.site = site;
  } else if (!same(site, machine.site)) {
    stop("divergent barrier: " + describe(site) + " while others wait in " + describe(machine.site));
  }
  if (++machine.arrived < machine.fibers.size()) {
    fiber.state = State::at_block;
    pause();
    return;
  }
  machine.arrived = 0;
  for (Fiber& other : machine.fibers) {
    other.state = State::ready;
  }
}

const uint64_t* meet_warp(const Site& site, unsigned mask, uint64_t value) {
  Fiber& fiber = machine.fibers[thread_number()];
  Warp& warp = machine.warps[thread_number() / kWarp];
  fiber.site = site;
  if (mask != 0xffffffffu) {
    stop("only operations of whole warps are emulated: " + describe(site));
  }
  if (warp.arrived == 0) {
    warp.site = site;
  } else if (!same(site, warp.site)) {
    stop("divergent warp: " + describe(site) + " while others wait in " + describe(warp.site));
  }
  uint64_t* const values = warp.values[warp.turn % 2];
  values[lane()] = value;
  if (++warp.arrived < kWarp) {
    fiber.state = State::at_warp;
    pause();
    return values;
  }
  warp.arrived = 0;
  ++warp.turn;
  for (unsigned i = 0; i < kWarp; ++i) {
    machine.fibers[thread_number() / kWarp * kWarp + i].state = State::ready;
  }
  return values;
}

void run_grid(unsigned blocks, unsigned threads, size_t shared, Body body, void* context) {
  if (!machine.error.empty()) {
    return;  // as on a device, nothing runs after an error until somebody asks for it
  }
  if (blocks == 0 || threads == 0 || threads > kMaxThreads || threads % kWarp != 0 || shared > (48 << 10)) {
    machine.error = "invalid launch: " + std::to_string(blocks) + " blocks of " + std::to_string(threads) +
                    " threads with " + std::to_string(shared) + " bytes of shared memory";
    return;
  }
  if (machine.stacks == nullptr) {
    void* const memory = mmap(nullptr, kMaxThreads * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
      machine.error = "no memory for stacks";
      return;
    }
    machine.stacks = static_cast<unsigned char*>(memory);
  }
  machine.body = body;
  machine.argument = context;
  for (const unsigned block : visit(blocks)) {
    run_block(block, blocks, threads, shared);
    if (!machine.error.empty()) {
      return;
    }
  }
}

}  // namespace emulation

// 0: threads, warps and blocks run upwards; 1: downwards; others: shuffled with that seed.
extern "C" void emulation_set_order(unsigned order) {
  emulation::machine.order = order;
  emulation::machine.random = order;
}

// What went wrong since the last call, or null.
extern "C" const char* emulation_error() {
  emulation::machine.told.swap(emulation::machine.error);
  emulation::machine.error.clear();
  return emulation::machine.told.empty() ? nullptr : emulation::machine.told.c_str();
}
