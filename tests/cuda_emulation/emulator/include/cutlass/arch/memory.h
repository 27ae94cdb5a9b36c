// CUTLASS's loads and stores, which are assembly, on the emulated device.
#pragma once
#include <cuda_runtime.h>
#include <cutlass/arch/cache_operation.h>
#include <cutlass/cutlass.h>

namespace cutlass {
namespace arch {

template <int bytes>
struct alignas(bytes < 16 ? bytes : 16) EmulatedBytes {
    unsigned char values[bytes];
};

template <int bytes>
void emulated_copy(const void* from, void* to) {
    if (reinterpret_cast<uintptr_t>(from) % alignof(EmulatedBytes<bytes>) != 0 ||
        reinterpret_cast<uintptr_t>(to) % alignof(EmulatedBytes<bytes>) != 0) {
        emulation::fail("an access of %d bytes at a misaligned address", bytes);
    }
    *static_cast<EmulatedBytes<bytes>*>(to) = *static_cast<const EmulatedBytes<bytes>*>(from);
}

template <typename Access, int bytes, CacheOperation::Kind operation = CacheOperation::Always>
struct global_load {
    global_load(Access& to, const void* from, bool guard) {
        if (guard) emulated_copy<bytes>(from, &to);
    }
};
template <typename Access, int bytes>
struct global_store {
    global_store(const Access& from, void* to, bool guard) {
        if (guard) emulated_copy<bytes>(&from, to);
    }
};
template <int bytes>
void shared_load(void* to, uint32_t from) {
    emulated_copy<bytes>(emulation::shared_pointer(from), to);
}
template <int bytes>
void shared_store(uint32_t to, const void* from) {
    emulated_copy<bytes>(from, emulation::shared_pointer(to));
}

}  // namespace arch
}  // namespace cutlass

#include <cutlass/arch/memory_sm75.h>
#include <cutlass/arch/memory_sm80.h>
