// Runs a kernel on simulated SIMD-groups, one threadgroup at a time.
//
// A thread of the GPU is a fiber: a stack of its own and a few instructions to switch to it. At a
// barrier or SIMD-group operation it waits; when all lanes wait at the same place, they go on.
// Every load and store of the kernel arrives here first: clang's -fsanitize=thread inserts calls
// of __tsan_read4 and the like, and this file has those functions in place of clang's library.
//
// It is linked into the library of each kernel. It includes no header, so that it can be built
// where clang is the only thing installed; it knows Linux on x86-64 only.

typedef unsigned char uint8_t;
typedef unsigned int uint32_t;
typedef unsigned long uint64_t;
typedef unsigned long size_t;
typedef unsigned long uintptr_t;

extern "C" {
void* memcpy(void*, const void*, size_t);
void* memmove(void*, const void*, size_t);
void* memset(void*, int, size_t);
int snprintf(char*, size_t, const char*, ...);
int vsnprintf(char*, size_t, const char*, __builtin_va_list);
void* mmap(void*, size_t, int, int, int, long);
int munmap(void*, size_t);
int mprotect(void*, size_t, int);

// The positions of a thread; the rows in the order of enum Position.
struct msl_ids {
  uint32_t v[12][3];
};
struct msl_buffer {
  char* base;
  uint64_t size;
  uint32_t* owner;  // of an output: for every byte the thread that wrote it, 0 where none did
  int writable;
  const char* name;
};
// The section of the kernel's threadgroup variables; there is none without such variables.
extern char __start_msl_tg[] __attribute__((weak)), __stop_msl_tg[] __attribute__((weak));
// Calls the kernel; run.py generates it.
void msl_entry(msl_buffer* buffers, const msl_ids* ids);
}

