// The part of the CUDA driver's interface that Lory uses, on the emulator: built as libcuda.so, it makes the whole
// backend run, from the loading of the library to the launches, on a machine without a GPU.
//
// Memory is the host's (under AddressSanitizer with red zones around each allocation), filled with 0xff where the
// driver leaves it undefined. Copies from pinned memory wait until something needs them, as on a device: overwriting
// a staging buffer too early shows. A launch is checked against the committed PTX: the kernel has to stand
// there, with as many parameters.
#include "emulator.h"

#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace {

using Result = int;
constexpr Result SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_IMAGE = 200,
                 UNSUPPORTED_PTX = 222, NOT_FOUND = 500;
// Of the emulated device.
constexpr size_t MEMORY = (size_t)2 << 30;

struct Copy {
    void *to;
    const void *from;
    size_t bytes;
};

std::mutex guard;
size_t used;
std::map<char *, size_t> allocations;
std::map<char *, size_t> pinned;
std::vector<Copy> pending;
int context, stream;
int driver_version = 13000, devices = 1;

struct Function {
    std::string name;
    const emulator::Kernel *kernel;
};
struct Module {
    std::string ptx;
};

void finish() {
    for (const Copy &copy : pending) std::memcpy(copy.to, copy.from, copy.bytes);
    pending.clear();
}

template <class T> bool inside(const std::map<char *, size_t> &all, T address, size_t bytes) {
    char *start = (char *)address;
    auto after = all.upper_bound(start);
    if (after == all.begin()) return false;
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
    *out = &stream;
    return SUCCESS;
}
Result cuStreamDestroy_v2(void *) { return SUCCESS; }
Result cuStreamSynchronize(void *) {
    std::lock_guard<std::mutex> lock(guard);
    finish();
    return SUCCESS;
}

Result cuMemGetInfo_v2(size_t *left, size_t *total) {
    *total = MEMORY;
    *left = MEMORY - used;
    return SUCCESS;
}
Result cuMemAlloc_v2(unsigned long long *out, size_t bytes) {
    std::lock_guard<std::mutex> lock(guard);
    if (bytes == 0) return INVALID_VALUE;
    if (bytes > MEMORY - used) return OUT_OF_MEMORY;
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
    finish();
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
    pinned[(char *)*out] = bytes;
    return *out ? SUCCESS : OUT_OF_MEMORY;
}
Result cuMemFreeHost(void *memory) {
    std::lock_guard<std::mutex> lock(guard);
    finish();
    pinned.erase((char *)memory);
    std::free(memory);
    return SUCCESS;
}
Result cuMemsetD8Async(unsigned long long address, unsigned char value, size_t bytes, void *) {
    std::lock_guard<std::mutex> lock(guard);
    finish();
    if (!inside(allocations, address, bytes)) return INVALID_VALUE;
    std::memset((void *)address, value, bytes);
    return SUCCESS;
}
Result cuMemcpyHtoDAsync_v2(unsigned long long to, const void *from, size_t bytes, void *) {
    std::lock_guard<std::mutex> lock(guard);
    if (!inside(allocations, to, bytes)) return INVALID_VALUE;
    pending.push_back({(void *)to, from, bytes});
    if (!inside(pinned, from, bytes)) finish();
    return SUCCESS;
}
Result cuMemcpyDtoHAsync_v2(void *to, unsigned long long from, size_t bytes, void *) {
    std::lock_guard<std::mutex> lock(guard);
    finish();
    if (!inside(allocations, from, bytes)) return INVALID_VALUE;
    std::memcpy(to, (const void *)from, bytes);
    return SUCCESS;
}
Result cuMemcpyDtoDAsync_v2(unsigned long long to, unsigned long long from, size_t bytes, void *) {
    std::lock_guard<std::mutex> lock(guard);
    finish();
    if (!inside(allocations, from, bytes) || !inside(allocations, to, bytes)) return INVALID_VALUE;
    std::memmove((void *)to, (const void *)from, bytes);
    return SUCCESS;
}

Result cuEventCreate(void **out, unsigned) {
    *out = &stream;
    return SUCCESS;
}
Result cuEventRecord(void *, void *) { return SUCCESS; }
Result cuEventSynchronize(void *) {
    std::lock_guard<std::mutex> lock(guard);
    finish();
    return SUCCESS;
}
Result cuEventDestroy_v2(void *) { return SUCCESS; }

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
    if (parameters(((Module *)module)->ptx, name) != (int)kernel->arguments) return NOT_FOUND;
    *out = &(functions[name] = {name, kernel});
    return SUCCESS;
}
Result cuLaunchKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                      unsigned block_y, unsigned block_z, unsigned shared, void *, void **values, void **extra) {
    std::lock_guard<std::mutex> lock(guard);
    finish();
    const Function &f = *(Function *)function;
    if (block_x != f.kernel->threads || block_y != 1 || block_z != 1 || shared || extra) return INVALID_VALUE;
    if (!grid_x || !grid_y || !grid_z || grid_x > 2147483647u || grid_y > 65535 || grid_z > 65535)
        return INVALID_VALUE;
    emulator::launch(f.name.c_str(), *f.kernel, {grid_x, grid_y, grid_z}, values);
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
