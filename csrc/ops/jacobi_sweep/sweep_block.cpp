#include "ops/jacobi_sweep/sweep_block.h"

#include <algorithm>
#include <limits>

#include "common/check.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cuda/launch.h"
#include "cuda/repeat.h"
#include "cuda/runtime.h"
#include "ops/linear/linear_choice.h"
#include "ops/linear/packed_weight.h"
#include "ops/norm/norm.h"
#include "ops/rope_append/rope_append.h"

namespace starflow {
namespace {

const cpu::Variants<SweepKernels> variants{STARFLOW_DOT_VARIANTS(jacobi_sweep)};

std::optional<MatrixStorage> storage_of(const Tensor& panels) {
    switch (panels.scalar_type()) {
        case ScalarType::Float:
            return MatrixStorage::float32;
        case ScalarType::Half:
            return MatrixStorage::float16;
        case ScalarType::Char:
            return MatrixStorage::int8;
        case ScalarType::BFloat16:
            return panels.dim() == 5 ? MatrixStorage::two_bfloat16 : MatrixStorage::bfloat16;
        default:
            return std::nullopt;
    }
}

// A tensor of a block by its place; the name is put together only for a message: a block has hundreds of tensors, and
// each sweep checks them.
struct Place {
    int64_t layer;  // or -1
    int tensor;     // BlockTensor, or LayerTensor

    size_t index() const { return layer < 0 ? tensor : block_tensor_count + layer * layer_tensor_count + tensor; }
    Place behind(int by) const { return {layer, tensor + by}; }
    // "layers[2].qkv.bias" and what is said of it.
    auto says(const char* what) const {
        return [*this, what] {
            return layer < 0 ? std::string(block_tensor_names[tensor]) + what
                             : "layers[" + std::to_string(layer) + "]." + layer_tensor_names[tensor] + what;
        };
    }
};

// Reads the tensors of a block, all on the device of the caches.
class Reader {
  public:
    Reader(const char* op, const BlockTensors& block, int64_t layers, ProductInput product)
        : op_(op), tensors_(block.weights), like_(block.keys), product_(product) {
        const int64_t expected = block_tensor_count + layers * layer_tensor_count;
        require(
            static_cast<int64_t>(tensors_.size()) == expected, op_, "weights holds",
            [&] { return std::to_string(tensors_.size()) + " tensors"; }, [&] { return std::to_string(expected); });
    }

    const Tensor& at(const Place& place) const {
        const Tensor& tensor = tensors_[place.index()];
        const bool here = tensor.numel() == 0 || (tensor.is_cuda() == like_.is_cuda() &&
                                                  tensor.get_device_index() == like_.get_device_index());
        require(
            here && tensor.is_contiguous(), op_, place.says(" is"),
            [&] { return "strided or not on " + device_text(like_); },
            [&] { return "a contiguous tensor on " + device_text(like_); });
        return tensor;
    }

    // A float32 tensor with `count` elements, or null where it is empty.
    const float* floats(const Place& place, int64_t count) const {
        const Tensor& tensor = at(place);
        if (tensor.numel() == 0) return nullptr;
        require(
            tensor.scalar_type() == ScalarType::Float, op_, place.says(" has dtype"),
            [&] { return dtype_text(tensor); }, [] { return "float32"; });
        require(
            tensor.numel() == count, op_, place.says(" has"), [&] { return shape_text(shape_of(tensor)); },
            [&] { return std::to_string(count) + " elements"; });
        return static_cast<const float*>(tensor.data_ptr());
    }

    Panels panels(const Place& place, int64_t columns, int64_t depth, bool optional = false) const {
        const Tensor& tensor = at(place);
        Panels panels{nullptr, nullptr, nullptr, columns, depth, MatrixStorage::float32};
        if (tensor.numel() > 0 || !optional) {
            panels.storage = like_.is_cuda() ? matrix(place, tensor, panels) : packed(place, tensor, panels);
            panels.data = tensor.data_ptr();
        }
        panels.column_scale = floats(place.behind(1), columns);
        panels.bias = floats(place.behind(2), columns);
        return panels;
    }

