#include "ops/affine_common/affine_check.h"

#include <cmath>

namespace starflow {
namespace {

std::optional<Activation> activation_of(const std::string& name) {
    if (name == "softplus") return Activation::softplus;
    if (name == "exp") return Activation::exponential;
    if (name == "none") return Activation::none;
    return std::nullopt;
}

// Leading dimensions (all but the last two) as one: their common innermost stride, or nothing.
std::optional<int64_t> leading_stride(const Tensor& tensor) {
    if (tensor.numel() == 0) return 0;
    int64_t stride = 0;
    int64_t extent = 1;  // elements of the dimensions seen so far
    for (int64_t d = tensor.dim() - 3; d >= 0; --d) {
        if (tensor.size(d) == 1) continue;
        if (extent == 1) {
            stride = tensor.stride(d);
        } else if (tensor.stride(d) != stride * extent) {
            return std::nullopt;
        }
        extent *= tensor.size(d);
    }
    return stride;
}

}  // namespace

void check_data(const char* op, const char* name, const Tensor& data, bool three_dimensional) {
    require(
        dtype_of(data).has_value(), op, std::string(name) + " has dtype", [&] { return dtype_text(data); },
        [] { return "float32, bfloat16, float16 or float64"; });
    require(
        three_dimensional ? data.dim() == 3 : data.dim() >= 2, op, std::string(name) + " has shape",
        [&] { return shape_text(shape_of(data)); },
        [&] { return three_dimensional ? "(batch, tokens, channels)" : "(..., tokens, channels)"; });
}

AffineShape check_raw(const char* op, const char* name, const Tensor& data, const Tensor& raw,
                      const std::string& activation, double soft_clip, bool shifted, int64_t halves) {
    const std::optional<Activation> known = activation_of(activation);
    require(
        known.has_value(), op, "activation is", [&] { return '"' + activation + '"'; },
        [] { return R"("softplus", "exp" or "none")"; });
    require(
        soft_clip >= 0.0 && std::isfinite(soft_clip), op, "soft_clip is", [&] { return number_text(soft_clip); },
        [] { return "a finite number >= 0"; });

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
    require(
        device_text(raw) == device_text(data), op, "raw is on", [&] { return device_text(raw); },
        [&] { return device_text(data) + " like " + name; });

    std::vector<int64_t> expected = shape_of(data);
    expected.back() *= *known == Activation::none ? 1 : 2;
    expected.front() *= halves;
    require(
        shape_of(raw) == expected, op, "raw has shape", [&] { return shape_text(shape_of(raw)); },
        [&] { return shape_text(expected) + " for " + name + " of shape " + shape_text(shape_of(data)); });

    const int64_t tokens = data.size(data.dim() - 2);
    const int64_t channels = data.size(data.dim() - 1);
    int64_t batch = 1;
    for (int64_t d = 0; d < data.dim() - 2; ++d) batch *= data.size(d);
    return {batch, tokens, channels, data_dtype, *raw_dtype, {*known, soft_clip, shifted}};
}

void check_like(const char* op, const char* name, const Tensor& tensor, const char* like_name, const Tensor& like) {
    require(
        tensor.scalar_type() == like.scalar_type(), op, std::string(name) + " has dtype",
        [&] { return dtype_text(tensor); }, [&] { return dtype_text(like) + " like " + like_name; });
    require(
        shape_of(tensor) == shape_of(like), op, std::string(name) + " has shape",
        [&] { return shape_text(shape_of(tensor)); },
        [&] { return shape_text(shape_of(like)) + " like " + like_name; });
    require(
        device_text(tensor) == device_text(like), op, std::string(name) + " is on", [&] { return device_text(tensor); },
        [&] { return device_text(like) + " like " + like_name; });
}

bool has_rows(const Tensor& tensor) {
    const int64_t last = tensor.dim() - 1;
    return (tensor.size(last) <= 1 || tensor.stride(last) == 1) && leading_stride(tensor).has_value();
}

Tensor with_rows(const Tensor& tensor) { return has_rows(tensor) ? tensor : torch::stable::contiguous(tensor); }

Rows rows_of(const Tensor& tensor) {
    return {tensor.data_ptr(), *leading_stride(tensor), tensor.stride(tensor.dim() - 2)};
}

void check_log_det(const char* op, const Tensor& grad_log_det, const Tensor& data, const AffineShape& shape) {
    std::vector<int64_t> expected = shape_of(data);
    expected.pop_back();
    require(
        grad_log_det.scalar_type() == arithmetic_type(shape.data), op, "grad_log_det has dtype",
        [&] { return dtype_text(grad_log_det); }, [&] { return shape.data == Dtype::float64 ? "float64" : "float32"; });
    require(
        shape_of(grad_log_det) == expected, op, "grad_log_det has shape",
        [&] { return shape_text(shape_of(grad_log_det)); }, [&] { return shape_text(expected); });
    require(
        device_text(grad_log_det) == device_text(data), op, "grad_log_det is on",
        [&] { return device_text(grad_log_det); }, [&] { return device_text(data); });
}

}  // namespace starflow
