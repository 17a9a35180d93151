// The part of the CUDA driver's interface that Lory uses, on the emulator: built as libcuda.so, it makes the whole
// backend run, from the loading of the library to the launches, on a machine without a GPU.
//
// Memory is the host's (under AddressSanitizer with red zones around each allocation), filled with 0xff where the
// driver leaves it undefined. What is put on a stream is done when somebody waits for it, and not before, pinned memory or not (a driver may
// copy pageable memory aside first, and may not): overwriting or freeing the source of a copy too early shows, and so does
// a stream that reads or writes what another one has not finished with.
// A launch is checked against the committed PTX: the kernel has to stand there, with as many parameters.
// Graphs are chains of kernels and nothing else; what a real driver would leave undefined (a handle of another graph, a graph
// that is used after its end) ends the program.
#include "emulator.h"

#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {

using Result = int;
constexpr Result SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_IMAGE = 200,
                 UNSUPPORTED_PTX = 222, NOT_FOUND = 500;
// Of the emulated device.
constexpr size_t MEMORY = (size_t)2 << 30;

// Work in order; `queued` and `done` count it.
struct Stream {
    std::deque<std::function<void()>> work;
    size_t queued = 0, done = 0;
};

// The place on a stream where it was last recorded.
struct Event {
    Stream *stream = nullptr;
    size_t after = 0;
};

std::mutex guard;
size_t used, copied, memory_limit = MEMORY;
std::map<char *, size_t> allocations;
std::vector<Stream *> streams;
int context;
int driver_version = 13000, devices = 1;

struct Function {
    std::string name;
    const emulator::Kernel *kernel;
};
struct Module {
    std::string ptx;
};

// A kernel with its grid and its arguments.
struct Call {
    const Function *function;
    emulator::Index grid;
    std::vector<uint64_t> arguments;

    void run() {
        std::vector<void *> addresses;
        for (uint64_t &argument : arguments) addresses.push_back(&argument);
        emulator::launch(function->name.c_str(), *function->kernel, grid, addresses.data());
    }
};

struct Graph {
    // Nodes are known by their addresses.
    std::vector<Call *> nodes;
};
// What is launched: the nodes as they were, and as they were set since.
struct Executable {
    const Graph *graph;
    std::vector<Call> calls;
};
std::set<const void *> graphs, executables;

// As CUDA 12.0 declares it.
struct NodeParameters {
    void *function;
    unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared;
    void **values, **extra;
    void *kernel, *context;
};

// What of graphs the driver refuses to the calling thread: 1 to make them, 2 to change them, 3 to launch them.
thread_local int refused;
// Launches of the calling thread up to and with the one that is refused, as if there were no memory for it; 0 for none.
thread_local int until_refused;

[[noreturn]] void fail(const char *what) {
    std::fprintf(stderr, "emulated driver: %s\n", what);
    std::abort();
}

// The call that these parameters describe; false if a driver would not launch it.
bool make_call(const NodeParameters &p, Call &call) {
    const Function &f = *(const Function *)p.function;
    if (p.block_x != f.kernel->threads || p.block_y != 1 || p.block_z != 1 || p.shared || p.extra) return false;
    if (!p.grid_x || !p.grid_y || !p.grid_z) return false;
    if (p.grid_x > 2147483647u || p.grid_y > 65535 || p.grid_z > 65535) return false;
    call = {&f, {p.grid_x, p.grid_y, p.grid_z}, {}};
    for (size_t i = 0; i < f.kernel->parameters.size(); i++) {
        call.arguments.push_back(0);
        std::memcpy(&call.arguments.back(), p.values[i], f.kernel->parameters[i]);
    }
    return true;
}

void put(void *stream, std::function<void()> work) {
    Stream &on = *(Stream *)stream;
    on.work.push_back(std::move(work));
    on.queued++;
}

void run_until(Stream &stream, size_t count) {
    while (stream.done < count && !stream.work.empty()) {
        const auto work = std::move(stream.work.front());
        stream.work.pop_front();
        work();
        stream.done++;
    }
}

void finish(Stream &stream) { run_until(stream, stream.queued); }

void finish_all() {
    for (Stream *stream : streams) finish(*stream);
}