    RowNorm norm(const Place& weight, NormKind kind, int64_t width) const {
        const float* given = floats(weight, width);
        if (given == nullptr) kind = NormKind::none;
        return {kind, given, nullptr, static_cast<float>(epsilon_of(kind)), static_cast<float>(weight_offset_of(kind))};
    }

    // Reads a norm whose bias stands behind its weight; only LayerNorm adds it.
    RowNorm norm_with_bias(const Place& weight, NormKind kind, int64_t width) const {
        RowNorm found = norm(weight, kind, width);
        const float* bias = floats(weight.behind(1), width);
        if (found.kind == NormKind::layer) found.bias = bias;
        return found;
    }

  private:
    // Checks a weight in the panels that CPU kernels read.
    MatrixStorage packed(const Place& place, const Tensor& tensor, Panels panels) const {
        const std::optional<MatrixStorage> storage = storage_of(tensor);
        require(
            storage.has_value(), op_, place.says(" has dtype"), [&] { return dtype_text(tensor); },
            [] { return "float32, float16, bfloat16 or int8"; });
        panels.storage = *storage;
        const int64_t bytes = panels.count() * panels.panel_bytes();
        require(
            tensor.numel() * static_cast<int64_t>(tensor.element_size()) == bytes, op_, place.says(" has"),
            [&] { return shape_text(shape_of(tensor)); },
            [&] {
                return std::to_string(panels.count()) + " panels of depth " + std::to_string(panels.padded_depth()) +
                       " for a weight of shape " + shape_text({panels.columns, panels.depth});
            });
        return *storage;
    }

    // Checks a weight in the rows that CUDA kernels read.
    MatrixStorage matrix(const Place& place, const Tensor& tensor, const Panels& panels) const {
        const MatrixStorage storage =
            product_ == ProductInput::bfloat16 ? MatrixStorage::bfloat16 : MatrixStorage::float16;
        require(
            tensor.scalar_type() == panels_type(storage), op_, place.says(" has dtype"),
            [&] { return dtype_text(tensor); },
            [&] { return std::string(matrix_storage_names[static_cast<int>(storage)]) + " like product_input"; });
        const std::vector<int64_t> expected = device_rows_shape(panels.columns, panels.depth);
        require(
            shape_of(tensor) == expected, op_, place.says(" has shape"), [&] { return shape_text(shape_of(tensor)); },
            [&] {
                return shape_text(expected) + " for a weight of shape " + shape_text({panels.columns, panels.depth});
            });
        const auto address = reinterpret_cast<uintptr_t>(tensor.data_ptr());
        require(
            address % 16 == 0, op_, place.says(" is at"), [&] { return "address " + std::to_string(address); },
            [] { return "a multiple of 16 bytes"; });
        return storage;
    }

