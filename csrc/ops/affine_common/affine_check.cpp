#include "ops/affine_common/affine_check.h"

#include <cmath>

namespace starflow {

void check_soft_clip(const char* op, double soft_clip) {
    require(
        soft_clip >= 0.0 && std::isfinite(soft_clip), op, "soft_clip is", [&] { return number_text(soft_clip); },
        [] { return "a finite number >= 0"; });
}

void check_data(const char* op, const char* name, const Tensor& data, bool three_dimensional) {
    check_floating(op, name, data);
    require(
        three_dimensional ? data.dim() == 3 : data.dim() >= 2, op, std::string(name) + " has shape",
        [&] { return shape_text(shape_of(data)); },
        [&] { return three_dimensional ? "(batch, tokens, channels)" : "(..., tokens, channels)"; });
}

AffineShape check_raw(const char* op, const char* name, const Tensor& data, const Tensor& raw, int64_t activation,
                      double soft_clip, bool shifted, int64_t halves) {
    const auto scale = option_of<ScaleActivation>(op, "activation", activation, scale_activation_names);
    check_soft_clip(op, soft_clip);

    const Dtype data_dtype = *dtype_of(data);
    const std::optional<Dtype> raw_dtype = dtype_of(raw);
    const bool mixed = data_dtype == Dtype::float32 && (raw_dtype == Dtype::bfloat16 || raw_dtype == Dtype::float16);
    require(
        raw_dtype == data_dtype || mixed, op, "raw has dtype", [&] { return dtype_text(raw); },
        [&] {
            const std::string like = dtype_text(data);
            return like + (data_dtype == Dtype::float32 ? ", bfloat16 or float16" : "") + " for " + name + " of " +
                   like;
        });
    check_device(op, "raw", raw, name, data);

    std::vector<int64_t> expected = shape_of(data);
    expected.back() *= scale == ScaleActivation::none ? 1 : 2;
    expected.front() *= halves;
    require(
        shape_of(raw) == expected, op, "raw has shape", [&] { return shape_text(shape_of(raw)); },
        [&] { return shape_text(expected) + " for " + name + " of shape " + shape_text(shape_of(data)); });

    const int64_t tokens = data.size(data.dim() - 2);
    const int64_t channels = data.size(data.dim() - 1);
    int64_t batch = 1;
    for (int64_t d = 0; d < data.dim() - 2; ++d) batch *= data.size(d);
    return {batch, tokens, channels, data_dtype, *raw_dtype, {scale, soft_clip, shifted}};
}

void check_log_det(const char* op, const Tensor& grad_log_det, const Tensor& data, const AffineShape& shape) {
    std::vector<int64_t> expected = shape_of(data);
    expected.pop_back();
    check_tensor(op, "grad_log_det", grad_log_det, arithmetic_type(shape.data), expected, "x", data);
}

}  // namespace starflow
