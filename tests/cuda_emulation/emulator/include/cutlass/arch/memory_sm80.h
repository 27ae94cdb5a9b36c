// CUTLASS's cp.async on the emulated device.
#pragma once
#include <cuda_runtime.h>
#include <cutlass/arch/cache_operation.h>
#include <cutlass/arch/memory.h>
#include <cutlass/complex.h>

namespace cutlass {
namespace arch {

template <int bytes, CacheOperation::Kind operation = CacheOperation::Always>
struct cp_async {
    cp_async(void* to, const void* from, bool guard = true) {
        if (guard) emulation::copy_async(to, from, bytes, bytes);
    }
};
template <int bytes, CacheOperation::Kind operation = CacheOperation::Always>
struct cp_async_zfill {
    cp_async_zfill(void* to, const void* from, bool guard) {
        emulation::copy_async(to, from, bytes, guard ? bytes : 0);
    }
};
template <int bytes, CacheOperation::Kind operation = CacheOperation::Always>
struct cp_async_nan;
template <typename Element, bool hermitian = false>
struct cp_async_diag;

inline void cp_async_fence() { emulation::commit_copies(); }
template <int pending>
void cp_async_wait() {
    emulation::wait_copies(pending == 0 ? -1 : pending);
}

}  // namespace arch
}  // namespace cutlass