namespace {

enum Position {
  IN_GRID,
  IN_THREADGROUP,
  INDEX_IN_THREADGROUP,
  THREADGROUP,
  THREADGROUPS,
  THREADGROUP_SIZE,  // of this threadgroup, which may be cut at the grid's edge
  GRID_SIZE,
  LANE,
  SIMDGROUP,
  SIMDGROUPS,
  SIMDGROUP_SIZE,
  FULL_THREADGROUP_SIZE,
};
constexpr int LANES = 32, MAX_THREADS = 1024, MAX_SIMDGROUPS = MAX_THREADS / LANES;
constexpr size_t MAX_THREADGROUP_MEMORY = 32768, STACK = 128 << 10, PAGE = 4096;
constexpr size_t MESSAGE_SIZE = 2048, MAX_OPERAND = 32;
constexpr int MEM_THREADGROUP = 2;  // of mem_flags

enum State { READY, AT_SIMDGROUP, AT_THREADGROUP, DONE };
constexpr int BARRIER = 0;  // kind of waiting; the others are SIMD-group operations
struct Fiber {
  void* stack_pointer;
  State state;
  int kind, flags, line;  // where it waits
  msl_ids ids;
};

// Operands of a SIMD-group operation; two, as a lane may be one operation ahead of another one
// that has not yet read them.
struct Operands {
  alignas(16) char lane[2][LANES][MAX_OPERAND];
};

// Who touched a byte of threadgroup memory last. Epochs count barriers: "epoch" those of the
// threadgroup, "simd_epoch" those of the SIMD-group.
struct Access {
  uint32_t thread, epoch, simd_epoch;
};
enum Readers { ONE_LANE = 0, SEVERAL_LANES = 1, SEVERAL_SIMDGROUPS = 2 };
struct Cell {
  Access written, read;
  uint32_t readers;
};

char* stacks;
size_t stack_count;
Fiber fibers[MAX_THREADS];
int fiber_count;
Operands operands[MAX_SIMDGROUPS];
uint32_t operation_count[MAX_THREADS];
Cell cells[MAX_THREADGROUP_MEMORY];
uint32_t epoch, simd_epoch[MAX_SIMDGROUPS];
uint32_t first_epoch;       // of this threadgroup
uint32_t threadgroup_count;  // finished ones

msl_buffer* buffers;
int buffer_count;
bool strict;

Fiber* me;
int my_index;
void* scheduler;
uint64_t switches;
char message[MESSAGE_SIZE];
bool failed;

// Saves the registers that a function must keep on this stack, and the stack pointer in *save;
// goes on where the other stack was left.
asm(R"(
.text
.globl msl_switch
.hidden msl_switch
.type msl_switch,@function
msl_switch:
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
)");
extern "C" void msl_switch(void** save, void* to) __attribute__((visibility("hidden")));
constexpr int SAVED_REGISTERS = 6;

// ---- Faults

// Notes the first fault.
void describe(const char* format, ...) __attribute__((format(printf, 1, 2)));
void describe(const char* format, ...) {
  if (failed) return;
  failed = true;
  __builtin_va_list arguments;
  __builtin_va_start(arguments, format);
  vsnprintf(message, MESSAGE_SIZE, format, arguments);
  __builtin_va_end(arguments);
}

// Leaves the fiber for good.
[[noreturn]] void leave() {
  msl_switch(&me->stack_pointer, scheduler);
  __builtin_unreachable();
}

// Faults of an access; run.py finds the line of the address.
[[noreturn]] void fault_at(const void* address, const char* what, const char* more = "") {
  const uint32_t* group = me->ids.v[THREADGROUP];
  describe("%s%s; thread %d of threadgroup (%u,%u,%u) @%p", what, more, my_index, group[0],
           group[1], group[2], address);
  leave();
}

[[noreturn]] void fault_on_line(const char* what, int line) {
  const uint32_t* group = me->ids.v[THREADGROUP];
  describe("%s; thread %d of threadgroup (%u,%u,%u) line %d", what, my_index, group[0], group[1],
           group[2], line);
  leave();
}

// ---- Loads and stores

// Whether another thread's write is not yet visible to this one.
bool unordered_write(const Access& written) {
  if (written.epoch != epoch || written.thread == uint32_t(my_index)) return false;
  const int simdgroup = my_index / LANES;
  const bool same = int(written.thread) / LANES == simdgroup;
  return !(same && written.simd_epoch < simd_epoch[simdgroup]);
}

// Whether another thread may still have to read what this one overwrites.
bool unordered_read(const Cell& cell) {
  if (cell.read.epoch != epoch) return false;
  const int simdgroup = my_index / LANES;
  const bool same = int(cell.read.thread) / LANES == simdgroup;
  if (!same || (cell.readers & SEVERAL_SIMDGROUPS)) return true;
  const bool other = (cell.readers & SEVERAL_LANES) || cell.read.thread != uint32_t(my_index);
  return cell.read.simd_epoch == simd_epoch[simdgroup] && other;
}

void note_read(Cell& cell) {
  const uint32_t thread = my_index;
  const Access now = {thread, epoch, simd_epoch[thread / LANES]};
  if (cell.read.epoch != epoch) {
    cell.read = now;
    cell.readers = ONE_LANE;
  } else if (cell.read.thread / LANES != thread / LANES) {
    cell.readers |= SEVERAL_SIMDGROUPS;
  } else if (cell.read.simd_epoch != now.simd_epoch) {
    cell.read = now;
    cell.readers &= SEVERAL_SIMDGROUPS;
  } else if (cell.read.thread != thread) {
    cell.readers |= SEVERAL_LANES;
  }
}

void touch_threadgroup_memory(Cell* cell, size_t size, bool write, const void* from) {
  for (const Cell* end = cell + size; cell != end; ++cell) {
    const bool written = cell->written.epoch >= first_epoch;
    if (!written && !write) fault_at(from, "read of threadgroup memory that nothing has written");
    if (written && unordered_write(cell->written))
      fault_at(from, "threadgroup memory: ",
               write ? "write after another thread's write without a barrier"
                     : "read of another thread's write without a barrier");
    if (!write) {
      note_read(*cell);
      continue;
    }
    if (unordered_read(*cell))
      fault_at(from, "threadgroup memory: write after another thread's read without a barrier");
    cell->written = {uint32_t(my_index), epoch, simd_epoch[my_index / LANES]};
  }
}

void touch_buffer(msl_buffer& buffer, const char* p, size_t size, bool write, const void* from) {
  if (p + size > buffer.base + buffer.size)
    fault_at(from, "access across the end of buffer ", buffer.name);
  if (write && !buffer.writable) fault_at(from, "write to input ", buffer.name);
  if (!buffer.owner) return;
  const uint32_t thread = threadgroup_count * MAX_THREADS + my_index + 1;
  uint32_t* owner = buffer.owner + (p - buffer.base);
  for (const uint32_t* end = owner + size; owner != end; ++owner) {
    const bool other = *owner && *owner != thread;
    if (!write && !*owner) fault_at(from, "read of unwritten output ", buffer.name);
    if (other && strict)
      fault_at(from,
               write ? "second thread writes the same bytes of output "
                     : "read of another thread's bytes of output ",
               buffer.name);
    if (write) *owner = thread;
  }
}

[[noreturn]] void out_of_bounds(const char* p, size_t size, bool write, const void* from) {
  const char* nearest = "";
  long offset = 0, least = __LONG_MAX__;
  for (int i = 0; i < buffer_count; ++i) {
    const long at = p - buffers[i].base;
    const long distance = at < 0 ? -at : at - long(buffers[i].size);
    if (distance >= least) continue;
    least = distance;
    nearest = buffers[i].name;
    offset = at;
  }
  static char what[256];
  snprintf(what, sizeof what, "%s of %zu bytes out of bounds (nearest buffer %s, byte %ld)",
           write ? "write" : "read", size, nearest, offset);
  fault_at(from, what);
}

enum Alignment { ALIGNED, ANY };

void touch(const void* address, size_t size, bool write, const void* from, Alignment alignment) {
  const char* p = static_cast<const char*>(address);
  if (p >= stacks && p < stacks + stack_count * STACK) return;  // a thread's own variables
  if (alignment == ALIGNED && (reinterpret_cast<uintptr_t>(p) & (size - 1)) != 0)
    fault_at(from, "misaligned access");
  if (p >= __start_msl_tg && p < __stop_msl_tg) {
    if (p + size > __stop_msl_tg) fault_at(from, "access beyond threadgroup memory");
    touch_threadgroup_memory(&cells[p - __start_msl_tg], size, write, from);
    return;
  }
  for (int i = 0; i < buffer_count; ++i)
    if (p >= buffers[i].base && p < buffers[i].base + buffers[i].size)
      return touch_buffer(buffers[i], p, size, write, from);
  out_of_bounds(p, size, write, from);
}

// ---- Threads

void start_fiber() {
  msl_entry(buffers, &me->ids);
  me->state = DONE;
  leave();
}

void wait(State state, int kind, int flags, int line) {
  me->state = state;
  me->kind = kind;
  me->flags = flags;
  me->line = line;
  msl_switch(&me->stack_pointer, scheduler);
}

bool same_place(const Fiber& a, const Fiber& b) {
  if (a.state != b.state) return false;
  return a.state == DONE || (a.line == b.line && a.kind == b.kind);
}

void describe_place(const Fiber& fiber, char* text, size_t size) {
  if (fiber.state == DONE) {
    snprintf(text, size, "has returned");
    return;
  }
  const char* where = fiber.state == AT_THREADGROUP ? "threadgroup_barrier"
                      : fiber.kind == BARRIER       ? "simdgroup_barrier"
                                                    : "a SIMD-group operation";
  snprintf(text, size, "waits in %s at line %d", where, fiber.line);
}

// Whether fibers begin to end are at the same place; else that is the fault.
bool together(int begin, int end) {
  for (int i = begin + 1; i < end; ++i) {
    if (same_place(fibers[begin], fibers[i])) continue;
    char first[64], second[64];
    describe_place(fibers[begin], first, sizeof first);
    describe_place(fibers[i], second, sizeof second);
    const uint32_t* group = fibers[begin].ids.v[THREADGROUP];
    describe("divergence in threadgroup (%u,%u,%u): thread %d %s, thread %d %s", group[0],
             group[1], group[2], begin, first, i, second);
    return false;
  }
  return true;
}

void release(int begin, int end) {
  for (int i = begin; i < end; ++i) fibers[i].state = READY;
}

// Runs a SIMD-group until it waits for the others or is done.
void run_simdgroup(int simdgroup) {
  const int begin = simdgroup * LANES;
  const int end = begin + LANES < fiber_count ? begin + LANES : fiber_count;
  for (;;) {
    for (int i = begin; i < end; ++i) {
      if (fibers[i].state != READY) continue;
      me = &fibers[i];
      my_index = i;
      ++switches;
      msl_switch(&scheduler, me->stack_pointer);
      if (failed) return;
    }
    if (!together(begin, end)) return;
    const Fiber& first = fibers[begin];
    if (first.state != AT_SIMDGROUP) return;
    if (first.kind == BARRIER && (first.flags & MEM_THREADGROUP)) ++simd_epoch[simdgroup];
    release(begin, end);
  }
}

// Runs the threadgroup that fibers were made for.
void run_threadgroup() {
  do {
    for (int i = 0; i * LANES < fiber_count; ++i) {
      run_simdgroup(i);
      if (failed) return;
    }
    if (!together(0, fiber_count)) return;
    if (fibers[0].state == DONE) return;
    if (fibers[0].flags & MEM_THREADGROUP) ++epoch;
    release(0, fiber_count);
  } while (true);
}

void make_fiber(int index, const uint32_t* group, const uint32_t* size, const uint32_t* full,
                const uint32_t* grid, const uint32_t* groups) {
  Fiber& fiber = fibers[index];
  fiber = Fiber{};
  const uint32_t i = index;
  const uint32_t at[3] = {i % size[0], i / size[0] % size[1], i / (size[0] * size[1])};
  auto& ids = fiber.ids.v;
  for (int k = 0; k < 3; ++k) {
    ids[IN_GRID][k] = group[k] * full[k] + at[k];
    ids[IN_THREADGROUP][k] = at[k];
    ids[THREADGROUP][k] = group[k];
    ids[THREADGROUPS][k] = groups[k];
    ids[THREADGROUP_SIZE][k] = size[k];
    ids[GRID_SIZE][k] = grid[k];
    ids[FULL_THREADGROUP_SIZE][k] = full[k];
  }
  ids[INDEX_IN_THREADGROUP][0] = index;
  ids[LANE][0] = index % LANES;
  ids[SIMDGROUP][0] = index / LANES;
  ids[SIMDGROUPS][0] = (fiber_count + LANES - 1) / LANES;
  ids[SIMDGROUP_SIZE][0] = LANES;
  // As if it had been left at its first instruction; the slot above keeps the stack aligned.
  void** top = reinterpret_cast<void**>(stacks + (index + 1) * STACK) - 2;
  top[0] = reinterpret_cast<void*>(&start_fiber);
  for (int k = 1; k <= SAVED_REGISTERS; ++k) top[-k] = nullptr;
  fiber.stack_pointer = top - SAVED_REGISTERS;
}

void start_threadgroup(const uint32_t* group, const uint32_t* full, const uint32_t* grid,
                       const uint32_t* groups) {
  uint32_t size[3];
  for (int k = 0; k < 3; ++k) {
    const uint32_t left = grid[k] - group[k] * full[k];
    size[k] = left < full[k] ? left : full[k];
  }
  fiber_count = size[0] * size[1] * size[2];
  first_epoch = ++epoch;
  for (uint32_t& count : simd_epoch) count = 1;
  for (uint32_t& count : operation_count) count = 0;
  // NaN in every floating-point type.
  if (__start_msl_tg) memset(__start_msl_tg, 0xFF, __stop_msl_tg - __start_msl_tg);
  for (int i = 0; i < fiber_count; ++i) make_fiber(i, group, size, full, grid, groups);
}

void run_grid(const uint32_t* grid, const uint32_t* full) {
  uint32_t groups[3], group[3];
  for (int k = 0; k < 3; ++k) groups[k] = (grid[k] + full[k] - 1) / full[k];
  for (group[2] = 0; group[2] < groups[2]; ++group[2])
    for (group[1] = 0; group[1] < groups[1]; ++group[1])
      for (group[0] = 0; group[0] < groups[0]; ++group[0]) {
        start_threadgroup(group, full, grid, groups);
        run_threadgroup();
        if (failed) return;
        ++threadgroup_count;
      }
}

bool make_stacks(size_t count) {
  const int read_write = 3, private_anonymous_lazy = 0x4022;
  void* memory = mmap(nullptr, count * STACK, read_write, private_anonymous_lazy, -1, 0);
  if (memory == reinterpret_cast<void*>(-1)) return false;
  stacks = static_cast<char*>(memory);
  stack_count = count;
  // An overflowing stack hits a page that cannot be touched.
  for (size_t i = 0; i < count; ++i) mprotect(stacks + i * STACK, PAGE, 0);
  return true;
}

}  // namespace

