#include "ops/linear/linear_choice.h"

#include <atomic>
#include <stdexcept>

namespace starflow {
namespace {

std::atomic<LinearRequest> request{LinearRequest::by_device};

}  // namespace

LinearChoice linear_choice_of(int major, int64_t channels) {
    return linear_choice(major, channels, request.load(), STARFLOW_SM90 != 0, STARFLOW_SM100 != 0);
}

LinearKernel linear_kernel(int major) {
    switch (linear_choice_of(major, 1)) {
        case LinearChoice::wgmma:
            return LinearKernel::wgmma;
        case LinearChoice::tcgen05:
            return LinearKernel::tcgen05;
        default:
            return LinearKernel::mma_sync;
    }
}

void set_linear_kernel(const std::string& name) {
    if (name.empty()) {
        request = LinearRequest::by_device;
    } else if (name == "portable") {
        request = LinearRequest::portable;
    } else if (name == "own") {
        request = LinearRequest::own;
    } else {
        throw std::runtime_error("set_linear_kernel: name is \"" + name + R"(", expected "portable", "own" or "")");
    }
}

}  // namespace starflow
