// Schema, checks and choice of variant; the layout is in csrc/cpu/panels.h.
#include "ops/linear/linear_pack.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "common/devices.h"
#include "cpu/isa.h"
#include "cpu/pages.h"
#include "cpu/parallel.h"
#include "ops/linear/packed_weight.h"

namespace starflow {
namespace {

constexpr const char* op = "linear_pack";

const cpu::Variants<LinearPackKernels> variants{STARFLOW_VARIANTS(linear_pack)};

void check_finite(const Tensor& column_scale) {
    const auto* scale = static_cast<const float*>(column_scale.data_ptr());
    for (int64_t row = 0; row < column_scale.numel(); ++row) {
        require(
            std::isfinite(scale[row]), op, "weight has",
            [&] { return "NaN or infinity in output channel " + std::to_string(row); },
            [] { return "finite values for storage \"int8\""; });
    }
}

std::tuple<Tensor, Tensor> pack_on_device(const Tensor& weight, MatrixStorage storage) {
    check_device_storage(op, storage, weight);
    Tensor rows =
        torch::stable::new_zeros(weight, device_rows_shape(weight.size(0), weight.size(1)), panels_type(storage));
    Tensor values = torch::stable::narrow(rows, 1, 0, weight.size(1));
    torch::stable::copy_(values, weight);
    return {rows, empty_like_shape(weight, {0}, ScalarType::Float)};
}

std::tuple<Tensor, Tensor> run_pack(Tensor weight, int64_t storage) {
    const std::optional<Dtype> dtype = dtype_of(weight);
    require(
        dtype.has_value(), op, "weight has dtype", [&] { return dtype_text(weight); },
        [] { return "float32, bfloat16, float16 or float64"; });
    require(
        weight.dim() == 2, op, "weight has shape", [&] { return shape_text(shape_of(weight)); },
        [] { return "(out_channels, in_channels)"; });
    const auto kind = option_of<MatrixStorage>(op, "storage", storage, matrix_storage_names);
    if (weight.is_cuda()) return pack_on_device(weight, kind);
    if (dtype == Dtype::float64) weight = torch::stable::to(weight, ScalarType::Float);
    if (weight.size(1) > 1 && weight.stride(1) != 1) weight = torch::stable::contiguous(weight);
    const int64_t out_channels = weight.size(0);
    const int64_t in_channels = weight.size(1);
    const Tensor panels = new_result(weight, panels_shape(kind, out_channels, in_channels), panels_type(kind));
    // Weights are read from end to end, with a walk of the page table for each page: a sweep of width 768 takes a tenth
    // less time with large pages.
    cpu::prefer_large_pages(panels, int64_t{2} * 1024 * 1024);
    const Tensor column_scale =
        empty_like_shape(weight, {kind == MatrixStorage::int8 ? out_channels : 0}, ScalarType::Float);
    const LinearPackArgs args{weight.data_ptr(), *dtype_of(weight),
                              out_channels,      in_channels,
                              weight.stride(0),  kind,
                              panels.data_ptr(), static_cast<float*>(column_scale.data_ptr())};
    const LinearPackKernels& kernels = variants.pick();
    cpu::parallel_rows(panels.size(0), panel_columns * round_up(in_channels, depth_multiple),
                       [&](int64_t begin, int64_t end) { kernels.pack(args, begin, end); });
    check_finite(column_scale);
    return {panels, column_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(starflow_ext, m) {
    m.def("linear_pack(Tensor weight, int storage) -> (Tensor panels, Tensor column_scale)");
}

STARFLOW_IMPLEMENT(m) { m.impl("linear_pack", TORCH_BOX(&run_pack)); }

}  // namespace starflow
