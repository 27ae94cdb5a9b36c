// One sweep's update on the CPU; the formula and the bytes are in jacobi_update.h. Compiled once for each ISA.
#include "ops/jacobi_update/jacobi_update.h"

#include "ops/affine_common/affine_terms_cpu.h"

namespace starflow::STARFLOW_ISA {
namespace {

template <class Data, class Raw, ScaleActivation activation, bool guided>
void update_rows(const JacobiUpdateArgs& args, int64_t begin, int64_t end) {
    using T = typename Arithmetic<Data>::type;
    using V = Vec<T>;
    const AffineShape& shape = args.shape;
    const Clip<V, T> clip(shape.options.soft_clip);
    const V one(T(1));
    const V weight(static_cast<T>(args.guidance));
    for (int64_t row = begin; row < end; ++row) {
        const int64_t b = row / shape.tokens;
        const int64_t t = row % shape.tokens;
        Data* x = row_of<Data>(args.x, b, t);
        const Data* z = row_of<const Data>(args.z, b, t);
        const Raw* raw = row_of<const Raw>(args.raw, b, t);
        const Raw* raw_unconditional = guided ? row_of<const Raw>(args.raw, shape.batch + b, t) : nullptr;
        V change(T(0));
        over_channels<V>(shape.channels, [&](int64_t c, auto lanes) {
            const RawTerms<V> terms = load_raw<activation, V>(raw, shape.channels, c, clip, lanes);
            V scale = scale_of<activation>(terms.log_half, T()).scale;
            V shift = terms.shift;
            if constexpr (guided) {
                const RawTerms<V> other = load_raw<activation, V>(raw_unconditional, shape.channels, c, clip, lanes);
                const V other_scale = scale_of<activation>(other.log_half, T()).scale;
                const V ratio = minimum(one, scale * reciprocal(other_scale));
                const V pull = weight * ratio * ratio;
                const V precision = one + weight - pull;
                shift = ((one + weight) * shift - pull * other.shift) * reciprocal(precision);
                scale = scale * reciprocal(square_root(precision));
            }
            const V updated = multiply_add(scale, load(z + c, lanes), shift);
            // The bits of floats without sign order like their values, with NaN on top: a NaN stays the largest.
            change = maximum_magnitude(change, absolute((updated - load(x + c, lanes)) * reciprocal(scale)));
            store(x + c, updated, lanes);
        });
        args.change[row] = static_cast<float>(largest_magnitude(change));
    }
}

void update(const JacobiUpdateArgs& args, int64_t begin, int64_t end) {
    visit_affine(args.shape, [&](auto data, auto raw, auto activation) {
        using Data = typename decltype(data)::type;
        using Raw = typename decltype(raw)::type;
        if (args.guidance > 0.0) {
            update_rows<Data, Raw, decltype(activation)::get(), true>(args, begin, end);
        } else {
            update_rows<Data, Raw, decltype(activation)::get(), false>(args, begin, end);
        }
    });
}

}  // namespace

const JacobiUpdateKernels jacobi_update{update};

}  // namespace starflow::STARFLOW_ISA
