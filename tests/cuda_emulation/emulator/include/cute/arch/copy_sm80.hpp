// CuTe's cp.async on the emulated device: the hardware's atoms are renamed away.
#pragma once
#include <cuda_runtime.h>

#define SM80_CP_ASYNC_CACHEALWAYS SM80_CP_ASYNC_CACHEALWAYS_of_hardware
#define SM80_CP_ASYNC_CACHEGLOBAL SM80_CP_ASYNC_CACHEGLOBAL_of_hardware
#define SM80_CP_ASYNC_CACHEALWAYS_ZFILL SM80_CP_ASYNC_CACHEALWAYS_ZFILL_of_hardware
#define SM80_CP_ASYNC_CACHEGLOBAL_ZFILL SM80_CP_ASYNC_CACHEGLOBAL_ZFILL_of_hardware
#define cp_async_fence cp_async_fence_of_hardware
#define cp_async_wait cp_async_wait_of_hardware
#include_next <cute/arch/copy_sm80.hpp>
#undef SM80_CP_ASYNC_CACHEALWAYS
#undef SM80_CP_ASYNC_CACHEGLOBAL
#undef SM80_CP_ASYNC_CACHEALWAYS_ZFILL
#undef SM80_CP_ASYNC_CACHEGLOBAL_ZFILL
#undef cp_async_fence
#undef cp_async_wait

namespace cute {

template <class Source, class Target = Source>
struct SM80_CP_ASYNC_CACHEALWAYS {
    using SRegisters = Source[1];
    using DRegisters = Target[1];
    static_assert(sizeof(Source) == sizeof(Target));
    static_assert(sizeof(Source) == 4 || sizeof(Source) == 8 || sizeof(Source) == 16);

    static void copy(const Source& source, Target& target) {
        emulation::copy_async(&target, &source, sizeof(Source), sizeof(Source));
    }
};

template <class Source, class Target = Source>
struct SM80_CP_ASYNC_CACHEGLOBAL : SM80_CP_ASYNC_CACHEALWAYS<Source, Target> {
    static_assert(sizeof(Source) == 16);
};

template <class Source, class Target = Source>
struct SM80_CP_ASYNC_CACHEALWAYS_ZFILL : SM80_CP_ASYNC_CACHEALWAYS<Source, Target> {
    static void copy(const Source& source, Target& target, bool valid) {
        emulation::copy_async(&target, &source, sizeof(Source), valid ? sizeof(Source) : 0);
    }
};

template <class Source, class Target = Source>
struct SM80_CP_ASYNC_CACHEGLOBAL_ZFILL : SM80_CP_ASYNC_CACHEALWAYS_ZFILL<Source, Target> {
    static_assert(sizeof(Source) == 16);
};

inline void cp_async_fence() { emulation::commit_copies(); }
template <int pending>
void cp_async_wait() {
    emulation::wait_copies(pending == 0 ? -1 : pending);
}
template <int pending>
void cp_async_wait(Int<pending>) {
    cp_async_wait<pending>();
}

}  // namespace cute
