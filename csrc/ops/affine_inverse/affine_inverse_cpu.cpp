// x = shift + scale * z and its gradient on the CPU; the formula and the bytes are in affine_inverse.h. Compiled once
// for each ISA.
#include "ops/affine_inverse/affine_inverse.h"

#include "ops/affine_common/affine_terms_cpu.h"

namespace starflow::STARFLOW_ISA {
namespace {

template <class Data, class Raw, ScaleActivation activation>
void forward_rows(const AffineInverseArgs& args, int64_t begin, int64_t end) {
    using T = typename Arithmetic<Data>::type;
    using V = Vec<T>;
    const AffineShape& shape = args.shape;
    const Clip<V, T> clip(shape.options.soft_clip);
    const int64_t behind = shape.options.shifted ? 1 : 0;
    for (int64_t row = begin; row < end; ++row) {
        const int64_t b = row / shape.tokens;
        const int64_t t = row % shape.tokens;
        const Data* z = row_of<const Data>(args.z, b, t);
        Data* x = row_of<Data>(args.x, b, t);
        if (t < behind) {
            copy_row<V>(z, x, shape.channels);
            continue;
        }
        const Raw* raw = row_of<const Raw>(args.raw, b, t - behind);
        over_channels<V>(shape.channels, [&](int64_t c, auto lanes) {
            const RawTerms<V> terms = load_raw<activation, V>(raw, shape.channels, c, clip, lanes);
            const V scale = scale_of<activation>(terms.log_half, T()).scale;
            put(x + c, multiply_add(scale, load(z + c, lanes), terms.shift), lanes, args.stream);
        });
    }
    stream_fence();
}

template <class Data, class Raw, ScaleActivation activation>
void backward_rows(const AffineInverseBackwardArgs& args, int64_t begin, int64_t end) {
    using T = typename Arithmetic<Data>::type;
    using V = Vec<T>;
    const AffineShape& shape = args.shape;
    const Clip<V, T> clip(shape.options.soft_clip);
    const int64_t channels = shape.channels;
    const int64_t behind = shape.options.shifted ? 1 : 0;
    for (int64_t row = begin; row < end; ++row) {
        const int64_t b = row / shape.tokens;
        const int64_t t = row % shape.tokens;
        const Data* grad_x = row_of<const Data>(args.grad_x, b, t);
        Data* grad_z = row_of<Data>(args.grad_z, b, t);
        if (t < behind) {
            copy_row<V>(grad_x, grad_z, channels);
            zero_row<V>(row_of<Raw>(args.grad_raw, b, shape.tokens - 1),
                        activation == ScaleActivation::none ? channels : 2 * channels);
            continue;
        }
        const Data* z = row_of<const Data>(args.z, b, t);
        const Raw* raw = row_of<const Raw>(args.raw, b, t - behind);
        Raw* grad_raw = row_of<Raw>(args.grad_raw, b, t - behind);
        over_channels<V>(channels, [&](int64_t c, auto lanes) {
            const RawTerms<V> terms = load_raw<activation, V>(raw, channels, c, clip, lanes);
            const Scale<V> scale = scale_of<activation>(terms.log_half, T());
            const V gradient = load(grad_x + c, lanes);
            put(grad_z + c, gradient * scale.scale, lanes, args.stream);
            const V grad_shift = gradient * terms.shift_slope;
            if constexpr (activation == ScaleActivation::none) {
                put(grad_raw + c, grad_shift, lanes, args.stream);
            } else {
                const V grad_log_scale = gradient * load(z + c, lanes) * scale.scale;
                put(grad_raw + c, through_clamp(grad_log_scale, scale.log_slope) * terms.log_half_slope, lanes,
                    args.stream);
                put(grad_raw + channels + c, grad_shift, lanes, args.stream);
            }
        });
    }
    stream_fence();
}

void forward(const AffineInverseArgs& args, int64_t begin, int64_t end) {
    visit_affine(args.shape, [&](auto data, auto raw, auto activation) {
        forward_rows<typename decltype(data)::type, typename decltype(raw)::type, decltype(activation)::get()>(
            args, begin, end);
    });
}

void backward(const AffineInverseBackwardArgs& args, int64_t begin, int64_t end) {
    visit_affine(args.shape, [&](auto data, auto raw, auto activation) {
        backward_rows<typename decltype(data)::type, typename decltype(raw)::type, decltype(activation)::get()>(
            args, begin, end);
    });
}

}  // namespace

const AffineInverseKernels affine_inverse{forward, backward};

}  // namespace starflow::STARFLOW_ISA
