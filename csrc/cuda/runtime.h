// What the CUDA runtime knows, for builds with and without it: no torch.
#pragma once
#include <string>

#include "common/api.h"

namespace starflow::cuda {

struct DeviceCount {
    int devices;
    std::string reason;  // why there is none; empty where there are some
};

// Why the kernels cannot run with a driver of this version (0: there is none) and the runtime that they are linked
// with, both as CUDA numbers them (13000 is 13.0); empty where they can.
inline std::string driver_reason(int driver, int runtime) {
    const auto text = [](int version) {
        return std::to_string(version / 1000) + '.' + std::to_string(version % 1000 / 10);
    };
    if (driver == 0) return "this machine has no NVIDIA driver (libcuda.so.1), expected one for CUDA " + text(runtime);
    // A driver serves all runtimes of its major version.
    if (driver / 1000 >= runtime / 1000) return "";
    return "the NVIDIA driver serves CUDA up to " + text(driver) + ", expected " + text(runtime) +
           ": install a newer driver";
}

// Asks the driver: not for import time.
STARFLOW_API DeviceCount count_devices();

struct DeviceArch {
    int major;  // compute capability
    int minor;
    int multiprocessors;
};

// Throws std::runtime_error where there is no such device.
DeviceArch device_arch(int device);

// Whether what is enqueued on a stream is captured into a graph. Throws std::runtime_error if the runtime says neither.
bool is_capturing(void* stream);

// The runtime's words for an error code.
std::string error_text(int code);

}  // namespace starflow::cuda