bool inside(unsigned long long address, size_t bytes) {
    char *start = (char *)address;
    auto after = allocations.upper_bound(start);
    if (after == allocations.begin()) return false;
    auto &[first, size] = *--after;
    return start >= first && start + bytes <= first + size;
}

// The parameters of an entry, or −1 if the text has no such entry.
int parameters(const std::string &ptx, const std::string &name) {
    const size_t at = ptx.find(".entry " + name + "(");
    if (at == std::string::npos) return -1;
    const std::string list = ptx.substr(at, ptx.find(')', at) - at);
    int count = 0;
    for (size_t i = list.find(".param"); i != std::string::npos; i = list.find(".param", i + 1)) count++;
    return count;
}

} // namespace

extern "C" {

// For tests: the order of threads, what the driver reports, and how much memory is left.
void lory_emulate_order(int backwards) {
    std::lock_guard<std::mutex> lock(guard);
    emulator::set_order(backwards != 0);
}
void lory_emulate_driver(int version, int count) {
    driver_version = version;
    devices = count;
}
size_t lory_emulate_used() { return used; }
void lory_emulate_memory(size_t bytes) { memory_limit = bytes ? bytes : MEMORY; }
// What of graphs is refused to the calling thread from now on (0: nothing, 1: to make them, 2: to change, 3: to launch).
void lory_emulate_refusal(int what) { refused = what; }
// From now on the calling thread's `n`th launch of a kernel alone is refused, once (0: none). Returns what was left of the last `n`.
int lory_emulate_refused_launch(int n) { return std::exchange(until_refused, n); }
// Bytes that were copied to the device so far.
size_t lory_emulate_copied() { return copied; }

Result cuInit(unsigned) { return devices ? SUCCESS : NO_DEVICE; }
Result cuDriverGetVersion(int *version) {
    *version = driver_version;
    return SUCCESS;
}
Result cuDeviceGetCount(int *count) {
    *count = devices;
    return SUCCESS;
}
Result cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return ordinal < devices ? SUCCESS : INVALID_VALUE;
}
Result cuDeviceGetName(char *name, int length, int) {
    std::snprintf(name, length, "Emulated");
    return SUCCESS;
}
Result cuDeviceGetAttribute(int *value, int attribute, int) {
    // COMPUTE_CAPABILITY_MAJOR and _MINOR.
    *value = attribute == 75 ? 8 : 0;
    return SUCCESS;
}
Result cuDevicePrimaryCtxRetain(void **out, int) {
    *out = &context;
    return SUCCESS;
}
Result cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
Result cuCtxSetCurrent(void *which) { return which == &context ? SUCCESS : INVALID_VALUE; }
Result cuStreamCreate(void **out, unsigned) {
    std::lock_guard<std::mutex> lock(guard);
    streams.push_back(new Stream);
    *out = streams.back();
    return SUCCESS;
}
Result cuStreamDestroy_v2(void *stream) {
    std::lock_guard<std::mutex> lock(guard);
    finish(*(Stream *)stream);
    return SUCCESS;
}
Result cuStreamSynchronize(void *stream) {
    std::lock_guard<std::mutex> lock(guard);
    finish(*(Stream *)stream);
    return SUCCESS;
}
Result cuStreamWaitEvent(void *stream, void *event, unsigned) {
    std::lock_guard<std::mutex> lock(guard);
    const Event at = *(Event *)event;
    if (at.stream) put(stream, [at] { run_until(*at.stream, at.after); });
    return SUCCESS;
}

