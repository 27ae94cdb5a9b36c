// csrc/cuda/enqueue.cuh for the emulated device.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <type_traits>

#define STARFLOW_SHARED_MEMORY(name) unsigned char* const name = ::emulation::shared_memory()

namespace starflow::cuda {

inline void await_earlier_launches() { emulation::await_earlier_launches(); }

template <class... Parameters>
bool waits_for_earlier_launches(void (*)(Parameters...)) {
    return true;
}

template <class... Parameters, class... Arguments>
int enqueue_early(bool early, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                  const Arguments&... arguments) {
    const auto run = [=] { kernel(static_cast<Parameters>(arguments)...); };
    using Run = decltype(run);
    const emulation::Region image{__ehdr_start, _end};
    static_assert(std::is_trivially_copyable_v<Run>);
    return emulation::launch_on(
        stream, {grid, block, shared_bytes, early, image},
        [](const void* closure) { (*static_cast<const Run*>(closure))(); }, &run, sizeof(run));
}

template <class... Parameters, class... Arguments>
int enqueue(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            const Arguments&... arguments) {
    return enqueue_early(false, kernel, grid, block, shared_bytes, stream, arguments...);
}

}  // namespace starflow::cuda
