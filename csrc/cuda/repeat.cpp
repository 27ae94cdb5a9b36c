#include "cuda/repeat.h"

#include <array>
#include <atomic>
#include <stdexcept>

#if STARFLOW_CUDA
#include <cuda_runtime_api.h>
#endif

namespace starflow::cuda {
namespace {

constexpr std::array<const char*, 3> names{"graph", "step", "loop"};
constexpr int none = -1;
std::atomic<int> override_{none};

bool has_while_nodes() {
#if STARFLOW_CUDA
    constexpr int first = 12040;
    int driver = 0;
    return CUDART_VERSION >= first && cudaDriverGetVersion(&driver) == cudaSuccess && driver >= first;
#else
    return false;
#endif
}

}  // namespace

Repeat chosen_repeat() {
    const int asked = override_.load();
    if (asked != none) return static_cast<Repeat>(asked);
    return has_while_nodes() ? Repeat::graph : Repeat::step;
}

std::string repeat_name() { return names[static_cast<size_t>(chosen_repeat())]; }

void set_repeat(const std::string& name) {
    if (name.empty()) {
        override_ = none;
        return;
    }
    for (size_t i = 0; i < names.size(); ++i) {
        if (name == names[i]) {
            override_ = static_cast<int>(i);
            return;
        }
    }
    throw std::runtime_error("set_repeat: name is \"" + name + R"(", expected "graph", "step", "loop" or "")");
}

}  // namespace starflow::cuda
