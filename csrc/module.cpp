// The pybind11 module starflow_ext._C: what is not a tensor op. It links to the op library and not to torch; the op
// library is loaded first, by torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "build_config.h"
#include "cpu/isa.h"
#include "cuda/repeat.h"
#include "cuda/runtime.h"

namespace py = pybind11;
namespace cpu = starflow::cpu;

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
    m.doc() = "Build and machine information, and the choice of variants.";
    m.def("build_info", [] {
        py::dict info;
        info["version"] = STARFLOW_VERSION;
        info["torch_built_with"] = STARFLOW_TORCH_VERSION;
        info["torch_target"] = STARFLOW_TORCH_TARGET;
        info["compiler"] = STARFLOW_COMPILER;
        info["cuda"] = static_cast<bool>(STARFLOW_CUDA);
        info["cuda_compiler"] = STARFLOW_CUDA_COMPILER;
        info["cuda_architectures"] = STARFLOW_CUDA_ARCHITECTURES;
        return info;
    });
    m.def("isa_levels", [] {
        py::dict levels;
        for (int level = 0; level < cpu::isa_count; ++level) {
            levels[cpu::isa_names[level]] = cpu::why_not(static_cast<cpu::Isa>(level));
        }
        return levels;
    });
    m.def("cpu_features", [] {
        py::dict features;
        for (const cpu::Feature& feature : cpu::features()) features[feature.name.c_str()] = feature.reason;
        return features;
    });
    m.def("selected_isa", [] { return std::string(cpu::isa_names[static_cast<int>(cpu::selected())]); });
    m.def("set_isa", &cpu::set_override, py::arg("name"));
    m.def("repeat", &starflow::cuda::repeat_name);
    m.def("set_repeat", &starflow::cuda::set_repeat, py::arg("name"));
    m.def("cuda_devices", [] {
        const starflow::cuda::DeviceCount found = starflow::cuda::count_devices();
        return py::make_tuple(found.devices, found.reason);
    });
}
