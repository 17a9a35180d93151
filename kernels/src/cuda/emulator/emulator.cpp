// Fibers, barriers and blocks.
#include "emulator.h"

#include <map>
#include <string>

#include <sys/mman.h>
#include <ucontext.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

Thread *current;
Index grid_dim, block_dim, block_idx;

namespace {

constexpr size_t STACK = 128 * 1024;
constexpr unsigned MOST_THREADS = 1024;

enum class State { Ready, AtBarrier, AtWarp, Done };

// Where a switch goes on: a fiber is entered once through its ucontext_t, whose switches are system calls, and from then
// on by the compiler's own jumps, which are a handful of instructions.
using Jump = void *[5];

struct Fiber {
    Thread thread;
    Jump jump;
    char *stack = nullptr;
    State state = State::Done;
    void *fake_stack = nullptr;
};

std::map<std::string, Kernel> &kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}

Fiber fibers[MOST_THREADS];
uint32_t shown[MOST_THREADS / WARP][2][WARP][SHOWN];
ucontext_t main_context;
Jump scheduler;
Fiber *running;
const Kernel *kernel;
void **arguments;
const char *kernel_name;
bool backwards;

[[noreturn]] void fail(const char *what) {
    std::fprintf(stderr, "emulator: %s: block (%u, %u): %s\n", kernel_name, block_idx.x, block_idx.y, what);
    std::abort();
}

#ifdef __SANITIZE_ADDRESS__
const void *scheduler_stack;
size_t scheduler_size;
void *scheduler_fake;
void leave(void **fake, const void *stack, size_t size) { __sanitizer_start_switch_fiber(fake, stack, size); }
void enter(void *fake, const void **stack, size_t *size) { __sanitizer_finish_switch_fiber(fake, stack, size); }
#endif

// Of its own, because a function may not jump to itself.
[[noreturn]] __attribute__((noinline)) void jump_to(Jump &jump) { __builtin_longjmp(jump, 1); }

// Back to the scheduler; returns when it chooses this fiber again.
__attribute__((noinline)) void pause(State state) {
    Fiber *self = running;
    self->state = state;
#ifdef __SANITIZE_ADDRESS__
    leave(&self->fake_stack, scheduler_stack, scheduler_size);
#endif
    if (!__builtin_setjmp(self->jump)) jump_to(scheduler);
#ifdef __SANITIZE_ADDRESS__
    enter(running->fake_stack, &scheduler_stack, &scheduler_size);
#endif
}

// A fiber lives as long as the library: it runs one thread after the other.
void main_of_fiber() {
#ifdef __SANITIZE_ADDRESS__
    enter(nullptr, &scheduler_stack, &scheduler_size);
#endif
    for (;;) {
        kernel->body(arguments);
        pause(State::Done);
    }
}

__attribute__((noinline)) void enter_first(Fiber &fiber) {
    void *memory = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for a stack");
    fiber.stack = static_cast<char *>(memory);
    static ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack;
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    makecontext(&context, main_of_fiber, 0);
#ifdef __SANITIZE_ADDRESS__
    leave(&scheduler_fake, fiber.stack, STACK);
#endif
    swapcontext(&main_context, &context);
}

__attribute__((noinline)) void resume(Fiber &fiber) {
    running = &fiber;
    current = &fiber.thread;
    if (!__builtin_setjmp(scheduler)) {
        if (!fiber.stack) enter_first(fiber);
#ifdef __SANITIZE_ADDRESS__
        leave(&scheduler_fake, fiber.stack, STACK);
#endif
        jump_to(fiber.jump);
    }
#ifdef __SANITIZE_ADDRESS__
    enter(scheduler_fake, nullptr, nullptr);
#endif
}

void start(Fiber &fiber, unsigned i) {
    fiber.state = State::Ready;
    fiber.thread = Thread{{i % block_dim.x, i / block_dim.x, 0}, i % WARP, shown[i / WARP], 0};
}

#ifndef __SANITIZE_ADDRESS__
// Set by the linker where a kernel has shared memory.
extern "C" char __start_lory_shared[] __attribute__((weak));
extern "C" char __stop_lory_shared[] __attribute__((weak));
#endif

void run_block() {
#ifndef __SANITIZE_ADDRESS__
    if (__start_lory_shared) std::memset(__start_lory_shared, 0xff, __stop_lory_shared - __start_lory_shared);
#endif
    const unsigned n = block_dim.x * block_dim.y;
    for (unsigned i = 0; i < n; i++) start(fibers[i], i);
    for (;;) {
        for (unsigned i = 0; i < n; i++) {
            Fiber &fiber = fibers[backwards ? n - 1 - i : i];
            if (fiber.state == State::Ready) resume(fiber);
        }
        unsigned done = 0, at_barrier = 0, released = 0;
        for (unsigned warp = 0; warp * WARP < n; warp++) {
            const unsigned first = warp * WARP, last = first + WARP < n ? first + WARP : n;
            unsigned at_warp = 0;
            for (unsigned i = first; i < last; i++) {
                at_warp += fibers[i].state == State::AtWarp;
                at_barrier += fibers[i].state == State::AtBarrier;
                done += fibers[i].state == State::Done;
            }
            if (at_warp == 0) continue;
            if (at_warp != last - first || last - first != WARP) fail("a lane skipped a warp operation");
            for (unsigned i = first; i < last; i++) fibers[i].state = State::Ready;
            released += at_warp;
        }
        if (done == n) return;
        if (released) continue;
        if (at_barrier != n) fail("a thread skipped a barrier");
        for (unsigned i = 0; i < n; i++) fibers[i].state = State::Ready;
    }
}

} // namespace

void barrier() { pause(State::AtBarrier); }
void warp_barrier() { pause(State::AtWarp); }

void add_kernel(const char *name, Kernel kernel) { kernels()[name] = std::move(kernel); }

const Kernel *find_kernel(const char *name) {
    auto found = kernels().find(name);
    return found == kernels().end() ? nullptr : &found->second;
}

void launch(const char *name, const Kernel &launched, Index grid, void **values) {
    kernel = &launched;
    kernel_name = name;
    arguments = values;
    grid_dim = grid;
    block_dim = {launched.threads, 1, 1};
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                block_idx = {x, y, z};
                run_block();
            }
}

void set_order(bool last_first) { backwards = last_first; }

} // namespace emulator
