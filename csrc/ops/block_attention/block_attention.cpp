// Schema, checks and choice of variant; formula and mask are in block_attention.h.
#include "ops/block_attention/block_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "common/check.h"
#include "common/devices.h"
#include "cpu/isa.h"
#include "cpu/pages.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cuda/runtime.h"
#include "ops/block_attention/block_attention_schedule.h"

namespace starflow {
namespace {

constexpr const char* op = "block_attention";
constexpr const char* backward_op = "block_attention_backward";

const cpu::Variants<AttentionKernels> variants{STARFLOW_DOT_VARIANTS(block_attention)};
const cpu::Variants<AttentionBackwardKernels> backward_variants{STARFLOW_DOT_VARIANTS(block_attention_backward)};

// Of the numbers of a mask of frames, so that products of two do not overflow; no tensor has so many keys.
constexpr int64_t most_of_frames = int64_t{1024} * 1024 * 1024;

using Optional = std::optional<Tensor>;
using OptionalInt = std::optional<int64_t>;

// The mask and the scale as the operators take them.
struct Options {
    bool causal;
    OptionalInt q_start;
    Optional q_starts;
    OptionalInt k_start;
    Optional k_starts;
    OptionalInt k_length;
    Optional k_lengths;
    int64_t prefix;
    int64_t frame_tokens;  // 0: no frames
    int64_t look_ahead;
    int64_t window;  // -1: all
    double temperature;
    Optional temperatures;
};

void require_same(bool same, const char* argument, int64_t got, int64_t expected) {
    require(same, op, argument, [&] { return got; }, [&] { return std::to_string(expected) + " like q"; });
}

AttentionShape check(const Tensor& q, const Tensor& k, const Tensor& v, const Options& options) {
    const auto check_dims = [](const char* name, const Tensor& tensor, const char* expected) {
        require(
            tensor.dim() == 4, op, std::string(name) + " has shape", [&] { return shape_text(shape_of(tensor)); },
            [&] { return expected; });
    };
    check_dims("q", q, "(batch, heads, queries, head_dim)");
    check_dims("k", k, "(batch, kv_heads, keys, head_dim)");
    require_same(q.size(3) == k.size(3), "k has head_dim", k.size(3), q.size(3));
    require(q.size(3) > 0, op, "q has head_dim", [] { return 0; }, [] { return "at least 1"; });
    require_same(q.size(0) == k.size(0), "k has batch", k.size(0), q.size(0));
    require(
        shape_of(v) == shape_of(k), op, "v has shape", [&] { return shape_text(shape_of(v)); },
        [&] { return shape_text(shape_of(k)) + " like k"; });
    require(
        k.size(1) > 0 && q.size(1) % k.size(1) == 0, op, "k has heads", [&] { return k.size(1); },
        [&] { return "a divisor of the " + std::to_string(q.size(1)) + " heads of q"; });
    const auto dtype = dtype_of(q);
    require(
        dtype.has_value() && dtype != Dtype::float64, op, "q has dtype", [&] { return dtype_text(q); },
        [] { return "float32, bfloat16 or float16 (float64 in plain torch)"; });
    for (const auto& [name, tensor] : {std::pair{"k", &k}, std::pair{"v", &v}}) {
        require(
            tensor->scalar_type() == q.scalar_type(), op, std::string(name) + " has dtype",
            [&] { return dtype_text(*tensor); }, [&] { return dtype_text(q) + " like q"; });
        check_device(op, name, *tensor, "q", q);
    }
    const auto check_batch = [&](const char* name, const Optional& values) {
        if (!values.has_value()) return;
        require(
            shape_of(*values) == std::vector<int64_t>{q.size(0)}, op, std::string(name) + " has shape",
            [&] { return shape_text(shape_of(*values)); }, [&] { return shape_text({q.size(0)}) + " for batch of q"; });
        check_device(op, name, *values, "q", q);
    };
    check_batch("q_start", options.q_starts);
    check_batch("k_start", options.k_starts);
    check_batch("k_length", options.k_lengths);
    check_batch("temperature", options.temperatures);
    for (const auto& [name, value] :
         {std::pair{"prefix", options.prefix}, std::pair{"frame_tokens", options.frame_tokens},
          std::pair{"look_ahead", options.look_ahead}, std::pair{"window", options.window}}) {
        require(
            value <= most_of_frames, op, std::string("frames.") + name + " is", [&] { return value; },
            [] { return "at most " + std::to_string(most_of_frames); });
    }
    const bool hides = options.k_start.has_value() || options.k_starts.has_value();
    require(
        !hides || options.frame_tokens == 0, op, "k_start is", [] { return "given"; },
        [] { return "None with frames"; });
    return {q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), q.size(3), *dtype};
}

Tensor with_channels(const Tensor& tensor) {
    return tensor.size(3) <= 1 || tensor.stride(3) == 1 ? tensor : torch::stable::contiguous(tensor);
}

HeadRows rows_of(const Tensor& tensor) {
    return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// The rows that the result of `with_channels` would have; no copy is made.
HeadRows rows_with_channels(const Tensor& tensor) {
    if (tensor.size(3) <= 1 || tensor.stride(3) == 1) return rows_of(tensor);
    const int64_t row = tensor.size(3);
    const int64_t head = tensor.size(2) * row;
    return {nullptr, tensor.size(1) * head, head, row};
}

// Values of one tensor for each sample, in the type that kernels read; the tensors live as long as this.
struct Prepared {
    AttentionMask mask{};
    AttentionScale scale{};
    Optional starts;
    Optional firsts;
    Optional lengths;
    Optional temperatures;

    Prepared(const Options& options, const AttentionShape& shape) {
        const auto stored_as = [](const Optional& values, ScalarType type) -> Optional {
            if (!values.has_value()) return std::nullopt;
            return as_parameter(*values, type);
        };
        starts = stored_as(options.q_starts, ScalarType::Long);
        firsts = stored_as(options.k_starts, ScalarType::Long);
        lengths = stored_as(options.k_lengths, ScalarType::Long);
        temperatures = stored_as(options.temperatures, ScalarType::Double);
        mask.causal = options.causal;
        mask.frames = options.frame_tokens > 0;
        mask.prefix = options.prefix;
        mask.frame_tokens = std::max<int64_t>(1, options.frame_tokens);
        mask.look_ahead = options.look_ahead;
        mask.window = options.window;
        mask.start = options.q_start.value_or(shape.keys - shape.queries);
        mask.first = options.k_start.value_or(0);
        mask.length = options.k_length.value_or(shape.keys);
        if (starts.has_value()) mask.starts = static_cast<const int64_t*>(starts->data_ptr());
        if (firsts.has_value()) mask.firsts = static_cast<const int64_t*>(firsts->data_ptr());
        if (lengths.has_value()) mask.lengths = static_cast<const int64_t*>(lengths->data_ptr());
        scale.root = std::sqrt(static_cast<double>(shape.head_dim));
        scale.scale = static_cast<float>(1.0 / (scale.root * options.temperature));
        if (!temperatures.has_value()) return;
        scale.temperatures = static_cast<const double*>(temperatures->data_ptr());
        // On a device the host would wait for them.
        if (!temperatures->is_cuda()) require_positive(op, "temperature holds", scale.temperatures, shape.batch);
    }
};

// Rows of a tile: enough to pack keys and values seldom, few enough that every thread has several tiles.
int64_t tile_rows(const AttentionShape& shape, int64_t multiple) {
    constexpr int64_t most = 126;  // whole groups of rows on every level
    constexpr int64_t least = 56;  // packing takes a tenth of a tile's time
    const int64_t rows = shape.queries * (shape.heads / shape.kv_heads);
    const int64_t heads = shape.batch * shape.kv_heads;
    const int64_t wanted = (int64_t{4} * torch::stable::get_num_threads() + heads - 1) / heads;
    const int64_t tiles = std::max((rows + most - 1) / most, std::min(wanted, rows / least));
    return round_up((rows + std::max<int64_t>(1, tiles) - 1) / std::max<int64_t>(1, tiles), multiple);
}

// Elements of a pass over memory that take as long as the products of one row with all keys.
int64_t work_of_row(const AttentionShape& shape) { return std::max<int64_t>(1, shape.keys * shape.head_dim / 8); }

// A new (batch, heads, queries, head_dim), a token's heads side by side: the next op reads whole tokens.
Tensor new_by_token(const Tensor& like, const AttentionShape& shape, int64_t heads, int64_t rows) {
    return torch::stable::transpose(new_result(like, {shape.batch, rows, heads, shape.head_dim}, like.scalar_type()), 1,
                                    2);
}

// Checks the limits of the CUDA kernels, which count rows, keys and blocks in 32 bits.
void check_cuda(const Tensor& q, const AttentionShape& shape) {
    cuda::check_build(op, "q", q);
    require(
        shape.head_dim <= most_head_dim, op, "q has head_dim", [&] { return shape.head_dim; },
        [] { return "at most " + std::to_string(most_head_dim) + " on cuda"; });
    constexpr int64_t most = std::numeric_limits<int32_t>::max();
    const int64_t rows = shape.batch * shape.heads * shape.queries;
    require(rows <= most, op, "q has rows", [&] { return rows; }, [&] { return "at most " + std::to_string(most); });
    const int64_t keys = shape.batch * shape.kv_heads * shape.keys;
    require(keys <= most, op, "k has rows", [&] { return keys; }, [&] { return "at most " + std::to_string(most); });
}

void run_cuda(const Tensor& q, AttentionArgs args) {
    check_cuda(q, args.shape);
    const cuda::DeviceArch device = cuda::device_arch(q.get_device_index());
    args.sm90 =
        forward_kernel_for(args.shape, args.k, args.v, device.major, STARFLOW_SM90 != 0) == AttentionKernel::wgmma;
    const AttentionSchedule schedule = attention_schedule(args.shape, device.multiprocessors, args.sm90);
    args.tile_rows = schedule.tile_rows;
    args.splits = schedule.splits;
    const Tensor parts = empty_like_shape(q, {parts_elements(args.shape, schedule.splits)}, ScalarType::Float);
    args.parts = static_cast<float*>(parts.data_ptr());
    cuda::launch(op, q, args, block_attention_cuda);
}

void run_cpu(AttentionArgs args) {
    const AttentionShape& shape = args.shape;
    const AttentionKernels& kernels = variants.pick();
    args.tile_rows = tile_rows(shape, kernels.row_multiple(shape.data));
    const int64_t tiles = divide_up(rows_of(shape), args.tile_rows);
    cpu::parallel_rows(
        shape.batch * shape.kv_heads * tiles, args.tile_rows * work_of_row(shape), [&](int64_t begin, int64_t end) {
            kernels.forward(args, begin, end, cpu::scratch<AttentionKernels>(kernels.forward_scratch(args)));
        });
}

std::tuple<Tensor, Tensor> run_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Options& options) {
    const AttentionShape shape = check(q, k, v, options);
    const Tensor queries = with_channels(q);
    const Tensor keys = with_channels(k);
    const Tensor values = with_channels(v);
    const Prepared prepared(options, shape);
    const Tensor out = new_by_token(q, shape, shape.heads, shape.queries);
    const Tensor lse = empty_like_shape(q, {shape.batch, shape.heads, shape.queries}, ScalarType::Float);
    if (lse.numel() == 0) return {out, lse};
    AttentionArgs args{};
    args.shape = shape;
    args.mask = prepared.mask;
    args.scale = prepared.scale;
    args.q = rows_of(queries);
    args.k = rows_of(keys);
    args.v = rows_of(values);
    args.out = rows_of(out);
    args.lse = static_cast<float*>(lse.data_ptr());
    if (q.is_cuda()) {
        run_cuda(q, args);
    } else {
        run_cpu(args);
    }
    return {out, lse};
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, bool causal, OptionalInt q_start,
                                   const Optional& q_starts, OptionalInt k_start, const Optional& k_starts,
                                   OptionalInt k_length, const Optional& k_lengths, int64_t prefix,
                                   int64_t frame_tokens, int64_t look_ahead, int64_t window, double temperature,
                                   const Optional& temperatures) {
    return run_forward(q, k, v,
                       {causal, q_start, q_starts, k_start, k_starts, k_length, k_lengths, prefix, frame_tokens,
                        look_ahead, window, temperature, temperatures});
}

// The number of the AttentionKernel that a device of compute capability `major` would run, forward and for the
// gradient.
int64_t forward_kernel(const Tensor& q, const Tensor& k, const Tensor& v, int64_t major) {
    const AttentionShape shape = check(q, k, v, {});
    return static_cast<int64_t>(forward_kernel_for(shape, rows_with_channels(k), rows_with_channels(v),
                                                   static_cast<int>(major), STARFLOW_SM90 != 0));
}

int64_t backward_kernel(const Tensor& q, const Tensor& k, const Tensor& v, int64_t major) {
    const AttentionShape shape = check(q, k, v, {});
    return static_cast<int64_t>(backward_kernel_for(shape, rows_with_channels(q), rows_with_channels(k),
                                                    rows_with_channels(v), static_cast<int>(major),
                                                    STARFLOW_SM90 != 0));
}

// A copy in rows of whole 16 bytes.
Tensor in_chunks(const Tensor& tensor) {
    constexpr int64_t chunk = 8;
    std::vector<int64_t> shape = shape_of(tensor);
    shape[3] = round_up(shape[3], chunk);
    Tensor whole = empty_like_shape(tensor, shape, tensor.scalar_type());
    Tensor rows = torch::stable::narrow(whole, 3, 0, tensor.size(3));
    torch::stable::copy_(rows, tensor);
    return rows;
}

void run_backward_cuda(const Tensor& q, Tensor upstream, const Tensor& logs, AttentionBackwardArgs args) {
    const AttentionShape& shape = args.shape;
    check_cuda(q, shape);
    const cuda::DeviceArch device = cuda::device_arch(q.get_device_index());
    args.sm90 =
        backward_kernel_for(shape, args.q, args.k, args.v, device.major, STARFLOW_SM90 != 0) == AttentionKernel::wgmma;
    if (args.sm90 && kernel_by_queries(shape, args.grad_out) != AttentionKernel::wgmma) {
        upstream = in_chunks(upstream);
        args.grad_out = rows_of(upstream);
    }
    const GradientMemory memory = args.sm90 ? GradientMemory::of(shape) : GradientMemory{};
    const Tensor dots = empty_like_shape(logs, shape_of(logs), ScalarType::Float);
    const Tensor sums = empty_like_shape(q, {memory.sums}, ScalarType::Float);
    const Tensor turns = empty_like_shape(q, {memory.turns}, ScalarType::Int);
    args.dots = static_cast<float*>(dots.data_ptr());
    args.sums = static_cast<float*>(sums.data_ptr());
    args.turns = static_cast<int32_t*>(turns.data_ptr());
    cuda::launch(op, q, args, block_attention_backward_cuda);
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const Optional& grad_lse, const Tensor& q,
                                            const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                                            bool causal, OptionalInt q_start, const Optional& q_starts,
                                            OptionalInt k_start, const Optional& k_starts, OptionalInt k_length,
                                            const Optional& k_lengths, int64_t prefix, int64_t frame_tokens,
                                            int64_t look_ahead, int64_t window, double temperature,
                                            const Optional& temperatures) {
    const Options options{causal, q_start,      q_starts,   k_start, k_starts,    k_length,    k_lengths,
                          prefix, frame_tokens, look_ahead, window,  temperature, temperatures};
    const AttentionShape shape = check(q, k, v, options);
    check_like(backward_op, "grad_out", grad_out, "q", q);
    check_like(backward_op, "out", out, "q", q);
    const std::vector<int64_t> rows = {shape.batch, shape.heads, shape.queries};
    check_tensor(backward_op, "lse", lse, ScalarType::Float, rows, "q", q);
    if (grad_lse.has_value()) check_tensor(backward_op, "grad_lse", *grad_lse, ScalarType::Float, rows, "q", q);
    const Prepared prepared(options, shape);
    const Tensor queries = with_channels(q);
    const Tensor keys = with_channels(k);
    const Tensor values = with_channels(v);
    const Tensor results = with_channels(out);
    const Tensor upstream = with_channels(grad_out);
    const Tensor logs = torch::stable::contiguous(lse);
    Optional upstream_logs;
    if (grad_lse.has_value()) upstream_logs = torch::stable::contiguous(*grad_lse);
    const Tensor grad_q = new_by_token(q, shape, shape.heads, shape.queries);
    const Tensor grad_k = new_by_token(k, shape, shape.kv_heads, shape.keys);
    const Tensor grad_v = new_by_token(v, shape, shape.kv_heads, shape.keys);
    AttentionBackwardArgs args{};
    args.shape = shape;
    args.mask = prepared.mask;
    args.scale = prepared.scale;
    args.q = rows_of(queries);
    args.k = rows_of(keys);
    args.v = rows_of(values);
    args.out = rows_of(results);
    args.grad_out = rows_of(upstream);
    args.lse = static_cast<const float*>(logs.data_ptr());
    if (upstream_logs.has_value()) args.grad_lse = static_cast<const float*>(upstream_logs->data_ptr());
    args.grad_q = rows_of(grad_q);
    args.grad_k = rows_of(grad_k);
    args.grad_v = rows_of(grad_v);
    if (q.is_cuda()) {
        run_backward_cuda(q, upstream, logs, args);
    } else {
        const AttentionBackwardKernels& kernels = backward_variants.pick();
        cpu::parallel_rows(
            shape.batch * shape.kv_heads, (shape.queries + 1) * work_of_row(shape), [&](int64_t begin, int64_t end) {
                kernels.backward(args, begin, end, cpu::scratch<AttentionKernels>(kernels.scratch(args)));
            });
    }
    return {grad_q, grad_k, grad_v};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(starflow_ext, m) {
    m.def(
        "block_attention(Tensor q, Tensor k, Tensor v, bool causal, int? q_start, Tensor? q_starts, int? k_start, "
        "Tensor? k_starts, int? k_length, "
        "Tensor? k_lengths, int prefix, int frame_tokens, int look_ahead, int window, float temperature, "
        "Tensor? temperatures) -> (Tensor out, Tensor lse)");
    m.def(
        "block_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
        "Tensor lse, bool causal, int? q_start, Tensor? q_starts, int? k_start, Tensor? k_starts, int? k_length, "
        "Tensor? k_lengths, int prefix, "
        "int frame_tokens, int look_ahead, int window, float temperature, Tensor? temperatures) "
        "-> (Tensor, Tensor, Tensor)");
    m.def("block_attention_forward_kernel(Tensor q, Tensor k, Tensor v, int major) -> int");
    m.def("block_attention_backward_kernel(Tensor q, Tensor k, Tensor v, int major) -> int");
}

STARFLOW_IMPLEMENT(m) {
    m.impl("block_attention", TORCH_BOX(&forward));
    m.impl("block_attention_backward", TORCH_BOX(&backward));
    m.impl("block_attention_forward_kernel", TORCH_BOX(&forward_kernel));
    m.impl("block_attention_backward_kernel", TORCH_BOX(&backward_kernel));
}

}  // namespace starflow