    const char* op_;
    const std::vector<Tensor>& tensors_;
    const Tensor& like_;
    ProductInput product_;  // on a CUDA device
};

// What the CUDA kernels of a block's ops take.
void check_device_limits(const char* op, const SweepBlock& block, bool post_norms) {
    require(
        block.head_dim <= rope_append_most_head_dim_cuda, op, "head_dim is",
        [&] { return std::to_string(block.head_dim); },
        [] { return "at most " + std::to_string(rope_append_most_head_dim_cuda) + " on a CUDA device"; });
    require(
        !post_norms || block.width <= norm_most_channels_cuda, op, "width is",
        [&] { return std::to_string(block.width); },
        [] { return "at most " + std::to_string(norm_most_channels_cuda) + " with a post-norm on a CUDA device"; });
    constexpr int64_t most = std::numeric_limits<int32_t>::max();
    const int64_t keys = block.cache_rows * block.kv_heads * block.slots;
    require(
        keys <= most, op, "keys has", [&] { return std::to_string(keys) + " rows"; },
        [&] { return "at most " + std::to_string(most); });
}

}  // namespace

Block::Block(const char* op, const BlockTensors& tensors) {
    const auto& sizes = tensors.sizes;
    require(
        sizes.size() == block_size_count, op, "sizes holds", [&] { return std::to_string(sizes.size()) + " numbers"; },
        [] { return std::to_string(block_size_count); });
    for (int i = 0; i < block_size_count; ++i) {
        const int64_t least = i == size_text_tokens || i >= size_slots ? 0 : 1;
        require(
            sizes[i] >= least, op, named(block_size_names[i], " is"), [&] { return sizes[i]; },
            [&] { return "at least " + std::to_string(least); });
    }
    SweepBlock& b = args_;
    b.channels = sizes[size_channels];
    b.width = sizes[size_width];
    b.heads = sizes[size_heads];
    b.kv_heads = sizes[size_kv_heads];
    b.head_dim = sizes[size_head_dim];
    b.hidden = sizes[size_hidden];
    b.text_tokens = sizes[size_text_tokens];
    b.slots = sizes[size_slots];
    b.condition_tokens = sizes[size_condition_tokens];
    // More than there are slots is as many: so no product of the two overflows.
    b.mask_frame_tokens = std::min(sizes[size_mask_frame_tokens], b.slots);
    b.mask_frames = std::min(sizes[size_mask_frames], b.slots);
    b.whole_frames = sizes[size_whole_frames] != 0;
    const bool may_be_whole = b.mask_frame_tokens > 0 && b.text_tokens == 0 && !tensors.keys.is_cuda();
    require(
        sizes[size_whole_frames] <= (may_be_whole ? 1 : 0), op, "whole_frames is",
        [&] { return std::to_string(sizes[size_whole_frames]); },
        [&] { return may_be_whole ? "0 or 1" : "0 without mask_frame_tokens, with text or on a CUDA device"; });
    const auto kind = option_of<NormKind>(op, "norm", sizes[size_norm], norm_kind_names);
    require(
        b.heads % b.kv_heads == 0, op, "kv_heads is", [&] { return std::to_string(b.kv_heads); },
        [&] { return "a divisor of the " + std::to_string(b.heads) + " heads"; });
    const Tensor& keys = tensors.keys;
    const bool on_device = keys.is_cuda();
    b.product_input = option_of<ProductInput>(op, "product_input", tensors.product_input, product_input_names);
    const auto input = [&] { return std::string("\"") + product_input_names[tensors.product_input] + '"'; };
    if (on_device) {
        cuda::check_build(op, "keys", keys);
        require(b.product_input == ProductInput::bfloat16 || b.product_input == ProductInput::float16, op,
                "product_input is", input, [&] { return R"("bfloat16" or "float16" on )" + device_text(keys); });
    } else {
        require(b.product_input != ProductInput::float16, op, "product_input is", input,
                [] { return R"("float32", "bfloat16" or "two_bfloat16")"; });
    }
    const Tensor& values = tensors.values;
    const std::optional<MatrixStorage> cache = storage_of(keys);
    require(
        keys.dim() == 4 && cache.has_value() && *cache != MatrixStorage::int8 && keys.is_contiguous() &&
            keys.scalar_type() == values.scalar_type() && shape_of(keys) == shape_of(values) &&
            same_device(values, keys) && values.is_contiguous(),
        op, "keys has shape", [&] { return shape_text(shape_of(keys)) + " and dtype " + dtype_text(keys); },
        [] {
            return "(layers, cache rows, kv_heads, elements of a head) in float32, float16 or bfloat16, like values";
        });
    b.cache = *cache;
    check_apart(op, "values", values, "keys", keys);
    b.layer_count = keys.size(0);
    b.cache_rows = keys.size(1);
    // On a CUDA device a head is stored as its slots, side by side.
    const int64_t head_bytes =
        on_device ? b.slots * b.head_dim * storage_bytes(b.cache) : cache_head_bytes(b.cache, b.slots, b.head_dim);
    const int64_t elements = head_bytes / storage_bytes(b.cache);
    require(
        keys.size(2) == b.kv_heads && keys.size(3) == elements, op, "keys has shape",
        [&] { return shape_text(shape_of(keys)); },
        [&] {
            return shape_text({b.layer_count, b.cache_rows, b.kv_heads, elements}) + " for " + std::to_string(b.slots) +
                   " slots of head_dim " + std::to_string(b.head_dim);
        });

    const Reader read(op, tensors, b.layer_count, b.product_input);
    const auto of_block = [](BlockTensor tensor) { return Place{-1, tensor}; };
    const int64_t half = b.head_dim / 2;
    b.start_token = read.floats(of_block(block_start_token), b.channels);
    b.position = read.floats(of_block(block_position), (b.slots - b.text_tokens) * b.width);
    b.condition = read.floats(of_block(block_condition), b.cache_rows * condition_rows(b) * b.width);
    b.query_cos = read.floats(of_block(block_query_cos), b.slots * half);
    b.query_sin = read.floats(of_block(block_query_sin), b.slots * half);
    b.key_cos = read.floats(of_block(block_key_cos), b.slots * half);
    b.key_sin = read.floats(of_block(block_key_sin), b.slots * half);
    b.temperature = read.floats(of_block(block_temperature), b.cache_rows);
    require(
        b.temperature != nullptr, op, "temperature is", [] { return "empty"; },
        [] { return "one number a cache row"; });
    if (!on_device) require_positive(op, "temperature holds", b.temperature, b.cache_rows);
    b.final_norm = read.norm(of_block(block_final_norm), NormKind::rms, b.width);
    b.proj_in = read.panels(of_block(block_proj_in), b.width, b.channels);
    b.proj_out = read.panels(of_block(block_proj_out), sizes[size_out_channels], b.width);
    layers_.resize(b.layer_count);
    const int64_t attended = b.heads * b.head_dim;
    char* layer_keys = static_cast<char*>(keys.data_ptr());
    char* layer_values = static_cast<char*>(values.data_ptr());
    for (int64_t l = 0; l < b.layer_count; ++l) {
        const auto of_layer = [l](LayerTensor tensor) { return Place{l, tensor}; };
        SweepLayer& layer = layers_[l];
        layer.qkv = read.panels(of_layer(layer_qkv), attended + 2 * b.kv_heads * b.head_dim, b.width);
        layer.proj = read.panels(of_layer(layer_proj), b.width, attended);
        layer.up = read.panels(of_layer(layer_up), b.hidden, b.width);
        layer.gate = read.panels(of_layer(layer_gate), b.hidden, b.width, true);
        layer.down = read.panels(of_layer(layer_down), b.width, b.hidden);
        layer.attention_norm = read.norm_with_bias(of_layer(layer_attention_norm), kind, b.width);
        layer.query_norm = read.norm(of_layer(layer_query_norm), NormKind::rms, b.head_dim);
        layer.key_norm = read.norm(of_layer(layer_key_norm), NormKind::rms, b.head_dim);
        layer.attention_post = read.norm(of_layer(layer_attention_post), NormKind::rms, b.width);
        layer.mlp_norm = read.norm_with_bias(of_layer(layer_mlp_norm), kind, b.width);
        layer.mlp_post = read.norm(of_layer(layer_mlp_post), NormKind::rms, b.width);
        layer.keys = layer_keys + l * b.cache_rows * b.kv_heads * head_bytes;
        layer.values = layer_values + l * b.cache_rows * b.kv_heads * head_bytes;
    }
    b.layers = layers_.data();
    if (on_device) {
        bool post_norms = false;
        for (const SweepLayer& layer : layers_) {
            post_norms =
                post_norms || layer.attention_post.kind != NormKind::none || layer.mlp_post.kind != NormKind::none;
        }
        check_device_limits(op, b, post_norms);
    }
}

CudaDevice cuda_device(const Tensor& data) {
    const cuda::DeviceArch device = cuda::device_arch(data.get_device_index());
    constexpr int first_with_early_launches = 9;
    return {device.multiprocessors, STARFLOW_SM90 != 0 && device.major == 9, linear_kernel(device.major),
            device.major >= first_with_early_launches && cuda::early_launches()};
}

Tensor on_host(const Tensor& tensor) {
    return tensor.is_cpu() ? tensor : torch::stable::to(tensor, torch::stable::Device(torch::stable::DeviceType::CPU));
}

const SweepKernels& sweep_kernels() { return variants.pick(); }

void run_on_torch_threads(int64_t members, const TeamWork& work) { cpu::parallel(members, 1, work); }

int64_t torch_threads() { return torch::stable::get_num_threads(); }

}  // namespace starflow
