// z = (x - shift) / scale and its gradient on the CPU; the formula and the bytes are in affine_forward.h. Compiled once
// for each ISA.
#include "ops/affine_common/affine_terms_cpu.h"
#include "ops/affine_forward/affine_forward.h"

namespace starflow::STARFLOW_ISA {
namespace {

template <class Data, class Raw, ScaleActivation activation>
void forward_rows(const AffineForwardArgs& args, int64_t begin, int64_t end) {
    using T = typename Arithmetic<Data>::type;
    using V = Vec<T>;
    const AffineShape& shape = args.shape;
    const Clip<V, T> clip(shape.options.soft_clip);
    const int64_t behind = shape.options.shifted ? 1 : 0;
    for (int64_t row = begin; row < end; ++row) {
        const int64_t b = row / shape.tokens;
        const int64_t t = row % shape.tokens;
        const Data* x = row_of<const Data>(args.x, b, t);
        Data* z = row_of<Data>(args.z, b, t);
        T& log_det = static_cast<T*>(args.log_det)[row];
        if (t < behind) {
            copy_row<V>(x, z, shape.channels);
            log_det = T(0);
            continue;
        }
        const Raw* raw = row_of<const Raw>(args.raw, b, t - behind);
        LogSum<V, T> log_scale;
        over_channels<V>(shape.channels, [&](int64_t c, auto lanes) {
            const RawTerms<V> terms = load_raw<activation, V>(raw, shape.channels, c, clip, lanes);
            const V scale = scale_of<activation>(terms.log_half, T()).scale;
            put(z + c, (load(x + c, lanes) - terms.shift) * reciprocal(scale), lanes, args.stream);
            if constexpr (activation != ScaleActivation::none) log_scale.add(keep(scale, lanes, T(1)));
        });
        log_det = T(0) - log_scale.total();
    }
    stream_fence();
}

template <class Data, class Raw, ScaleActivation activation>
void backward_rows(const AffineForwardBackwardArgs& args, int64_t begin, int64_t end) {
    using T = typename Arithmetic<Data>::type;
    using V = Vec<T>;
    const AffineShape& shape = args.shape;
    const Clip<V, T> clip(shape.options.soft_clip);
    const int64_t channels = shape.channels;
    const int64_t behind = shape.options.shifted ? 1 : 0;
    for (int64_t row = begin; row < end; ++row) {
        const int64_t b = row / shape.tokens;
        const int64_t t = row % shape.tokens;
        const Data* grad_z = row_of<const Data>(args.grad_z, b, t);
        Data* grad_x = row_of<Data>(args.grad_x, b, t);
        if (t < behind) {
            copy_row<V>(grad_z, grad_x, channels);
            zero_row<V>(row_of<Raw>(args.grad_raw, b, shape.tokens - 1),
                        activation == ScaleActivation::none ? channels : 2 * channels);
            continue;
        }
        const Data* x = row_of<const Data>(args.x, b, t);
        const Raw* raw = row_of<const Raw>(args.raw, b, t - behind);
        Raw* grad_raw = row_of<Raw>(args.grad_raw, b, t - behind);
        const V grad_log_det(static_cast<const T*>(args.grad_log_det)[row]);
        over_channels<V>(channels, [&](int64_t c, auto lanes) {
            const RawTerms<V> terms = load_raw<activation, V>(raw, channels, c, clip, lanes);
            const Scale<V> scale = scale_of<activation>(terms.log_half, T());
            const V inverse = reciprocal(scale.scale);
            const V z = (load(x + c, lanes) - terms.shift) * inverse;
            const V gradient = load(grad_z + c, lanes);
            const V through = gradient * inverse;
            put(grad_x + c, through, lanes, args.stream);
            const V grad_shift = (V(T(0)) - through) * terms.shift_slope;
            if constexpr (activation == ScaleActivation::none) {
                put(grad_raw + c, grad_shift, lanes, args.stream);
            } else {
                // d z / d log(scale) = -z, and log_det counts -log(scale).
                const V grad_log_scale = V(T(0)) - multiply_add(gradient, z, grad_log_det);
                put(grad_raw + c, through_clamp(grad_log_scale, scale.log_slope) * terms.log_half_slope, lanes,
                    args.stream);
                put(grad_raw + channels + c, grad_shift, lanes, args.stream);
            }
        });
    }
    stream_fence();
}

void forward(const AffineForwardArgs& args, int64_t begin, int64_t end) {
    visit_affine(args.shape, [&](auto data, auto raw, auto activation) {
        forward_rows<typename decltype(data)::type, typename decltype(raw)::type, decltype(activation)::get()>(
            args, begin, end);
    });
}

void backward(const AffineForwardBackwardArgs& args, int64_t begin, int64_t end) {
    visit_affine(args.shape, [&](auto data, auto raw, auto activation) {
        backward_rows<typename decltype(data)::type, typename decltype(raw)::type, decltype(activation)::get()>(
            args, begin, end);
    });
}

}  // namespace

const AffineForwardKernels affine_forward{forward, backward};

}  // namespace starflow::STARFLOW_ISA
