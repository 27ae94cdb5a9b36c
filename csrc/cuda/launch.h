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

// The same for a launcher that asks for memory: without a workspace it enqueues nothing, and *workspace_bytes gets the
// size. The memory is torch's, which gives it to others on this stream alone once the call has returned.
template <class Args>
void launch_in_workspace(const char* op, const Tensor& data, Args args, int (*launcher)(const Args&, void*)) {
    int64_t bytes = 0;
    args.workspace = nullptr;
    args.workspace_bytes = &bytes;
    launch(op, data, args, launcher);
    const Tensor workspace = empty_like_shape(data, {bytes}, ScalarType::Byte);
    args.workspace = workspace.data_ptr();
    launch(op, data, args, launcher);
}

}  // namespace starflow::cuda
