#include "common/check.h"

#include <algorithm>
#include <cstdint>

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

namespace {

// An axis of a tensor in memory, in elements.
struct Axis {
    int64_t stride;
    int64_t size;
};

// The axes of more than one element, the largest stride first.
std::vector<Axis> axes_of(const Tensor& tensor) {
    std::vector<Axis> axes;
    for (int64_t d = 0; d < tensor.dim(); ++d) {
        if (tensor.size(d) > 1) axes.push_back({tensor.stride(d), tensor.size(d)});
    }
    std::sort(axes.begin(), axes.end(), [](const Axis& a, const Axis& b) { return a.stride > b.stride; });
    return axes;
}

// Elements from the first to the last one of the axes from `begin` on.
int64_t reach(const std::vector<Axis>& axes, size_t begin) {
    int64_t sum = 0;
    for (size_t i = begin; i < axes.size(); ++i) sum += axes[i].stride * (axes[i].size - 1);
    return sum;
}

// An axis of two tensors of one stride: how far, in steps, an element of the first may be behind one of the second,
// and in front of it.
struct Steps {
    int64_t stride;
    int64_t behind;
    int64_t front;
};

// Whether `apart` elements are a sum of steps along the axes from `at` on.
bool meet(const std::vector<Steps>& axes, size_t at, int64_t apart) {
    if (at == axes.size()) return apart == 0;
    int64_t least = 0;
    int64_t most = 0;
    for (size_t i = at; i < axes.size(); ++i) {
        least -= axes[i].stride * axes[i].behind;
        most += axes[i].stride * axes[i].front;
    }
    if (apart < least || apart > most) return false;
    // Strides are longer than what lies inside of them, so that two steps at most can lead there.
    const int64_t step = apart / axes[at].stride;
    for (int64_t s = step - 1; s <= step + 1; ++s) {
        if (s >= -axes[at].behind && s <= axes[at].front && meet(axes, at + 1, apart - s * axes[at].stride))
            return true;
    }
    return false;
}

// Bytes of an element of a floating-point tensor.
intptr_t bytes_of(const Tensor& tensor) {
    const ScalarType type = tensor.scalar_type();
    return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
}

bool share_memory(const Tensor& a, const Tensor& b) {
    if (a.numel() == 0 || b.numel() == 0 || !same_device(a, b)) return false;
    const auto begin_a = reinterpret_cast<intptr_t>(a.data_ptr());
    const auto begin_b = reinterpret_cast<intptr_t>(b.data_ptr());
    // Without memory, as on the device "meta", nothing is shared.
    if (begin_a == 0 || begin_b == 0) return false;
    const intptr_t wide_a = bytes_of(a);
    const intptr_t wide_b = bytes_of(b);
    const std::vector<Axis> axes_a = axes_of(a);
    const std::vector<Axis> axes_b = axes_of(b);
    if (begin_a + (reach(axes_a, 0) + 1) * wide_a <= begin_b) return false;
    if (begin_b + (reach(axes_b, 0) + 1) * wide_b <= begin_a) return false;
    // Parts of one buffer may lie between each other, such as the keys and the values of every token.
    if (wide_a != wide_b || a.dim() != b.dim() || (begin_b - begin_a) % wide_a != 0) return true;
    std::vector<Steps> steps;
    for (int64_t d = 0; d < a.dim(); ++d) {
        if (a.size(d) > 1 && b.size(d) > 1 && a.stride(d) != b.stride(d)) return true;
        if (a.size(d) > 1 || b.size(d) > 1) {
            steps.push_back({a.size(d) > 1 ? a.stride(d) : b.stride(d), b.size(d) - 1, a.size(d) - 1});
        }
    }
    std::sort(steps.begin(), steps.end(), [](const Steps& x, const Steps& y) { return x.stride > y.stride; });
    if (!steps.empty() && steps.back().stride <= 0) return true;
    return meet(steps, 0, (begin_b - begin_a) / wide_a);
}

}  // namespace

void check_own_memory(const char* op, const char* name, const Tensor& tensor) {
    if (tensor.numel() == 0) return;
    const std::vector<Axis> axes = axes_of(tensor);
    for (size_t i = 0; i < axes.size(); ++i) {
        require(
            axes[i].stride > reach(axes, i + 1), op, named(name, " has"), [] { return "elements that share memory"; },
            [] { return "a tensor of its own (an expanded one cannot be written; use .clone())"; });
    }
}

void check_apart(const char* op, const char* name, const Tensor& tensor, const char* other_name, const Tensor& other) {
    require(
        !share_memory(tensor, other), op, named(name, " has"),
        [&] { return std::string("memory in common with ") + other_name; },
        [] { return "a tensor of its own, as it is written (use .clone())"; });
}

bool is_same_view(const Tensor& a, const Tensor& b) {
    if (a.data_ptr() != b.data_ptr() || a.scalar_type() != b.scalar_type()) return false;
    for (int64_t d = 0; d < a.dim(); ++d) {
        if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
    }
    return true;
}

std::string sum_text(int64_t a, int64_t b) {
    return a > 0 && b > 0 ? std::to_string(static_cast<uint64_t>(a) + static_cast<uint64_t>(b)) : std::to_string(a + b);
}

void check_device(const char* op, const char* name, const Tensor& tensor, const char* like_name, const Tensor& like) {
    require(
        same_device(tensor, like), op, named(name, " is on"), [&] { return device_text(tensor); },
        [&] { return device_text(like) + " like " + like_name; });
}

}  // namespace starflow
