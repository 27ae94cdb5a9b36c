// Schema, checks and choice of variant; the formula is in rope_append.h.
#include "ops/rope_append/rope_append.h"

#include <algorithm>
#include <tuple>

#include "common/devices.h"
#include "cpu/isa.h"
#include "cpu/pages.h"
#include "cpu/parallel.h"

namespace starflow {
namespace {

using Optional = std::optional<Tensor>;

constexpr const char* op = "rope_append";
constexpr const char* backward_op = "rope_append_backward";

const cpu::Variants<RopeAppendKernels> variants{STARFLOW_VARIANTS(rope_append)};

// What both entries are given beside qkv, as the schema has it.
struct Options {
    int64_t heads;
    int64_t kv_heads;
    const Optional& query_cos;
    const Optional& query_sin;
    const Optional& key_cos;
    const Optional& key_sin;
    const Optional& query_norm;
    const Optional& key_norm;
    int64_t pairing;
};

void check_table(const Tensor& table, const Tensor& qkv, int64_t head_dim) {
    const int64_t batch = qkv.size(0);
    const int64_t tokens = qkv.size(1);
    check_floating(op, "rotation", table);
    const std::vector<int64_t> shape = shape_of(table);
    const bool one =
        shape == std::vector<int64_t>{tokens, head_dim / 2} || shape == std::vector<int64_t>{1, tokens, head_dim / 2};
    require(
        one || shape == std::vector<int64_t>{batch, tokens, head_dim / 2}, op, "rotation has shape",
        [&] { return shape_text(shape); },
        [&] {
            return "[..., " + std::to_string(tokens) + ", " + std::to_string(head_dim / 2) + "] for " +
                   std::to_string(tokens) + " tokens of head_dim " + std::to_string(head_dim);
        });
    check_device(op, "rotation", table, "qkv", qkv);
}

void check_rotation(const char* name, const Optional& cos, const Optional& sin, const Tensor& qkv, int64_t head_dim) {
    require(
        cos.has_value() == sin.has_value(), op, std::string(name) + " has", [] { return "one table"; },
        [] { return "cosines and sines, or neither"; });
    if (!cos.has_value()) return;
    require(
        head_dim % 2 == 0, op, "head_dim is", [&] { return std::to_string(head_dim); },
        [] { return "an even number for a rotation"; });
    check_table(*cos, qkv, head_dim);
    const std::string prefix(name);
    check_like(op, (prefix + ".sin").c_str(), *sin, (prefix + ".cos").c_str(), *cos);
}

void check_weight(const char* name, const Optional& weight, const Tensor& qkv, int64_t head_dim) {
    if (!weight.has_value()) return;
    check_floating(op, name, *weight);
    require(
        shape_of(*weight) == std::vector<int64_t>{head_dim}, op, std::string(name) + " has shape",
        [&] { return shape_text(shape_of(*weight)); }, [&] { return shape_text({head_dim}) + " for head_dim of qkv"; });
    check_device(op, name, *weight, "qkv", qkv);
}

RopeAppendShape check(const Tensor& qkv, const Options& options) {
    check_floating(op, "qkv", qkv);
    require(
        qkv.dim() == 3, op, "qkv has shape", [&] { return shape_text(shape_of(qkv)); },
        [] { return "(batch, tokens, channels)"; });
    for (const auto& [name, heads] : {std::pair{"heads", options.heads}, std::pair{"kv_heads", options.kv_heads}}) {
        require(
            heads >= 1, op, std::string(name) + " is", [&, count = heads] { return std::to_string(count); },
            [] { return "at least 1"; });
    }
    const int64_t width = qkv.size(2);
    const int64_t parts = options.heads + 2 * options.kv_heads;
    require(
        width % parts == 0, op, "qkv has channels", [&] { return std::to_string(width); },
        [&] { return "a multiple of " + std::to_string(parts) + " (heads + 2 kv_heads)"; });
    const bool interleaved = option_of<Pairing>(op, "pairing", options.pairing, pairing_names) == Pairing::interleaved;
    const int64_t head_dim = width / parts;
    require(
        !qkv.is_cuda() || head_dim <= rope_append_most_head_dim_cuda, op, "head_dim is",
        [&] { return std::to_string(head_dim); },
        [] { return "at most " + std::to_string(rope_append_most_head_dim_cuda) + " on a CUDA device"; });
    check_weight("query_norm", options.query_norm, qkv, head_dim);
    check_weight("key_norm", options.key_norm, qkv, head_dim);
    check_rotation("query_rotation", options.query_cos, options.query_sin, qkv, head_dim);
    check_rotation("key_rotation", options.key_cos, options.key_sin, qkv, head_dim);
    const Dtype data = *dtype_of(qkv);
    return {qkv.size(0), qkv.size(1), options.heads, options.kv_heads, head_dim, data, data, interleaved};
}

// The tables and weights of queries, or keys, and what keeps their copies alive.
class Turn {
  public:
    Turn(const Optional& cos, const Optional& sin, const Optional& weight, Dtype data) {
        const ScalarType type = arithmetic_type(data);
        if (cos.has_value()) {
            cos_ = table(*cos, type);
            sin_ = table(*sin, type);
            view.cos = rows_of(*cos_);
            view.sin = rows_of(*sin_);
        }
        if (weight.has_value()) {
            weight_ = as_parameter(*weight, type);
            view.weight = weight_->data_ptr();
        }
    }

