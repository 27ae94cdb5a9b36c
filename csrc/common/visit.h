// Turns a runtime value into a template argument, once, in front of a loop. Kernel files include this one: no torch, no
// std. Each visitor is a lambda of the including file, so that every instantiation is local to it.
#pragma once
#include "common/dtype.h"

namespace starflow {

template <class T>
struct Type {
    using type = T;
};
template <auto value>
struct Constant {
    static constexpr auto get() { return value; }
};

template <class Visitor>
static inline void visit_dtype(Dtype dtype, const Visitor& visitor) {
    switch (dtype) {
        case Dtype::float64:
            return visitor(Type<double>{});
        case Dtype::bfloat16:
            return visitor(Type<BFloat16>{});
        case Dtype::float16:
            return visitor(Type<Float16>{});
        case Dtype::float32:
            return visitor(Type<float>{});
    }
}

// The combinations that the affine ops take: raw in the dtype of the data, or narrower than float32 data.
template <class Visitor>
static inline void visit_data_and_raw(Dtype data, Dtype raw, const Visitor& visitor) {
    switch (data) {
        case Dtype::float64:
            return visitor(Type<double>{}, Type<double>{});
        case Dtype::bfloat16:
            return visitor(Type<BFloat16>{}, Type<BFloat16>{});
        case Dtype::float16:
            return visitor(Type<Float16>{}, Type<Float16>{});
        case Dtype::float32:
            switch (raw) {
                case Dtype::bfloat16:
                    return visitor(Type<float>{}, Type<BFloat16>{});
                case Dtype::float16:
                    return visitor(Type<float>{}, Type<Float16>{});
                default:
                    return visitor(Type<float>{}, Type<float>{});
            }
    }
}

}  // namespace starflow
