// Schema, checks and choice of variant; the formula is in linear.h.
#include "ops/linear/linear.h"

#include <algorithm>
#include <tuple>

#include "common/devices.h"
#include "cpu/isa.h"
#include "cpu/pages.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cuda/runtime.h"
#include "ops/linear/linear_plan.h"
#include "ops/linear/packed_weight.h"

namespace starflow {
namespace {

constexpr const char* op = "linear";
using Optional = std::optional<Tensor>;

const cpu::Variants<LinearKernels> variants{STARFLOW_DOT_VARIANTS(linear)};

Epilogue epilogue_of(const std::string& name) {
    require(
        name == "none" || name == "gelu" || name == "gelu_tanh", op, "epilogue is", [&] { return '"' + name + '"'; },
        [] { return R"("none", "gelu" or "gelu_tanh")"; });
    return name == "none" ? Epilogue::none : name == "gelu" ? Epilogue::gelu : Epilogue::gelu_tanh;
}

Activations activations_of(const std::string& name) {
    require(
        name == "float32" || name == "bfloat16" || name == "two_bfloat16", op, "activations is",
        [&] { return '"' + name + '"'; }, [] { return R"("float32", "bfloat16" or "two_bfloat16")"; });
    if (name == "float32") return Activations::float32;
    return name == "bfloat16" ? Activations::bfloat16 : Activations::two_bfloat16;
}

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

RowNorm norm_of(const std::string& kind, Optional& weight, Optional& bias, double epsilon, const Tensor& panels,
                int64_t channels) {
    if (kind == "none") return {NormKind::none, nullptr, nullptr, 0.0F};
    require(
        kind == "layer_norm" || kind == "rms_norm", op, "norm is", [&] { return '"' + kind + '"'; },
        [] { return R"("layer_norm" or "rms_norm")"; });
    require(
        weight.has_value(), op, "norm_weight is", [] { return "missing"; }, [&] { return "given for norm " + kind; });
    require(
        kind == "layer_norm" || !bias, op, "norm_bias is", [] { return "given"; }, [] { return "None for rms_norm"; });
    return {kind == "layer_norm" ? NormKind::layer : NormKind::rms, vector_of("norm_weight", weight, panels, channels),
            vector_of("norm_bias", bias, panels, channels), static_cast<float>(epsilon)};
}

ScalarType type_of(const std::string& name) {
    if (name == "bfloat16") return ScalarType::BFloat16;
    if (name == "float16") return ScalarType::Half;
    require(
        name == "float32", op, "out_dtype is", [&] { return '"' + name + '"'; },
        [] { return R"("float32", "bfloat16" or "float16")"; });
    return ScalarType::Float;
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
    // A product of float32 takes a thirtieth of a nanosecond, of which an item has 32 for each row and depth.
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
    LinearCudaArgs args = plan_linear(call, {device.multiprocessors, STARFLOW_SM90 != 0 && device.major == 9});
    const Tensor workspace = empty_like_shape(x, {args.layout.bytes}, ScalarType::Byte);
    place_workspace(args, workspace.data_ptr());
    cuda::launch(op, x, args, linear_cuda);
}

// `weight` is that of the gradient alone. `out_dtype` is that of the result and of the product, which the gradient of
// an epilogue or of a gate needs; empty where `keep_product` is false.
std::tuple<Tensor, Tensor> run_linear(Tensor x, const Optional& weight, const Tensor& panels,
                                      const Tensor& column_scale, int64_t out_channels, int64_t in_channels,
                                      const std::string& storage, Optional bias, const std::string& epilogue,
                                      Optional multiply, Optional residual, const std::string& activations,
                                      const std::string& norm, Optional norm_weight, Optional norm_bias,
                                      double norm_epsilon, const std::string& out_dtype, bool keep_product) {
    (void)weight;
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
        (on_device ? device_rows_of : panels_of)(op, panels, column_scale, out_channels, in_channels, storage);
    args.weights.bias = vector_of("bias", bias, panels, out_channels);
    args.x = matrix_of(x);
    args.rows = rows;
    args.norm = norm_of(norm, norm_weight, norm_bias, norm_epsilon, panels, in_channels);
    if (on_device) {
        require(
            activations == storage, op, "activations is", [&] { return '"' + activations + '"'; },
            [&] { return '"' + storage + "\" like the weight on " + device_text(panels); });
    } else {
        args.activations = activations_of(activations);
    }
    args.epilogue = epilogue_of(epilogue);
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
        "str storage, Tensor? bias, str epilogue, Tensor? multiply, Tensor? residual, str activations, str norm, "
        "Tensor? norm_weight, Tensor? norm_bias, float norm_epsilon, str out_dtype, bool keep_product) "
        "-> (Tensor out, Tensor product)");
}

STARFLOW_IMPLEMENT(m) { m.impl("linear", TORCH_BOX(&run_linear)); }

}  // namespace starflow
