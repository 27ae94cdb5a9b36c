#include "cuda/launch.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>

#include "common/check.h"
#include "cuda/runtime.h"

namespace starflow::cuda {

void* current_stream(int32_t device) {
    // The stable ABI of torch 2.10 has no call for the native handle of a stream; CUDA builds of torch have this one,
    // in a library that is loaded whenever a CUDA tensor exists.
    using CurrentStream = int (*)(int32_t, void**);
    static const auto find = [] {
        void* symbol = dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
        if (symbol == nullptr) {
            if (void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD)) {
                symbol = dlsym(library, "aoti_torch_get_current_cuda_stream");
            }
        }
        return reinterpret_cast<CurrentStream>(symbol);
    }();
    if (find == nullptr) {
        throw std::runtime_error(
            "starflow_ext: torch's CUDA library has no aoti_torch_get_current_cuda_stream, expected a CUDA build of "
            "torch >= 2.10");
    }
    void* stream = nullptr;
    if (find(device, &stream) != 0) {
        throw std::runtime_error("starflow_ext: torch gave no current stream for cuda:" + std::to_string(device));
    }
    return stream;
}

void check_build(const char* op, const std::string& name, const Tensor& data) {
    require(
        STARFLOW_CUDA != 0, op, name + " is on", [&] { return device_text(data); },
        [] { return "cpu: this build has no CUDA kernels (build with STARFLOW_CUDA=ON)"; });
}

void refuse_capture(const char* op, const Tensor& data, const std::string& why) {
    require(
        !is_capturing(current_stream(data.get_device_index())), op, "stream is", [] { return "capturing a graph"; },
        [&] { return "one that is not: " + why; });
}

void check(const char* op, int code) {
    if (code != 0) throw std::runtime_error(std::string(op) + ": CUDA says \"" + error_text(code) + '"');
}

}  // namespace starflow::cuda
