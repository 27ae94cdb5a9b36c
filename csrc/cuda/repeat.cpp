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
#if STARFLOW_CUDA && CUDART_VERSION >= 12030
constexpr bool has_early_launches = true;
#else
constexpr bool has_early_launches = false;
#endif
std::atomic<bool> early_{true};

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

bool early_launches() { return has_early_launches && early_.load(); }

void set_early_launches(bool on) { early_ = on; }

}  // namespace starflow::cuda
