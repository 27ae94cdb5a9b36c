#include "common/tensor.h"

#include <algorithm>
#include <sstream>

namespace starflow {
namespace {

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

int32_t device_type_of(const Tensor& tensor) {
    int32_t type = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
    return type;
}

}  // namespace

std::optional<Dtype> dtype_of(const Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float:
            return Dtype::float32;
        case ScalarType::BFloat16:
            return Dtype::bfloat16;
        case ScalarType::Half:
            return Dtype::float16;
        case ScalarType::Double:
            return Dtype::float64;
        default:
            return std::nullopt;
    }
}

std::string dtype_text(const Tensor& tensor) { return type_text(tensor.scalar_type()); }

std::string type_text(ScalarType type) {
    switch (type) {
        case ScalarType::Float:
            return "float32";
        case ScalarType::BFloat16:
            return "bfloat16";
        case ScalarType::Half:
            return "float16";
        case ScalarType::Double:
            return "float64";
        case ScalarType::Int:
            return "int32";
        case ScalarType::Long:
            return "int64";
        case ScalarType::Bool:
            return "bool";
        default:
            return torch::headeronly::toString(type);
    }
}

std::string device_text(const Tensor& tensor) {
    if (tensor.is_cpu()) return "cpu";
    if (tensor.is_cuda()) return "cuda:" + std::to_string(tensor.get_device_index());
    return "another device";
}

std::string shape_text(const std::vector<int64_t>& shape) {
    std::ostringstream text;
    text << '[';
    for (size_t i = 0; i < shape.size(); ++i) text << (i > 0 ? ", " : "") << shape[i];
    text << ']';
    return text.str();
}

std::vector<int64_t> shape_of(const Tensor& tensor) {
    const auto sizes = tensor.sizes();
    return {sizes.begin(), sizes.end()};
}

std::string number_text(double value) {
    std::ostringstream text;
    text << value;
    return text.str();
}

ScalarType arithmetic_type(Dtype dtype) { return dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float; }

// torch::stable::new_empty goes through the dispatcher, by the op's name.
Tensor empty_like_shape(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
    std::vector<int64_t> strides(shape.size(), 1);
    for (size_t d = shape.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(shape[d], 1);
    const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
    AtenTensorHandle empty = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                                                    dtype, device_type_of(like), like.get_device_index(), &empty));
    return Tensor(empty);
}

bool same_device(const Tensor& a, const Tensor& b) {
    return device_type_of(a) == device_type_of(b) && a.get_device_index() == b.get_device_index();
}

bool has_shape(const Tensor& tensor, const std::vector<int64_t>& shape) {
    const auto sizes = tensor.sizes();
    return std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
}

bool has_rows(const Tensor& tensor) {
    const int64_t last = tensor.dim() - 1;
    return (tensor.size(last) <= 1 || tensor.stride(last) == 1) && leading_stride(tensor).has_value();
}

Tensor with_rows(const Tensor& tensor) { return has_rows(tensor) ? tensor : torch::stable::contiguous(tensor); }

Rows rows_of(const Tensor& tensor) {
    return {tensor.data_ptr(), *leading_stride(tensor), tensor.stride(tensor.dim() - 2)};
}

Tensor as_parameter(const Tensor& tensor, ScalarType type) {
    return torch::stable::contiguous(tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type));
}

}  // namespace starflow