// ---- What the kernel calls; stdlib.h declares it

extern "C" {

void msl_barrier(int whole, int flags, int line) {
  wait(whole ? AT_THREADGROUP : AT_SIMDGROUP, BARRIER, flags, line);
}

int msl_lane(void) { return my_index % LANES; }

int msl_lanes(void) {
  const int left = fiber_count - my_index / LANES * LANES;
  return left < LANES ? left : LANES;
}

void msl_fault(const char* what, int line) { fault_on_line(what, line); }

void msl_post(int kind, int line, const void* data, int size, void* table) {
  if (size > int(MAX_OPERAND)) fault_on_line("SIMD-group operand too large", line);
  auto& lanes = operands[my_index / LANES].lane[operation_count[my_index]++ % 2];
  memcpy(lanes[my_index % LANES], data, size);
  wait(AT_SIMDGROUP, kind, 0, line);
  const int count = msl_lanes();
  for (int i = 0; i < count; ++i) memcpy(static_cast<char*>(table) + i * size, lanes[i], size);
}

// ---- What run.py calls

// Returns 0, or 1 and a message of at most MESSAGE_SIZE bytes. Of stats, the first number becomes
// the count of fiber switches, the second one the bytes of threadgroup memory.
int msl_run(msl_buffer* given_buffers, int count, const uint32_t* grid, const uint32_t* threadgroup,
            int is_strict, char* out, uint64_t* stats) {
  const size_t bytes = __start_msl_tg ? __stop_msl_tg - __start_msl_tg : 0;
  const size_t threads = size_t(threadgroup[0]) * threadgroup[1] * threadgroup[2];
  stats[1] = bytes;
  buffers = given_buffers;
  buffer_count = count;
  strict = is_strict;
  failed = false;
  switches = epoch = threadgroup_count = 0;
  if (threads == 0 || threads > MAX_THREADS) {
    describe("threadgroup of %zu threads", threads);
  } else if (bytes > MAX_THREADGROUP_MEMORY) {
    describe("%zu bytes of threadgroup memory, Metal has %zu", bytes, MAX_THREADGROUP_MEMORY);
  } else if (!make_stacks(threads)) {
    describe("no memory for the stacks of %zu threads", threads);
  } else {
    memset(cells, 0, bytes * sizeof(Cell));
    // Metal flushes denormal floats. Denormal halves stay: these bits do not change conversions.
    const unsigned state = __builtin_ia32_stmxcsr(), flush = 0x8040;
    __builtin_ia32_ldmxcsr(state | flush);
    run_grid(grid, threadgroup);
    __builtin_ia32_ldmxcsr(state);
    munmap(stacks, threads * STACK);
  }
  stats[0] = switches;
  if (failed) memcpy(out, message, MESSAGE_SIZE);
  return failed;
}

// ---- What -fsanitize=thread,array-bounds lets the kernel call

#define FROM __builtin_return_address(0)
#define ACCESS(size)                                                                         \
  void __tsan_read##size(void* p) { touch(p, size, false, FROM, ALIGNED); }                  \
  void __tsan_write##size(void* p) { touch(p, size, true, FROM, ALIGNED); }                  \
  void __tsan_unaligned_read##size(void* p) { touch(p, size, false, FROM, ANY); }            \
  void __tsan_unaligned_write##size(void* p) { touch(p, size, true, FROM, ANY); }            \
  void __tsan_read_write##size(void* p) {                                                    \
    touch(p, size, false, FROM, ALIGNED);                                                    \
    touch(p, size, true, FROM, ALIGNED);                                                     \
  }                                                                                          \
  void __tsan_unaligned_read_write##size(void* p) {                                          \
    touch(p, size, false, FROM, ANY);                                                        \
    touch(p, size, true, FROM, ANY);                                                         \
  }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)

void __tsan_init(void) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void) {}

void* __tsan_memcpy(void* to, const void* from, size_t size) {
  if (size) touch(from, size, false, FROM, ANY), touch(to, size, true, FROM, ANY);
  return memcpy(to, from, size);
}

void* __tsan_memmove(void* to, const void* from, size_t size) {
  if (size) touch(from, size, false, FROM, ANY), touch(to, size, true, FROM, ANY);
  return memmove(to, from, size);
}

void* __tsan_memset(void* to, int value, size_t size) {
  if (size) touch(to, size, true, FROM, ANY);
  return memset(to, value, size);
}

void __ubsan_handle_out_of_bounds(void*, uintptr_t) {
  fault_at(FROM, "array index out of bounds");
}
}

// Float to bfloat, to nearest even: clang calls it by this name, and no library is linked.
extern "C" __bf16 __truncsfbf2(float x) {
  unsigned bits = __builtin_bit_cast(unsigned, x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  bits = nan ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u);
  return __builtin_bit_cast(__bf16, static_cast<unsigned short>(bits >> 16));
}