    RopeTurn view{};

  private:
    static Tensor table(const Tensor& given, ScalarType type) {
        return with_rows(given.scalar_type() == type ? given : torch::stable::to(given, type));
    }

    Optional cos_, sin_, weight_;
};

Heads heads_of(const Tensor& tensor) {
    return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// The tensor itself where head_dim lies side by side, else a copy.
Tensor with_heads(const Tensor& tensor) {
    return tensor.size(3) <= 1 || tensor.stride(3) == 1 ? tensor : torch::stable::contiguous(tensor);
}

Tensor new_heads(const Tensor& qkv, const RopeAppendShape& shape, int64_t heads) {
    return new_result(qkv, {shape.batch, heads, shape.tokens, shape.head_dim}, qkv.scalar_type());
}

int64_t width_of(const RopeAppendShape& shape) { return (shape.heads + 2 * shape.kv_heads) * shape.head_dim; }

void run_rows(const Tensor& qkv, const RopeAppendArgs& args) {
    run_on_device(op, "qkv", qkv, args, rope_append_cuda, [&] {
        const RopeAppendKernels& kernels = variants.pick();
        cpu::parallel_rows(
            args.shape.batch * args.shape.tokens, width_of(args.shape),
            [&](int64_t begin, int64_t end) { kernels.forward(args, begin, end); }, cpu::light_grain_elements);
    });
}

std::tuple<Tensor, Tensor, Tensor> run_forward(const Tensor& qkv, int64_t heads, int64_t kv_heads,
                                               const Optional& query_cos, const Optional& query_sin,
                                               const Optional& key_cos, const Optional& key_sin,
                                               const Optional& query_norm, const Optional& key_norm, int64_t pairing) {
    const RopeAppendShape shape =
        check(qkv, {heads, kv_heads, query_cos, query_sin, key_cos, key_sin, query_norm, key_norm, pairing});
    const Turn query(query_cos, query_sin, query_norm, shape.data);
    const Turn key(key_cos, key_sin, key_norm, shape.data);
    const Tensor rows = with_rows(qkv);
    const Tensor q = new_heads(qkv, shape, heads);
    const Tensor k = new_heads(qkv, shape, kv_heads);
    const Tensor v = new_heads(qkv, shape, kv_heads);
    run_rows(qkv, {shape, rows_of(rows), query.view, key.view, heads_of(q), heads_of(k), heads_of(v), 0, nullptr,
                   nullptr, false});
    return {q, k, v};
}

void check_buffer(const char* name, const Tensor& buffer, const Tensor& qkv, const RopeAppendShape& shape) {
    const bool wide = shape.data == Dtype::float64;
    const std::optional<Dtype> kept = dtype_of(buffer);
    require(
        kept.has_value() && (*kept == Dtype::float64) == wide, op, std::string(name) + " has dtype",
        [&] { return dtype_text(buffer); },
        [&] {
            return std::string(wide ? "float64" : "float32, bfloat16 or float16") + " for qkv of " + dtype_text(qkv);
        });
    const int64_t capacity = buffer.dim() == 4 ? buffer.size(2) : 0;
    require(
        shape_of(buffer) == std::vector<int64_t>{shape.batch, shape.kv_heads, capacity, shape.head_dim}, op,
        std::string(name) + " has shape", [&] { return shape_text(shape_of(buffer)); },
        [&] {
            return '[' + std::to_string(shape.batch) + ", " + std::to_string(shape.kv_heads) + ", capacity, " +
                   std::to_string(shape.head_dim) + ']';
        });
    check_device(op, name, buffer, "qkv", qkv);
    check_own_memory(op, name, buffer);
}

// One number for each sample, side by side.
Optional by_sample(const char* name, const Optional& given, const Tensor& qkv) {
    if (!given.has_value()) return std::nullopt;
    require(
        given->scalar_type() == ScalarType::Long, op, std::string(name) + " has dtype",
        [&] { return dtype_text(*given); }, [] { return "int64"; });
    require(
        shape_of(*given) == std::vector<int64_t>{qkv.size(0)}, op, std::string(name) + " has shape",
        [&] { return shape_text(shape_of(*given)); }, [&] { return shape_text({qkv.size(0)}) + ", one a sample"; });
    check_device(op, name, *given, "qkv", qkv);
    return torch::stable::contiguous(*given);
}

const int64_t* numbers(const Optional& tensor) {
    return tensor.has_value() ? static_cast<const int64_t*>(tensor->data_ptr()) : nullptr;
}

Tensor run_cached(const Tensor& qkv, int64_t heads, int64_t kv_heads, const Optional& query_cos,
                  const Optional& query_sin, const Optional& key_cos, const Optional& key_sin,
                  const Optional& query_norm, const Optional& key_norm, int64_t pairing, Tensor keys, Tensor values,
                  int64_t start, Optional starts, Optional final) {
    RopeAppendShape shape =
        check(qkv, {heads, kv_heads, query_cos, query_sin, key_cos, key_sin, query_norm, key_norm, pairing});
    check_buffer("cache.keys", keys, qkv, shape);
    check_like(op, "cache.values", values, "cache.keys", keys);
    check_own_memory(op, "cache.values", values);
    check_apart(op, "cache.values", values, "cache.keys", keys);
    check_apart(op, "cache.keys", keys, "qkv", qkv);
    check_apart(op, "cache.values", values, "qkv", qkv);
    shape.kept = *dtype_of(keys);
    starts = by_sample("start", starts, qkv);
    final = by_sample("final", final, qkv);
    // On a CUDA device this waits for the stream, like the Python function, which needs the last slot as a number.
    const Optional seen =
        starts.has_value() && qkv.is_cuda()
            ? Optional(torch::stable::to(*starts, torch::stable::Device(torch::stable::DeviceType::CPU)))
            : starts;
    int64_t first = seen.has_value() && shape.batch > 0 ? numbers(seen)[0] : start;
    int64_t last = first;
    for (int64_t b = 0; seen.has_value() && b < shape.batch; ++b) {
        first = std::min(first, numbers(seen)[b]);
        last = std::max(last, numbers(seen)[b]);
    }
    require(first >= 0, op, "start is", [&] { return std::to_string(first); }, [] { return "a slot, at least 0"; });
    require(
        last <= keys.size(2) - shape.tokens, op, "cache holds", [&] { return std::to_string(keys.size(2)) + " slots"; },
        [&] { return "at least " + sum_text(last, shape.tokens); });
    const Turn query(query_cos, query_sin, query_norm, shape.data);
    const Turn key(key_cos, key_sin, key_norm, shape.data);
    const Tensor rows = with_rows(qkv);
    const Tensor q = new_heads(qkv, shape, heads);
    const Tensor k = with_heads(keys);
    const Tensor v = with_heads(values);
    run_rows(qkv, {shape, rows_of(rows), query.view, key.view, heads_of(q), heads_of(k), heads_of(v), start,
                   numbers(starts), numbers(final), false});
    if (k.data_ptr() != keys.data_ptr()) torch::stable::copy_(keys, k);
    if (v.data_ptr() != values.data_ptr()) torch::stable::copy_(values, v);
    return q;
}

std::tuple<Tensor, Tensor> run_backward(Tensor grad_q, Tensor grad_k, Tensor grad_v, const Tensor& qkv, int64_t heads,
                                        int64_t kv_heads, const Optional& query_cos, const Optional& query_sin,
                                        const Optional& key_cos, const Optional& key_sin, const Optional& query_norm,
                                        const Optional& key_norm, int64_t pairing) {
    const RopeAppendShape shape =
        check(qkv, {heads, kv_heads, query_cos, query_sin, key_cos, key_sin, query_norm, key_norm, pairing});
    const auto check_gradient = [&](const char* name, const Tensor& gradient, int64_t count) {
        check_tensor(backward_op, name, gradient, qkv.scalar_type(), {shape.batch, count, shape.tokens, shape.head_dim},
                     "qkv", qkv);
    };
    check_gradient("grad_q", grad_q, heads);
    check_gradient("grad_k", grad_k, kv_heads);
    check_gradient("grad_v", grad_v, kv_heads);
    const Turn query(query_cos, query_sin, query_norm, shape.data);
    const Turn key(key_cos, key_sin, key_norm, shape.data);
    const Tensor rows = with_rows(qkv);
    grad_q = with_heads(grad_q);
    grad_k = with_heads(grad_k);
    grad_v = with_heads(grad_v);
    const ScalarType type = arithmetic_type(shape.data);
    const bool normed = query_norm.has_value() || key_norm.has_value();
    const RowBlocks blocks = blocks_on(qkv, shape.batch * shape.tokens);
    const Tensor grad_qkv = new_result(qkv);
    const Tensor partial = empty_like_shape(qkv, {normed ? blocks.count : 0, 2, shape.head_dim}, type);
    const Tensor weights = empty_like_shape(qkv, {normed ? 2 : 0, shape.head_dim}, type);
    const RopeAppendBackwardArgs args{shape,
                                      rows_of(rows),
                                      query.view,
                                      key.view,
                                      heads_of(grad_q),
                                      heads_of(grad_k),
                                      heads_of(grad_v),
                                      rows_of(grad_qkv),
                                      normed ? partial.data_ptr() : nullptr,
                                      normed ? weights.data_ptr() : nullptr,
                                      blocks};
    run_on_device(op, "qkv", qkv, args, rope_append_backward_cuda, [&] {
        const RopeAppendKernels& kernels = variants.pick();
        cpu::parallel_rows(
            blocks.count, blocks.per_block * width_of(shape),
            [&](int64_t begin, int64_t end) { kernels.backward(args, begin, end); }, cpu::light_grain_elements);
        if (normed) kernels.sum_blocks(args);
    });
    return {grad_qkv, weights};
}

}  // namespace

#define STARFLOW_ROPE_OPTIONS                                                                                       \
    "Tensor qkv, int heads, int kv_heads, Tensor? query_cos, Tensor? query_sin, Tensor? key_cos, Tensor? key_sin, " \
    "Tensor? query_norm, Tensor? key_norm, int pairing"

STABLE_TORCH_LIBRARY_FRAGMENT(starflow_ext, m) {
    m.def("rope_append(" STARFLOW_ROPE_OPTIONS ") -> (Tensor, Tensor, Tensor)");
    m.def("rope_append_cached(" STARFLOW_ROPE_OPTIONS
          ", Tensor(a!) keys, Tensor(b!) values, int start, Tensor? starts, Tensor? final) -> Tensor");
    m.def("rope_append_backward(Tensor grad_q, Tensor grad_k, Tensor grad_v, " STARFLOW_ROPE_OPTIONS
          ") -> (Tensor, Tensor)");
}

STARFLOW_IMPLEMENT(m) {
    m.impl("rope_append", TORCH_BOX(&run_forward));
    m.impl("rope_append_cached", TORCH_BOX(&run_cached));
    m.impl("rope_append_backward", TORCH_BOX(&run_backward));
}

}  // namespace starflow
