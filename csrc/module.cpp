// The pybind11 module starflow_ext._C: what is not a tensor op, and the names, numbers and orders that Python shares
// with the kernels. It links to the op library and not to torch; the op library is loaded first, by torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "build_config.h"
#include "cpu/fingerprint.h"
#include "cpu/isa.h"
#include "cuda/repeat.h"
#include "cuda/runtime.h"
#include "ops/affine_common/affine_args.h"
#include "ops/block_attention/block_attention_schedule.h"
#include "ops/jacobi_solve/jacobi_rule.h"
#include "ops/jacobi_sweep/sweep_order.h"
#include "ops/linear/linear.h"
#include "ops/linear/linear_choice.h"
#include "ops/norm/norm.h"
#include "ops/rope_append/rope_append.h"

namespace py = pybind11;
namespace cpu = starflow::cpu;

namespace {

template <class Names>
py::list list_of(const Names& names) {
    py::list list;
    for (const char* name : names) list.append(name);
    return list;
}

// Of each option, the names of its values in the order of its enum: the number is what a native op takes.
py::dict options() {
    using namespace starflow;
    py::dict found;
    found["scale_activation"] = list_of(scale_activation_names);
    found["norm_kind"] = list_of(norm_kind_names);
    found["matrix_storage"] = list_of(matrix_storage_names);
    found["product_input"] = list_of(product_input_names);
    found["epilogue"] = list_of(epilogue_names);
    found["pairing"] = list_of(pairing_names);
    found["dtype"] = list_of(dtype_names);
    found["attention_kernel"] = list_of(attention_kernel_names);
    found["linear_choice"] = list_of(linear_choice_names);
    return found;
}

// What the references and checks in Python share with the kernels.
py::dict constants() {
    using namespace starflow;
    py::dict found;
    found["softplus_bias"] = softplus_bias;
    found["log_scale_limit"] = log_scale_limit;
    found["scale_limit"] = scale_limit;
    found["layer_norm_epsilon"] = layer_norm_epsilon;
    found["rms_norm_epsilon"] = rms_norm_epsilon;
    found["panel_columns"] = panel_columns;
    found["depth_multiple"] = depth_multiple;
    found["key_block"] = key_block;
    found["linear_row_multiple"] = linear_row_multiple;
    found["norm_most_channels_cuda"] = norm_most_channels_cuda;
    found["rope_append_most_head_dim_cuda"] = rope_append_most_head_dim_cuda;
    found["block_attention_most_head_dim_cuda"] = most_head_dim;
    found["wild"] = wild;
    return found;
}

// The order of the numbers and tensors of a block.
py::dict orders() {
    using namespace starflow;
    py::dict found;
    found["block_sizes"] = list_of(block_size_names);
    found["block_tensors"] = list_of(block_tensor_names);
    found["layer_tensors"] = list_of(layer_tensor_names);
    return found;
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
    m.doc() = "Build and machine information, the choice of variants, and what Python shares with the kernels.";
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
    // The levels of <op>_cpu.cpp and of <op>_dot.cpp.
    m.def("kernel_levels", [] {
        py::dict levels;
        for (const auto& [kind, count] : {std::pair{"cpu", cpu::cpu_isa_count}, std::pair{"dot", cpu::isa_count}}) {
            py::list names;
            for (int level = 0; level < count; ++level) names.append(cpu::isa_names[level]);
            levels[kind] = names;
        }
        return levels;
    });
    m.def("options", &options);
    m.def("constants", &constants);
    m.def("orders", &orders);
    m.def("cpu_features", [] {
        py::dict features;
        for (const cpu::Feature& feature : cpu::features()) features[feature.name.c_str()] = feature.reason;
        return features;
    });
    m.def("selected_isa", [] { return std::string(cpu::isa_names[static_cast<int>(cpu::selected())]); });
    m.def("set_isa", &cpu::set_override, py::arg("name"));
    // Of tensors that the caller holds: addresses and bytes; see csrc/cpu/fingerprint.h.
    m.def(
        "fingerprint",
        [](const std::vector<std::pair<uintptr_t, int64_t>>& tensors, int64_t most_lines) {
            std::vector<cpu::MemoryBlock> blocks;
            blocks.reserve(tensors.size());
            for (const auto& [address, bytes] : tensors) {
                // Python knows addresses as numbers.
                // NOLINTNEXTLINE(performance-no-int-to-ptr)
                blocks.push_back({reinterpret_cast<const void*>(address), bytes});
            }
            const py::gil_scoped_release released;
            return cpu::fingerprint(blocks.data(), static_cast<int64_t>(blocks.size()), most_lines);
        },
        py::arg("tensors"), py::arg("most_lines"));
    m.def("repeat", &starflow::cuda::repeat_name);
    m.def("set_repeat", &starflow::cuda::set_repeat, py::arg("name"));
    // Of a device of compute capability `major` and a weight of so many input channels: the number of a LinearChoice.
    m.def(
        "linear_choice",
        [](int major, int64_t channels) { return static_cast<int>(starflow::linear_choice_of(major, channels)); },
        py::arg("major"), py::arg("channels"));
    m.def("set_linear_kernel", &starflow::set_linear_kernel, py::arg("name"));
    m.def("set_early_launches", &starflow::cuda::set_early_launches, py::arg("on"));
    m.def("cuda_devices", [] {
        const starflow::cuda::DeviceCount found = starflow::cuda::count_devices();
        return py::make_tuple(found.devices, found.reason);
    });
}