Result cuMemGetInfo_v2(size_t *left, size_t *total) {
    *total = memory_limit;
    *left = memory_limit - (used < memory_limit ? used : memory_limit);
    return SUCCESS;
}
Result cuMemAlloc_v2(unsigned long long *out, size_t bytes) {
    std::lock_guard<std::mutex> lock(guard);
    if (bytes == 0) return INVALID_VALUE;
    if (used > memory_limit || bytes > memory_limit - used) return OUT_OF_MEMORY;
    void *memory = nullptr;
    if (posix_memalign(&memory, 256, bytes)) return OUT_OF_MEMORY;
    std::memset(memory, 0xff, bytes);
    allocations[(char *)memory] = bytes;
    used += bytes;
    *out = (unsigned long long)memory;
    return SUCCESS;
}
Result cuMemFree_v2(unsigned long long address) {
    std::lock_guard<std::mutex> lock(guard);
    finish_all();
    auto found = allocations.find((char *)address);
    if (found == allocations.end()) return INVALID_VALUE;
    used -= found->second;
    allocations.erase(found);
    std::free((void *)address);
    return SUCCESS;
}
Result cuMemHostAlloc(void **out, size_t bytes, unsigned) {
    std::lock_guard<std::mutex> lock(guard);
    *out = std::malloc(bytes);
    return *out ? SUCCESS : OUT_OF_MEMORY;
}
Result cuMemFreeHost(void *memory) {
    std::lock_guard<std::mutex> lock(guard);
    finish_all();
    std::free(memory);
    return SUCCESS;
}
Result cuMemsetD8Async(unsigned long long address, unsigned char value, size_t bytes, void *stream) {
    std::lock_guard<std::mutex> lock(guard);
    if (!inside(address, bytes)) return INVALID_VALUE;
    put(stream, [=] { std::memset((void *)address, value, bytes); });
    return SUCCESS;
}
Result cuMemcpyHtoDAsync_v2(unsigned long long to, const void *from, size_t bytes, void *stream) {
    std::lock_guard<std::mutex> lock(guard);
    if (!inside(to, bytes)) return INVALID_VALUE;
    copied += bytes;
    put(stream, [=] { std::memcpy((void *)to, from, bytes); });
    return SUCCESS;
}
Result cuMemcpyDtoHAsync_v2(void *to, unsigned long long from, size_t bytes, void *stream) {
    std::lock_guard<std::mutex> lock(guard);
    finish(*(Stream *)stream);
    if (!inside(from, bytes)) return INVALID_VALUE;
    std::memcpy(to, (const void *)from, bytes);
    return SUCCESS;
}
Result cuMemcpyDtoDAsync_v2(unsigned long long to, unsigned long long from, size_t bytes, void *stream) {
    std::lock_guard<std::mutex> lock(guard);
    if (!inside(from, bytes) || !inside(to, bytes)) return INVALID_VALUE;
    put(stream, [=] { std::memmove((void *)to, (const void *)from, bytes); });
    return SUCCESS;
}

Result cuEventCreate(void **out, unsigned) {
    *out = new Event;
    return SUCCESS;
}
Result cuEventRecord(void *event, void *stream) {
    std::lock_guard<std::mutex> lock(guard);
    *(Event *)event = {(Stream *)stream, ((Stream *)stream)->queued};
    return SUCCESS;
}
Result cuEventSynchronize(void *event) {
    std::lock_guard<std::mutex> lock(guard);
    const Event at = *(Event *)event;
    if (at.stream) run_until(*at.stream, at.after);
    return SUCCESS;
}
Result cuEventDestroy_v2(void *event) {
    delete (Event *)event;
    return SUCCESS;
}

Result cuModuleLoadData(void **out, const void *image) {
    const std::string ptx = (const char *)image;
    if (ptx.find(".target sm_80") == std::string::npos) return INVALID_IMAGE;
    // PTX 7.0 came with 11.0.
    if (driver_version < 11000) return UNSUPPORTED_PTX;
    *out = new Module{ptx};
    return SUCCESS;
}
Result cuModuleUnload(void *module) {
    delete (Module *)module;
    return SUCCESS;
}
Result cuModuleGetFunction(void **out, void *module, const char *name) {
    static std::map<std::string, Function> functions;
    std::lock_guard<std::mutex> lock(guard);
    const emulator::Kernel *kernel = emulator::find_kernel(name);
    if (!kernel) return NOT_FOUND;
    if (parameters(((Module *)module)->ptx, name) != (int)kernel->parameters.size()) return NOT_FOUND;
    *out = &(functions[name] = {name, kernel});
    return SUCCESS;
}
Result cuLaunchKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                      unsigned block_y, unsigned block_z, unsigned shared, void *stream, void **values, void **extra) {
    std::lock_guard<std::mutex> lock(guard);
    Call call;
    const NodeParameters parameters = {function, grid_x, grid_y, grid_z, block_x, block_y,
                                       block_z,  shared, values, extra,  nullptr, nullptr};
    if (!make_call(parameters, call)) return INVALID_VALUE;
    if (until_refused && --until_refused == 0) return OUT_OF_MEMORY;
    put(stream, [call]() mutable { call.run(); });
    return SUCCESS;
}

