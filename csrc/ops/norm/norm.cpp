// Schema, checks and choice of variant; the formula is in norm.h.
#include "ops/norm/norm.h"

#include <limits>
#include <tuple>

#include "common/devices.h"
#include "cpu/isa.h"
#include "cpu/pages.h"
#include "cpu/parallel.h"

namespace starflow {
namespace {

constexpr const char* op = "norm";
constexpr const char* backward_op = "norm_backward";

const cpu::Variants<NormKernels> variants{STARFLOW_VARIANTS(norm)};

NormShape check(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t kind, double epsilon,
                double weight_offset, const std::optional<Tensor>& residual) {
    check_floating(op, "x", x);
    require(x.dim() >= 1, op, "x has shape", [] { return "[]"; }, [] { return "(..., channels)"; });
    const auto known = option_of(op, "kind", kind, norm_kind_names, NormKind::layer);
    require(
        epsilon >= 0.0 && epsilon <= std::numeric_limits<double>::max(), op, "eps is", [&] { return epsilon; },
        [] { return "a finite number >= 0"; });
    const int64_t channels = x.size(x.dim() - 1);
    require(
        !x.is_cuda() || channels <= norm_most_channels_cuda, op, "x has channels",
        [&] { return std::to_string(channels); },
        [] { return "at most " + std::to_string(norm_most_channels_cuda) + " on a CUDA device"; });
    check_floating(op, "weight", weight);
    require(
        shape_of(weight) == std::vector<int64_t>{channels}, op, "weight has shape",
        [&] { return shape_text(shape_of(weight)); }, [&] { return shape_text({channels}) + " for channels of x"; });
    check_device(op, "weight", weight, "x", x);
    const bool layer = known == NormKind::layer;
    if (bias.has_value()) {
        require(layer, op, "bias is", [] { return "given"; }, [] { return "None for rms_norm"; });
        check_like(op, "bias", *bias, "weight", weight);
    }
    const Dtype data = *dtype_of(x);
    if (residual.has_value()) {
        require(
            residual->scalar_type() == arithmetic_type(data), op, "residual has dtype",
            [&] { return dtype_text(*residual); },
            [&] { return std::string(data == Dtype::float64 ? "float64" : "float32") + " for x of " + dtype_text(x); });
        require(
            shape_of(*residual) == shape_of(x), op, "residual has shape",
            [&] { return shape_text(shape_of(*residual)); }, [&] { return shape_text(shape_of(x)) + " like x"; });
        check_device(op, "residual", *residual, "x", x);
    }
    const int64_t tokens = x.dim() >= 2 ? x.size(x.dim() - 2) : 1;
    int64_t batch = 1;
    for (int64_t d = 0; d < x.dim() - 2; ++d) batch *= x.size(d);
    return {batch, tokens, channels, data, layer, epsilon, weight_offset};
}

Tensor as_rows(const Tensor& tensor) {
    return with_rows(tensor.dim() >= 2 ? tensor : torch::stable::unsqueeze(tensor, 0));
}

std::tuple<Tensor, std::optional<Tensor>> run(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                              int64_t kind, double epsilon, double weight_offset,
                                              const std::optional<Tensor>& residual) {
    const NormShape shape = check(x, weight, bias, kind, epsilon, weight_offset, residual);
    const ScalarType type = arithmetic_type(shape.data);
    const Tensor values = as_rows(x);
    const Tensor scale = as_parameter(weight, type);
    const Tensor out = new_result(x, shape_of(x), type);
    NormArgs args{shape,   rows_of(values),      {},   scale.data_ptr(), nullptr, out.data_ptr(),
                  nullptr, worth_streaming(out), false};
    std::optional<Tensor> shift;
    std::optional<Tensor> added;
    std::optional<Tensor> sum;
    if (bias.has_value()) {
        shift = as_parameter(*bias, type);
        args.bias = shift->data_ptr();
    }
    if (residual.has_value()) {
        added = as_rows(*residual);
        sum = new_result(x, shape_of(x), type);
        args.residual = rows_of(*added);
        args.sum = sum->data_ptr();
    }
    run_on_device(op, "x", x, args, norm_cuda, [&] {
        const NormKernels& kernels = variants.pick();
        cpu::parallel_rows(
            shape.batch * shape.tokens, shape.channels,
            [&](int64_t begin, int64_t end) { kernels.forward(args, begin, end); }, cpu::light_grain_elements);
    });
    return {out, sum};
}

Tensor run_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t kind,
                   double epsilon, double weight_offset) {
    return std::get<0>(run(x, weight, bias, kind, epsilon, weight_offset, std::nullopt));
}

std::tuple<Tensor, Tensor> run_residual(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                        int64_t kind, double epsilon, double weight_offset, const Tensor& residual) {
    const auto [out, sum] = run(x, weight, bias, kind, epsilon, weight_offset, residual);
    return {out, *sum};
}

std::tuple<Tensor, Tensor> run_backward(const Tensor& grad_out, const std::optional<Tensor>& grad_sum, const Tensor& x,
                                        const Tensor& weight, int64_t kind, double epsilon, double weight_offset,
                                        bool with_bias) {
    const NormShape shape = check(x, weight, std::nullopt, kind, epsilon, weight_offset, std::nullopt);
    const ScalarType type = arithmetic_type(shape.data);
    check_tensor(backward_op, "grad_out", grad_out, type, shape_of(x), "x", x);
    if (grad_sum.has_value()) check_tensor(backward_op, "grad_sum", *grad_sum, type, shape_of(x), "x", x);
    const Tensor values = as_rows(x);
    const Tensor upstream = as_rows(grad_out);
    const Tensor scale = as_parameter(weight, type);
    std::optional<Tensor> added;
    if (grad_sum.has_value()) added = as_rows(*grad_sum);
    const RowBlocks blocks = blocks_on(x, shape.batch * shape.tokens);
    const int64_t width = shape.channels * (with_bias ? 2 : 1);
    const Tensor grad_x = new_result(x);
    const Tensor partial = empty_like_shape(x, {blocks.count, width}, type);
    const Tensor parameters = empty_like_shape(x, {with_bias ? 2 : 1, shape.channels}, type);
    const NormBackwardArgs args{shape,
                                rows_of(upstream),
                                added.has_value() ? rows_of(*added) : Rows{},
                                rows_of(values),
                                scale.data_ptr(),
                                grad_x.data_ptr(),
                                partial.data_ptr(),
                                parameters.data_ptr(),
                                blocks,
                                with_bias,
                                worth_streaming(grad_x)};
    run_on_device(op, "x", x, args, norm_backward_cuda, [&] {
        const NormKernels& kernels = variants.pick();
        cpu::parallel_rows(
            blocks.count, blocks.per_block * shape.channels,
            [&](int64_t begin, int64_t end) { kernels.backward(args, begin, end); }, cpu::light_grain_elements);
        cpu::parallel_rows(
            width, blocks.count, [&](int64_t begin, int64_t end) { kernels.sum_blocks(args, begin, end); },
            cpu::light_grain_elements);
    });
    return {grad_x, parameters};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(starflow_ext, m) {
    m.def("norm(Tensor x, Tensor weight, Tensor? bias, int kind, float epsilon, float weight_offset) -> Tensor");
    m.def(
        "norm_residual(Tensor x, Tensor weight, Tensor? bias, int kind, float epsilon, float weight_offset, "
        "Tensor residual) -> (Tensor, Tensor)");
    m.def(
        "norm_backward(Tensor grad_out, Tensor? grad_sum, Tensor x, Tensor weight, int kind, float epsilon, "
        "float weight_offset, bool with_bias) -> (Tensor, Tensor)");
}

STARFLOW_IMPLEMENT(m) {
    m.impl("norm", TORCH_BOX(&run_forward));
    m.impl("norm_residual", TORCH_BOX(&run_residual));
    m.impl("norm_backward", TORCH_BOX(&run_backward));
}

}  // namespace starflow
