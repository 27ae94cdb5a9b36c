// Schema, checks and choice of variant; the formula is in linear.h.
#include "ops/linear/linear.h"

#include <algorithm>
#include <limits>
#include <tuple>

#include "common/devices.h"
#include "cpu/isa.h"
#include "cpu/pages.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cuda/runtime.h"
#include "ops/linear/linear_choice.h"
#include "ops/linear/linear_plan.h"
#include "ops/linear/packed_weight.h"

namespace starflow {
namespace {

constexpr const char* op = "linear";
using Optional = std::optional<Tensor>;

const cpu::Variants<LinearKernels> variants{STARFLOW_DOT_VARIANTS(linear)};

void check_matrix(const char* name, const Tensor& tensor, const Tensor& panels, const std::vector<int64_t>& expected) {
    require(
        same_device(tensor, panels), op, named(name, " is on"), [&] { return device_text(tensor); },
        [&] { return device_text(panels) + " for a packed weight"; });
    const std::optional<Dtype> dtype = dtype_of(tensor);
    require(
        dtype.has_value() && dtype != Dtype::float64, op, named(name, " has dtype"), [&] { return dtype_text(tensor); },
        [] { return "float32, bfloat16 or float16"; });
    require(
        has_shape(tensor, expected), op, named(name, " has shape"), [&] { return shape_text(shape_of(tensor)); },
        [&] { return shape_text(expected); });
}

// The kernels' view; `tensor` becomes a copy where its rows are not one stride apart.
Matrix matrix_of(Tensor& tensor) {
    if (tensor.dim() == 1) tensor = torch::stable::unsqueeze(tensor, 0);
    tensor = with_rows(tensor);
    const int64_t tokens = tensor.size(tensor.dim() - 2);
    Rows rows = rows_of(tensor);
    if (tokens == 1) {
        rows.token_stride = rows.batch_stride;
    } else if (rows.batch_stride != tokens * rows.token_stride &&
               tensor.numel() > tokens * tensor.size(tensor.dim() - 1)) {
        tensor = torch::stable::contiguous(tensor);
        rows = rows_of(tensor);
    }
    return {tensor.data_ptr(), rows.token_stride, *dtype_of(tensor)};
}

Matrix matrix_of(Optional& tensor) { return tensor ? matrix_of(*tensor) : Matrix{nullptr, 0, Dtype::float32}; }

// A vector of float32 side by side; `tensor` becomes a copy where it is not one.
const float* vector_of(const char* name, Optional& tensor, const Tensor& panels, int64_t size) {
    if (!tensor) return nullptr;
    check_matrix(name, *tensor, panels, {size});
    if (tensor->scalar_type() != ScalarType::Float) tensor = torch::stable::to(*tensor, ScalarType::Float);
    tensor = torch::stable::contiguous(*tensor);
    return static_cast<const float*>(tensor->data_ptr());
}

RowNorm norm_of(NormKind kind, Optional& weight, Optional& bias, double epsilon, double weight_offset,
                const Tensor& panels, int64_t channels) {
    if (kind == NormKind::none) return {kind, nullptr, nullptr, 0.0F, 0.0F};
    require(
        epsilon >= 0.0 && epsilon <= std::numeric_limits<double>::max(), op, "norm_eps is", [&] { return epsilon; },
        [] { return "a finite number >= 0"; });
    require(
        weight.has_value(), op, "norm_weight is", [] { return "missing"; },
        [&] { return std::string("given for norm ") + norm_kind_names[static_cast<int>(kind)]; });
    require(
        kind == NormKind::layer || !bias, op, "norm_bias is", [] { return "given"; },
        [] { return "None for rms_norm"; });
    return {kind, vector_of("norm_weight", weight, panels, channels), vector_of("norm_bias", bias, panels, channels),
            static_cast<float>(epsilon), static_cast<float>(weight_offset)};
}

ScalarType type_of(int64_t out_dtype) {
    switch (option_of<Dtype>(op, "out_dtype", out_dtype, dtype_names)) {
        case Dtype::bfloat16:
            return ScalarType::BFloat16;
        case Dtype::float16:
            return ScalarType::Half;
        case Dtype::float32:
            return ScalarType::Float;
        case Dtype::float64:
            require(false, op, "out_dtype is", [] { return "float64"; }, [] { return "float32, bfloat16 or float16"; });
    }
    return ScalarType::Float;
}

ProductInput product_input_of(int64_t number, MatrixStorage storage, const Tensor& panels) {
    const auto input = option_of<ProductInput>(op, "product_input", number, product_input_names);
    const auto name = [&] { return std::string("\"") + product_input_names[number] + '"'; };
    if (panels.is_cuda()) {
        require(name() == quoted(storage), op, "product_input is", name,
                [&] { return quoted(storage) + " like the weight on " + device_text(panels); });
    } else {
        require(input != ProductInput::float16, op, "product_input is", name,
                [] { return R"("float32", "bfloat16" or "two_bfloat16")"; });
    }
    return input;
}

// Rows that pass over the panels together: as many as stay in the second-level cache (128 of 3072 channels), in blocks
// of the same size, so that no thread gets the small one. Half or three times as many are as fast.
int64_t row_block_of(int64_t rows) {
    constexpr int64_t most = 128;
    const int64_t blocks = std::max<int64_t>(1, (rows + most - 1) / most);
    return std::max<int64_t>(1, (rows + blocks - 1) / blocks);
}

void run_items(const LinearArgs& args, const LinearKernels& kernels) {
    const int64_t blocks = (args.rows + args.row_block - 1) / args.row_block;
    // A multiply-add of float32 takes a thirtieth of a nanosecond, and an item has 32 of them for each row and depth.
    cpu::parallel_rows(blocks * args.weights.count(), args.row_block * args.weights.depth,
                       [&](int64_t begin, int64_t end) {
                           kernels.multiply(args, begin, end, cpu::scratch<LinearKernels>(kernels.scratch_bytes(args)));
                       });
}

void run_cuda(const LinearArgs& call, const Tensor& x) {
    require(
        STARFLOW_CUDA != 0, op, "x is on", [&] { return device_text(x); },
        [] { return "cpu: this build has no CUDA kernels (build with STARFLOW_CUDA=ON)"; });
    const cuda::DeviceArch device = cuda::device_arch(x.get_device_index());
    LinearCudaArgs args = plan_linear(call, {device.multiprocessors, false, linear_kernel(device.major), false});
    const Tensor workspace = empty_like_shape(x, {args.layout.bytes}, ScalarType::Byte);
    place_workspace(args, workspace.data_ptr());
    cuda::launch(op, x, args, linear_cuda);
}

// `weight` is that of the gradient alone. `out_dtype` is that of the result and of the product, which the gradient of
// an epilogue or of a gate needs; empty where `keep_product` is false.
std::tuple<Tensor, Tensor> run_linear(Tensor x, const Optional& weight, const Tensor& panels,
                                      const Tensor& column_scale, int64_t out_channels, int64_t in_channels,
                                      int64_t storage, Optional bias, int64_t epilogue, Optional multiply,
                                      Optional residual, int64_t product_input, int64_t norm, Optional norm_weight,
                                      Optional norm_bias, double norm_epsilon, double norm_offset, int64_t out_dtype,
                                      bool keep_product) {
    (void)weight;
    const auto stored = option_of<MatrixStorage>(op, "storage", storage, matrix_storage_names);
    std::vector<int64_t> shape = shape_of(x);
    require(
        !shape.empty() && shape.back() == in_channels, op, "x has shape", [&] { return shape_text(shape); },
        [&] {
            return "[..., " + std::to_string(in_channels) + "] for weight of shape " +
                   shape_text({out_channels, in_channels});
        });
    check_matrix("x", x, panels, shape);
    shape.back() = out_channels;
    if (multiply) check_matrix("multiply", *multiply, panels, shape);
    if (residual) check_matrix("residual", *residual, panels, shape);
    int64_t rows = 1;
    for (int64_t d = 0; d + 1 < x.dim(); ++d) rows *= x.size(d);

    const ScalarType type = type_of(out_dtype);
    const Tensor out = new_result(x, shape, type);
    const Tensor product = new_result(x, keep_product ? shape : std::vector<int64_t>{0}, type);
    const bool on_device = panels.is_cuda();
    LinearArgs args{};
    args.weights =
        (on_device ? device_rows_of : panels_of)(op, panels, column_scale, out_channels, in_channels, stored);
    args.weights.bias = vector_of("bias", bias, panels, out_channels);
    args.x = matrix_of(x);
    args.rows = rows;
    args.norm = norm_of(option_of<NormKind>(op, "norm", norm, norm_kind_names), norm_weight, norm_bias, norm_epsilon,
                        norm_offset, panels, in_channels);
    args.product_input = product_input_of(product_input, stored, panels);
    args.epilogue = option_of<Epilogue>(op, "epilogue", epilogue, epilogue_names);
    args.multiply = matrix_of(multiply);
    args.residual = matrix_of(residual);
    args.out = {out.data_ptr(), out_channels, *dtype_of(out)};
    args.product = {keep_product ? product.data_ptr() : nullptr, out_channels, *dtype_of(out)};
    args.row_block = row_block_of(rows);
    if (on_device) {
        run_cuda(args, x);
    } else if (rows > 0) {
        run_items(args, variants.pick());
    }
    return {out, product};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(starflow_ext, m) {
    m.def(
        "linear(Tensor x, Tensor? weight, Tensor panels, Tensor column_scale, int out_channels, int in_channels, "
        "int storage, Tensor? bias, int epilogue, Tensor? multiply, Tensor? residual, int product_input, int norm, "
        "Tensor? norm_weight, Tensor? norm_bias, float norm_epsilon, float norm_offset, int out_dtype, "
        "bool keep_product) "
        "-> (Tensor out, Tensor product)");
}

STARFLOW_IMPLEMENT(m) { m.impl("linear", TORCH_BOX(&run_linear)); }

}  // namespace starflow
