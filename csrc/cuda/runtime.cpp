#include "cuda/runtime.h"

#if STARFLOW_CUDA
#include <cuda_runtime_api.h>
#endif

namespace starflow::cuda {

#if STARFLOW_CUDA
DeviceCount count_devices() {
    int devices = 0;
    const cudaError_t code = cudaGetDeviceCount(&devices);
    if (code != cudaSuccess) return {0, error_text(code)};
    return {devices, devices > 0 ? "" : "this machine has no CUDA device"};
}

std::string error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
#else
DeviceCount count_devices() { return {0, "this build has no CUDA"}; }

std::string error_text(int code) { return "error " + std::to_string(code) + " in a build without CUDA"; }
#endif

}  // namespace starflow::cuda
