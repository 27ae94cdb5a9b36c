// LayerNorm, RMSNorm and their gradient on the CPU; the formula and the bytes are in norm.h. Compiled once for each
// ISA.
#include "ops/norm/norm.h"

#include "common/visit.h"
#include "cpu/rows.h"

namespace starflow::STARFLOW_ISA {
namespace {

template <class T>
struct Statistics {
    T mean;
    T inverse;  // of the standard deviation, or of the root of the mean square
};

// The variance is that of the centred values: the difference of two large sums would lose it.
template <class V, class T, class Data>
inline Statistics<T> statistics(const NormShape& shape, const Data* row) {
    const T count = static_cast<T>(shape.channels);
    T mean = 0;
    if (shape.centred) {
        mean = sum_over<V>(shape.channels, [&](int64_t c, auto lanes) { return load(row + c, lanes); }) / count;
    }
    const auto sum_of_squares = [&] {
        const V middle(mean);
        return sum_over<V>(shape.channels, [&](int64_t c, auto lanes) {
            const V centred = load(row + c, lanes) - middle;
            return centred * centred;
        });
    };
    T squares = sum_of_squares();
    if (mean * mean * count > static_cast<T>(far_mean_squared) * squares) {
        const V middle(mean);
        mean +=
            sum_over<V>(shape.channels, [&](int64_t c, auto lanes) { return load(row + c, lanes) - middle; }) / count;
        squares = sum_of_squares();
    }
    const double variance = static_cast<double>(squares) / static_cast<double>(shape.channels);
    return {mean, static_cast<T>(1.0 / __builtin_sqrt(variance + shape.epsilon))};
}

template <class Data, bool add>
void forward_rows(const NormArgs& args, int64_t begin, int64_t end) {
    using T = typename Arithmetic<Data>::type;
    using V = Vec<T>;
    const int64_t channels = args.shape.channels;
    const T* weight = static_cast<const T*>(args.weight);
    const T* bias = static_cast<const T*>(args.bias);
    const V offset(static_cast<T>(args.shape.weight_offset));
    for (int64_t row = begin; row < end; ++row) {
        const int64_t b = row / args.shape.tokens;
        const int64_t t = row % args.shape.tokens;
        const Data* x = row_of<const Data>(args.x, b, t);
        T* out = static_cast<T*>(args.out) + row * channels;
        const auto normalise = [&](const auto* values) {
            const Statistics<T> found = statistics<V, T>(args.shape, values);
            const V inverse(found.inverse);
            // (s - mean) * inverse as one multiply_add would round mean * inverse first.
            const V mean(found.mean);
            over_channels<V>(channels, [&](int64_t c, auto lanes) {
                const V normed = (load(values + c, lanes) - mean) * inverse;
                const V scaled = normed * (offset + load(weight + c, lanes));
                put(out + c, bias == nullptr ? scaled : scaled + load(bias + c, lanes), lanes, args.stream);
            });
        };
        if constexpr (add) {
            const T* residual = row_of<const T>(args.residual, b, t);
            T* total = static_cast<T*>(args.sum) + row * channels;
            over_channels<V>(channels, [&](int64_t c, auto lanes) {
                store(total + c, load(x + c, lanes) + load(residual + c, lanes), lanes);
            });
            normalise(total);
        } else {
            normalise(x);
        }
    }
    stream_fence();
}

template <class Data>
void backward_blocks(const NormBackwardArgs& args, int64_t begin, int64_t end) {
    using T = typename Arithmetic<Data>::type;
    using V = Vec<T>;
    const NormShape& shape = args.shape;
    const int64_t channels = shape.channels;
    const T* weight = static_cast<const T*>(args.weight);
    const V offset(static_cast<T>(shape.weight_offset));
    for (int64_t block = begin; block < end; ++block) {
        T* weight_sum = static_cast<T*>(args.partial) + block * channels * (args.with_bias ? 2 : 1);
        T* bias_sum = args.with_bias ? weight_sum + channels : nullptr;
        zero_row<V>(weight_sum, channels * (args.with_bias ? 2 : 1));
        for (int64_t row = args.blocks.begin(block); row < args.blocks.end(block); ++row) {
            const int64_t b = row / shape.tokens;
            const int64_t t = row % shape.tokens;
            const Data* x = row_of<const Data>(args.x, b, t);
            const T* grad_out = row_of<const T>(args.grad_out, b, t);
            const T* grad_sum = args.grad_sum.data == nullptr ? nullptr : row_of<const T>(args.grad_sum, b, t);
            Data* grad_x = static_cast<Data*>(args.grad_x) + row * channels;
            const Statistics<T> found = statistics<V, T>(shape, x);
            const V mean(found.mean);
            const V inverse(found.inverse);
            V along_one(0);
            const T along_normed = sum_over<V>(channels, [&](int64_t c, auto lanes) {
                const V normed = (load(x + c, lanes) - mean) * inverse;
                const V upstream = load(grad_out + c, lanes);
                // The sums over rows ride along: this row is in registers now.
                store(weight_sum + c, multiply_add(upstream, normed, load(weight_sum + c, lanes)), lanes);
                if (bias_sum != nullptr) store(bias_sum + c, upstream + load(bias_sum + c, lanes), lanes);
                const V gradient = upstream * (offset + load(weight + c, lanes));
                along_one = along_one + gradient;
                return gradient * normed;
            });
            const V one_part(shape.centred ? sum(along_one) / static_cast<T>(channels) : T(0));
            const V normed_part(along_normed / static_cast<T>(channels));
            over_channels<V>(channels, [&](int64_t c, auto lanes) {
                const V normed = (load(x + c, lanes) - mean) * inverse;
                const V gradient = load(grad_out + c, lanes) * (offset + load(weight + c, lanes));
                V result = inverse * (gradient - one_part - normed * normed_part);
                if (grad_sum != nullptr) result = result + load(grad_sum + c, lanes);
                put(grad_x + c, result, lanes, args.stream);
            });
        }
    }
    stream_fence();
}

void forward(const NormArgs& args, int64_t begin, int64_t end) {
    visit_dtype(args.shape.data, [&](auto data) {
        using Data = typename decltype(data)::type;
        if (args.sum == nullptr) {
            forward_rows<Data, false>(args, begin, end);
        } else {
            forward_rows<Data, true>(args, begin, end);
        }
    });
}

void backward(const NormBackwardArgs& args, int64_t begin, int64_t end) {
    visit_dtype(args.shape.data, [&](auto data) { backward_blocks<typename decltype(data)::type>(args, begin, end); });
}

template <class T>
void sum_blocks_as(const NormBackwardArgs& args, int64_t begin, int64_t end) {
    const int64_t width = args.shape.channels * (args.with_bias ? 2 : 1);
    sum_rows<Vec<T>>(static_cast<const T*>(args.partial), static_cast<T*>(args.parameters), args.blocks.count, width,
                     begin, end);
}

void sum_blocks(const NormBackwardArgs& args, int64_t begin, int64_t end) {
    if (args.shape.data == Dtype::float64) {
        sum_blocks_as<double>(args, begin, end);
    } else {
        sum_blocks_as<float>(args, begin, end);
    }
}

}  // namespace

const NormKernels norm{forward, backward, sum_blocks};

}  // namespace starflow::STARFLOW_ISA
