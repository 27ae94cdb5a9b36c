// What the CUDA runtime knows, for builds with and without it: no torch.
#pragma once
#include <string>

#include "common/api.h"

namespace starflow::cuda {

struct DeviceCount {
    int devices;
    std::string reason;  // why there is none; empty where there are some
};

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
