// Guard, stream, launch and check in one call, without linking to CUDA torch.
#pragma once
#include "common/tensor.h"

namespace starflow::cuda {

// torch's current stream on a device. Never called for a tensor on the CPU.
void* current_stream(int32_t device);

// Refuses data on a CUDA device where this build has no kernels for one.
void check_build(const char* op, const std::string& name, const Tensor& data);

// Refuses a call whose host has to read what the device computes, while torch's current stream is captured into a
// graph.
void refuse_capture(const char* op, const Tensor& data, const std::string& why);

// Throws std::runtime_error with the runtime's words if `code` is not success.
void check(const char* op, int code);

// Run `launch(args, stream)` on the device of `data`.
template <class Args>
void launch(const char* op, const Tensor& data, const Args& args, int (*launcher)(const Args&, void*)) {
    const torch::stable::accelerator::DeviceGuard guard(data.get_device_index());
    check(op, launcher(args, current_stream(data.get_device_index())));
}

}  // namespace starflow::cuda
