// What the kernels use of CUDA, as host C++: blocks run one after the other, and the threads of a
// block are fibers that run until they meet at a barrier or in a warp operation.
//
// It is stricter than a device: a barrier that some threads of the block never reach, a warp
// operation that some lanes skip, and a launch with the wrong number of arguments end the program
// with a message. Shared memory holds NaNs when a block starts. The order in which the threads
// run between two barriers can be turned round (lory_emulate_order), so that a missing barrier
// shows as another result.
//
// What it cannot show: speed, the rounding inside the tensor cores' float products (here they are summed one
// after the other), and whatever a real driver or device does differently.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __restrict__ __restrict
#ifdef __SANITIZE_ADDRESS__
// Red zones around every array of shared memory.
#define __shared__ static
#else
// One section, so that a block can start with all of it filled.
#define __shared__ static __attribute__((section("lory_shared")))
#endif

namespace emulator {

struct Index {
    unsigned x = 0, y = 0, z = 0;
};

constexpr unsigned WARP = 32;
// Words that a lane can show to its warp at once.
constexpr unsigned SHOWN = 12;

// Of the fiber that runs.
struct Thread {
    Index index;
    unsigned lane;
    // The words of all lanes of this warp, twice: a lane may be one operation ahead.
    uint32_t (*shown)[WARP][SHOWN];
    unsigned turn;
};

extern Thread *current;
extern Index grid_dim, block_dim, block_idx;

// Wait for the block, or for the warp.
void barrier();
void warp_barrier();

// All lanes give `count` words; returns those of all lanes. Valid until the next operation but one.
inline uint32_t (*show(const uint32_t *words, unsigned count))[SHOWN] {
    auto *shown = current->shown[current->turn++ & 1];
    std::memcpy(shown[current->lane], words, count * sizeof *words);
    warp_barrier();
    return shown;
}

// `arguments` are addresses of values, as cuLaunchKernel takes them.
using Body = std::function<void(void **arguments)>;

struct Kernel {
    // Bytes of each parameter.
    std::vector<size_t> parameters;
    unsigned threads;
    Body body;
};

void add_kernel(const char *name, Kernel kernel);
// Null if there is none of this name.
const Kernel *find_kernel(const char *name);
// Runs a grid to its end.
void launch(const char *name, const Kernel &kernel, Index grid, void **arguments);
void set_order(bool backwards);

struct Registration {
    template <class... A> Registration(const char *name, unsigned threads, void (*kernel)(A...)) {
        add_kernel(name, {{sizeof(A)...}, threads, [kernel](void **arguments) {
                              call(kernel, arguments, std::index_sequence_for<A...>());
                          }});
    }

  private:
    template <class... A, size_t... I>
    static void call(void (*kernel)(A...), void **arguments, std::index_sequence<I...>) {
        kernel(*static_cast<A *>(arguments[I])...);
    }
};

} // namespace emulator

// A kernel: its name, the threads of a block, its parameters.
#define KERNEL(name, threads, ...)                                                                 \
    static void name(__VA_ARGS__);                                                                 \
    static const emulator::Registration registration_##name(#name, threads, name);                 \
    static void name(__VA_ARGS__)

#define threadIdx (emulator::current->index)
#define blockIdx (emulator::block_idx)
#define blockDim (emulator::block_dim)
#define gridDim (emulator::grid_dim)

inline void __syncthreads() { emulator::barrier(); }
inline void __syncwarp() { emulator::warp_barrier(); }

template <class T> inline T __shfl_xor_sync(unsigned, T value, int mask) {
    static_assert(sizeof(T) == 4);
    uint32_t word;
    std::memcpy(&word, &value, 4);
    auto *shown = emulator::show(&word, 1);
    std::memcpy(&value, shown[emulator::current->lane ^ mask], 4);
    return value;
}

inline uint32_t __reduce_add_sync(unsigned, uint32_t value) {
    auto *shown = emulator::show(&value, 1);
    uint32_t sum = 0;
    for (unsigned lane = 0; lane < emulator::WARP; lane++) sum += shown[lane][0];
    return sum;
}

inline bool __any_sync(unsigned, bool value) {
    const uint32_t word = value;
    auto *shown = emulator::show(&word, 1);
    bool any = false;
    for (unsigned lane = 0; lane < emulator::WARP; lane++) any |= shown[lane][0] != 0;
    return any;
}

// Between two barriers a thread is not interrupted.
inline uint32_t atomicAdd(uint32_t *at, uint32_t value) { return std::exchange(*at, *at + value); }

inline float __uint_as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

// Byte i of the result is the one of the eight bytes of `a` (lowest) and `b` that nibble i of `selector` names.
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = a | (uint64_t)b << 32;
    uint32_t result = 0;
    for (unsigned i = 0; i < 4; i++) result |= (uint32_t)(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return result;
}

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
