#include "common/check.h"

namespace starflow {

void check_floating(const char* op, const char* name, const Tensor& tensor) {
    require(
        dtype_of(tensor).has_value(), op, named(name, " has dtype"), [&] { return dtype_text(tensor); },
        [] { return "float32, bfloat16, float16 or float64"; });
}

void check_like(const char* op, const char* name, const Tensor& tensor, const char* like_name, const Tensor& like) {
    require(
        tensor.scalar_type() == like.scalar_type(), op, named(name, " has dtype"), [&] { return dtype_text(tensor); },
        [&] { return dtype_text(like) + " like " + like_name; });
    require(
        has_shape(tensor, shape_of(like)), op, named(name, " has shape"), [&] { return shape_text(shape_of(tensor)); },
        [&] { return shape_text(shape_of(like)) + " like " + like_name; });
    check_device(op, name, tensor, like_name, like);
}

void check_tensor(const char* op, const char* name, const Tensor& tensor, ScalarType type,
                  const std::vector<int64_t>& shape, const char* like_name, const Tensor& like) {
    require(
        tensor.scalar_type() == type, op, named(name, " has dtype"), [&] { return dtype_text(tensor); },
        [&] { return type_text(type); });
    require(
        has_shape(tensor, shape), op, named(name, " has shape"), [&] { return shape_text(shape_of(tensor)); },
        [&] { return shape_text(shape); });
    check_device(op, name, tensor, like_name, like);
}

void check_own_memory(const char* op, const char* name, const Tensor& tensor) {
    for (int64_t d = 0; d < tensor.dim(); ++d) {
        require(
            tensor.size(d) <= 1 || tensor.stride(d) != 0, op, named(name, " has"),
            [] { return "elements that share memory"; },
            [] { return "a tensor of its own (an expanded one cannot be written; use .clone())"; });
    }
}

void check_device(const char* op, const char* name, const Tensor& tensor, const char* like_name, const Tensor& like) {
    require(
        same_device(tensor, like), op, named(name, " is on"), [&] { return device_text(tensor); },
        [&] { return device_text(like) + " like " + like_name; });
}

}  // namespace starflow
