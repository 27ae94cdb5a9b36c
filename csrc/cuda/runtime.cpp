#include "cuda/runtime.h"

#include <stdexcept>

#if STARFLOW_CUDA
#include <cuda_runtime_api.h>
#endif

namespace starflow::cuda {

#if STARFLOW_CUDA
DeviceCount count_devices() {
    int driver = 0;
    int runtime = 0;
    if (cudaDriverGetVersion(&driver) == cudaSuccess && cudaRuntimeGetVersion(&runtime) == cudaSuccess) {
        if (const std::string reason = driver_reason(driver, runtime); !reason.empty()) return {0, reason};
    }
    int devices = 0;
    const cudaError_t code = cudaGetDeviceCount(&devices);
    if (code != cudaSuccess) return {0, error_text(code)};
    return {devices, devices > 0 ? "" : "this machine has no CUDA device"};
}

DeviceArch device_arch(int device) {
    const auto attribute = [device](cudaDeviceAttr which) {
        int value = 0;
        const cudaError_t code = cudaDeviceGetAttribute(&value, which, device);
        if (code != cudaSuccess) {
            throw std::runtime_error("starflow_ext: of cuda:" + std::to_string(device) + " CUDA says \"" +
                                     error_text(code) + '"');
        }
        return value;
    };
    return {attribute(cudaDevAttrComputeCapabilityMajor), attribute(cudaDevAttrComputeCapabilityMinor),
            attribute(cudaDevAttrMultiProcessorCount)};
}

bool is_capturing(void* stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    const cudaError_t code = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
    if (code != cudaSuccess)
        throw std::runtime_error("starflow_ext: of a stream CUDA says \"" + error_text(code) + '"');
    return status != cudaStreamCaptureStatusNone;
}

std::string error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
#else
DeviceCount count_devices() { return {0, "this build has no CUDA"}; }

DeviceArch device_arch(int) { throw std::runtime_error("starflow_ext: this build has no CUDA"); }

bool is_capturing(void*) { throw std::runtime_error("starflow_ext: this build has no CUDA"); }

std::string error_text(int code) { return "error " + std::to_string(code) + " in a build without CUDA"; }
#endif

}  // namespace starflow::cuda