Result cuGraphCreate(void **out, unsigned flags) {
    std::lock_guard<std::mutex> lock(guard);
    if (flags) return INVALID_VALUE;
    graphs.insert(*out = new Graph);
    return SUCCESS;
}
Result cuGraphAddKernelNode_v2(void **out, void *graph, void *const *before, size_t count, const NodeParameters *p) {
    std::lock_guard<std::mutex> lock(guard);
    if (!graphs.count(graph)) fail("a node for a graph that is not there");
    auto &nodes = ((Graph *)graph)->nodes;
    // Whatever is no chain may run in any order.
    if (count != (nodes.empty() ? 0 : 1) || (count && *before != nodes.back())) fail("a node that follows not the last one");
    Call call;
    if (p->kernel || p->context || !make_call(*p, call)) return INVALID_VALUE;
    nodes.push_back(new Call(std::move(call)));
    *out = nodes.back();
    return SUCCESS;
}
Result cuGraphInstantiateWithFlags(void **out, void *graph, unsigned long long flags) {
    std::lock_guard<std::mutex> lock(guard);
    if (!graphs.count(graph)) fail("a graph that is not there");
    const Graph &made = *(Graph *)graph;
    if (flags || made.nodes.empty()) return INVALID_VALUE;
    if (refused == 1) return OUT_OF_MEMORY;
    auto *executable = new Executable{&made, {}};
    for (const Call *node : made.nodes) executable->calls.push_back(*node);
    executables.insert(*out = executable);
    return SUCCESS;
}
Result cuGraphExecKernelNodeSetParams_v2(void *executable, void *node, const NodeParameters *p) {
    std::lock_guard<std::mutex> lock(guard);
    if (!executables.count(executable)) fail("a graph that is not there");
    Executable &e = *(Executable *)executable;
    if (!graphs.count(e.graph)) fail("a node of a graph that is not there");
    size_t i = 0;
    while (i < e.graph->nodes.size() && e.graph->nodes[i] != node) i++;
    if (i == e.graph->nodes.size()) fail("a node of another graph");
    Call call;
    if (refused == 2 || p->kernel || p->context || !make_call(*p, call)) return INVALID_VALUE;
    if (call.function != e.calls[i].function) fail("a node with another kernel");
    // Launches that are on their way keep what they had.
    e.calls[i] = std::move(call);
    return SUCCESS;
}
Result cuGraphLaunch(void *executable, void *stream) {
    std::lock_guard<std::mutex> lock(guard);
    if (!executables.count(executable)) fail("a graph that is not there");
    if (refused == 3) return INVALID_VALUE;
    put(stream, [calls = ((Executable *)executable)->calls]() mutable {
        for (Call &call : calls) call.run();
    });
    return SUCCESS;
}
Result cuGraphExecDestroy(void *executable) {
    std::lock_guard<std::mutex> lock(guard);
    if (!executables.erase(executable)) fail("a graph that is not there");
    delete (Executable *)executable;
    return SUCCESS;
}
Result cuGraphDestroy(void *graph) {
    std::lock_guard<std::mutex> lock(guard);
    if (!graphs.erase(graph)) fail("a graph that is not there");
    for (const Call *node : ((Graph *)graph)->nodes) delete node;
    delete (Graph *)graph;
    return SUCCESS;
}

Result cuGetErrorName(Result error, const char **name) {
    *name = error == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY"
            : error == NO_DEVICE   ? "CUDA_ERROR_NO_DEVICE"
                                   : "CUDA_ERROR_EMULATED";
    return SUCCESS;
}
Result cuGetErrorString(Result error, const char **text) {
    *text = error == OUT_OF_MEMORY     ? "out of memory"
            : error == NO_DEVICE       ? "no CUDA-capable device is detected"
            : error == INVALID_VALUE   ? "invalid argument"
            : error == NOT_FOUND       ? "named symbol not found"
            : error == UNSUPPORTED_PTX ? "the provided PTX was compiled with an unsupported toolchain."
                                       : "unknown error";
    return SUCCESS;
}
}
