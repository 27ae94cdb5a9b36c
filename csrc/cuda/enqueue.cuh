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

// Run `kernel` on the stream. Returns the runtime's error code; what was wrong with the launch is not left for the next
// call to find.
template <class... Parameters, class... Arguments>
int enqueue(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            const Arguments&... arguments) {
    cudaError_t code = cudaSuccess;
    if (shared_bytes > shared_bytes_by_default) {
        code =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    }
    if (code == cudaSuccess) {
        cudaLaunchConfig_t config{};
        config.gridDim = grid;
        config.blockDim = block;
        config.dynamicSmemBytes = shared_bytes;
        config.stream = static_cast<cudaStream_t>(stream);
        code = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
    }
    if (code != cudaSuccess) cudaGetLastError();
    return static_cast<int>(code);
}

}  // namespace starflow::cuda
