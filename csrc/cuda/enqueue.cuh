// How a kernel is launched, and how it names its dynamic shared memory. No other file writes <<<>>> or
// `extern __shared__`, which are no C++: tests/cuda_emulation has this file for a device in software.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>

// The dynamic shared memory of a block, as bytes, aligned as swizzles of 128 bytes and bulk copies need it.
#define STARFLOW_SHARED_MEMORY(name) extern __shared__ __align__(1024) unsigned char name[]

namespace starflow::cuda {

// Without opting in, a block has no more dynamic shared memory than this.
inline constexpr size_t shared_bytes_by_default = size_t{48} << 10;

// Every kernel that may be launched early calls this, by all of its threads and before they touch memory: it waits
// until the launches before this one have ended, what they wrote is there, and then lets the next early one begin. So
// at most two launches of a chain run at a time, and what the later one does before this call hides its start.
__device__ inline void await_earlier_launches() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" : : : "memory");
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Whether the code of a kernel that this device runs waits in await_earlier_launches: code that was compiled for sm_80
// does not, on later devices neither.
template <class... Parameters>
bool waits_for_earlier_launches(void (*kernel)(Parameters...)) {
    constexpr int first = 90;
    cudaFuncAttributes attributes{};
    if (cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess) return attributes.ptxVersion >= first;
    cudaGetLastError();
    return false;
}

// Run `kernel` on the stream, if `early` before the launch in front of it has ended (programmatic dependent launch).
// Returns the runtime's error code; what was wrong with the launch is not left for the next call to find.
template <class... Parameters, class... Arguments>
int enqueue_early(bool early, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                  const Arguments&... arguments) {
    cudaError_t code = cudaSuccess;
    if (shared_bytes > shared_bytes_by_default) {
        code =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    }
    if (code == cudaSuccess) {
        cudaLaunchAttribute attribute{};
        attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attribute.val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t config{};
        config.gridDim = grid;
        config.blockDim = block;
        config.dynamicSmemBytes = shared_bytes;
        config.stream = static_cast<cudaStream_t>(stream);
        config.attrs = &attribute;
        config.numAttrs = early ? 1 : 0;
        code = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
    }
    if (code != cudaSuccess) cudaGetLastError();
    return static_cast<int>(code);
}

// The same behind the launch in front of it.
template <class... Parameters, class... Arguments>
int enqueue(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            const Arguments&... arguments) {
    return enqueue_early(false, kernel, grid, block, shared_bytes, stream, arguments...);
}

}  // namespace starflow::cuda
