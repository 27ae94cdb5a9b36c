#include "ops/jacobi_common/sweep_block.h"

#include <limits>

#include "common/check.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cuda/launch.h"
#include "cuda/runtime.h"
#include "ops/linear/packed_weight.h"
#include "ops/norm/norm.h"
#include "ops/rope_append/rope_append.h"

namespace starflow {
namespace {

const cpu::Variants<SweepKernels> variants{STARFLOW_DOT_VARIANTS(jacobi_sweep)};

std::optional<Storage> storage_of(const Tensor& panels) {
    switch (panels.scalar_type()) {
        case ScalarType::Float:
            return Storage::float32;
        case ScalarType::Half:
            return Storage::float16;
        case ScalarType::Char:
            return Storage::int8;
        case ScalarType::BFloat16:
            return panels.dim() == 5 ? Storage::two_bfloat16 : Storage::bfloat16;
        default:
            return std::nullopt;
    }
}

// Of a tensor of a block, put together only for a message: a block has hundreds, and each sweep checks them.
struct Name {
    int64_t layer;  // or -1
    const char* part;
    const char* detail = "";

    Name of(const char* what) const { return {layer, part, what}; }
    // "layers[2].qkv.bias" and what is said of it.
    auto says(const char* what) const {
        return [*this, what] { return text() + what; };
    }
    std::string text() const { return (layer < 0 ? "" : "layers[" + std::to_string(layer) + "].") + part + detail; }
};

// Takes the tensors of a block one after the other, all on the device of the caches. `product` is what products on a
// CUDA device are taken of.
class Reader {
  public:
    Reader(const char* op, const BlockTensors& block)
        : op_(op), tensors_(block.weights), like_(block.keys), product_(block.activations) {}

    const Tensor& next(const Name& name) {
        require(
            at_ < tensors_.size(), op_, "weights holds", [&] { return std::to_string(tensors_.size()) + " tensors"; },
            [&] { return name.text() + " as one more"; });
        const Tensor& tensor = tensors_[at_++];
        const bool here = tensor.numel() == 0 || (tensor.is_cuda() == like_.is_cuda() &&
                                                  tensor.get_device_index() == like_.get_device_index());
        require(
            here && tensor.is_contiguous(), op_, name.says(" is"),
            [&] { return "strided or not on " + device_text(like_); },
            [&] { return "a contiguous tensor on " + device_text(like_); });
        return tensor;
    }

    // A float32 tensor with `count` elements, or null where it is empty.
    const float* floats(const Name& name, int64_t count) {
        const Tensor& tensor = next(name);
        if (tensor.numel() == 0) return nullptr;
        require(
            tensor.scalar_type() == ScalarType::Float, op_, name.says(" has dtype"), [&] { return dtype_text(tensor); },
            [] { return "float32"; });
        require(
            tensor.numel() == count, op_, name.says(" has"), [&] { return shape_text(shape_of(tensor)); },
            [&] { return std::to_string(count) + " elements"; });
        return static_cast<const float*>(tensor.data_ptr());
    }

    Panels panels(const Name& name, int64_t columns, int64_t depth, bool optional = false) {
        const Tensor& tensor = next(name);
        Panels panels{nullptr, nullptr, nullptr, columns, depth, Storage::float32};
        if (tensor.numel() > 0 || !optional) {
            panels.storage = like_.is_cuda() ? matrix(name, tensor, panels) : packed(name, tensor, panels);
            panels.data = tensor.data_ptr();
        }
        panels.column_scale = floats(name.of(".column_scale"), columns);
        panels.bias = floats(name.of(".bias"), columns);
        return panels;
    }

    RowNorm norm(const Name& name, NormKind kind, int64_t width, bool with_bias) {
        RowNorm norm{kind, floats(name.of(".weight"), width), with_bias ? floats(name.of(".bias"), width) : nullptr,
                     kind == NormKind::layer ? 1e-5F : 1e-6F};
        if (norm.weight == nullptr) norm.kind = NormKind::none;
        return norm;
    }

    void finish() const {
        require(
            at_ == tensors_.size(), op_, "weights holds", [&] { return std::to_string(tensors_.size()) + " tensors"; },
            [&] { return std::to_string(at_); });
    }

  private:
    // Checks a weight in the panels that CPU kernels read.
    Storage packed(const Name& name, const Tensor& tensor, Panels panels) const {
        const std::optional<Storage> storage = storage_of(tensor);
        require(
            storage.has_value(), op_, name.says(" has dtype"), [&] { return dtype_text(tensor); },
            [] { return "float32, float16, bfloat16 or int8"; });
        panels.storage = *storage;
        const int64_t bytes = panels.count() * panels.panel_bytes();
        require(
            tensor.numel() * static_cast<int64_t>(tensor.element_size()) == bytes, op_, name.says(" has"),
            [&] { return shape_text(shape_of(tensor)); },
            [&] {
                return std::to_string(panels.count()) + " panels of depth " + std::to_string(panels.padded_depth()) +
                       " for a weight of shape " + shape_text({panels.columns, panels.depth});
            });
        return *storage;
    }

    // Checks a weight in the rows that CUDA kernels read.
    Storage matrix(const Name& name, const Tensor& tensor, const Panels& panels) const {
        const Storage storage = product_ == "bfloat16" ? Storage::bfloat16 : Storage::float16;
        require(
            tensor.scalar_type() == panels_type(storage), op_, name.says(" has dtype"),
            [&] { return dtype_text(tensor); }, [&] { return product_ + " like activations"; });
        const std::vector<int64_t> expected = device_rows_shape(panels.columns, panels.depth);
        require(
            shape_of(tensor) == expected, op_, name.says(" has shape"), [&] { return shape_text(shape_of(tensor)); },
            [&] {
                return shape_text(expected) + " for a weight of shape " + shape_text({panels.columns, panels.depth});
            });
        const auto address = reinterpret_cast<uintptr_t>(tensor.data_ptr());
        require(
            address % 16 == 0, op_, name.says(" is at"), [&] { return "address " + std::to_string(address); },
            [] { return "a multiple of 16 bytes"; });
        return storage;
    }

    const char* op_;
    const std::vector<Tensor>& tensors_;
    const Tensor& like_;
    const std::string& product_;
    size_t at_ = 0;
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
    require(
        tensors.sizes.size() == 10, op, "sizes holds",
        [&] { return std::to_string(tensors.sizes.size()) + " numbers"; }, [] { return "10"; });
    const auto& n = tensors.sizes;
    for (size_t i = 0; i < 7; ++i) {
        require(n[i] > 0, op, "sizes holds", [&] { return shape_text(n); }, [] { return "positive numbers"; });
    }
    SweepBlock& b = args_;
    b.channels = n[0];
    b.width = n[1];
    b.heads = n[2];
    b.kv_heads = n[3];
    b.head_dim = n[4];
    b.hidden = n[5];
    const int64_t out = n[6];
    b.text_tokens = n[7];
    b.slots = n[8];
    const auto kind = static_cast<NormKind>(n[9]);
    require(
        b.heads % b.kv_heads == 0, op, "kv_heads is", [&] { return std::to_string(b.kv_heads); },
        [&] { return "a divisor of the " + std::to_string(b.heads) + " heads"; });
    const Tensor& keys = tensors.keys;
    const bool on_device = keys.is_cuda();
    if (on_device) {
        cuda::check_build(op, "keys", keys);
        require(
            tensors.activations == "bfloat16" || tensors.activations == "float16", op, "activations is",
            [&] { return '"' + tensors.activations + '"'; },
            [&] { return R"("bfloat16" or "float16" on )" + device_text(keys); });
    } else {
        require(
            tensors.activations == "float32" || tensors.activations == "bfloat16" ||
                tensors.activations == "two_bfloat16",
            op, "activations is", [&] { return '"' + tensors.activations + '"'; },
            [] { return R"("float32", "bfloat16" or "two_bfloat16")"; });
        b.activations = tensors.activations == "float32"    ? Activations::float32
                        : tensors.activations == "bfloat16" ? Activations::bfloat16
                                                            : Activations::two_bfloat16;
    }
    const Tensor& values = tensors.values;
    const std::optional<Storage> cache = storage_of(keys);
    require(
        keys.dim() == 4 && cache.has_value() && *cache != Storage::int8 && keys.is_contiguous() &&
            keys.scalar_type() == values.scalar_type() && shape_of(keys) == shape_of(values) &&
            same_device(values, keys) && values.is_contiguous(),
        op, "keys has shape", [&] { return shape_text(shape_of(keys)) + " and dtype " + dtype_text(keys); },
        [] {
            return "(layers, cache rows, kv_heads, elements of a head) in float32, float16 or bfloat16, like values";
        });
    b.cache = *cache;
    b.layer_count = keys.size(0);
    b.cache_rows = keys.size(1);
    // On a CUDA device a head is its slots, side by side.
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

    Reader read(op, tensors);
    const int64_t half = b.head_dim / 2;
    b.start_token = read.floats({-1, "start_token"}, b.channels);
    b.position = read.floats({-1, "position"}, (b.slots - b.text_tokens) * b.width);
    b.condition = read.floats({-1, "condition"}, b.cache_rows * b.width);
    b.query_cos = read.floats({-1, "query_cos"}, b.slots * half);
    b.query_sin = read.floats({-1, "query_sin"}, b.slots * half);
    b.key_cos = read.floats({-1, "key_cos"}, b.slots * half);
    b.key_sin = read.floats({-1, "key_sin"}, b.slots * half);
    b.temperature = read.floats({-1, "temperature"}, b.cache_rows);
    require(
        b.temperature != nullptr, op, "temperature is", [] { return "empty"; },
        [] { return "one number a cache row"; });
    b.final_norm = read.norm({-1, "final_norm"}, NormKind::rms, b.width, false);
    b.proj_in = read.panels({-1, "proj_in"}, b.width, b.channels);
    b.proj_out = read.panels({-1, "proj_out"}, out, b.width);
    layers_.resize(b.layer_count);
    const int64_t attended = b.heads * b.head_dim;
    char* layer_keys = static_cast<char*>(keys.data_ptr());
    char* layer_values = static_cast<char*>(values.data_ptr());
    for (int64_t l = 0; l < b.layer_count; ++l) {
        SweepLayer& layer = layers_[l];
        layer.qkv = read.panels({l, "qkv"}, attended + 2 * b.kv_heads * b.head_dim, b.width);
        layer.proj = read.panels({l, "proj"}, b.width, attended);
        layer.up = read.panels({l, "up"}, b.hidden, b.width);
        layer.gate = read.panels({l, "gate"}, b.hidden, b.width, true);
        layer.down = read.panels({l, "down"}, b.width, b.hidden);
        layer.attention_norm = read.norm({l, "attention_norm"}, kind, b.width, true);
        layer.query_norm = read.norm({l, "query_norm"}, NormKind::rms, b.head_dim, false);
        layer.key_norm = read.norm({l, "key_norm"}, NormKind::rms, b.head_dim, false);
        layer.attention_post = read.norm({l, "attention_post"}, NormKind::rms, b.width, false);
        layer.mlp_norm = read.norm({l, "mlp_norm"}, kind, b.width, true);
        layer.mlp_post = read.norm({l, "mlp_post"}, NormKind::rms, b.width, false);
        layer.keys = layer_keys + l * b.cache_rows * b.kv_heads * head_bytes;
        layer.values = layer_values + l * b.cache_rows * b.kv_heads * head_bytes;
    }
    read.finish();
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
    return {device.multiprocessors, STARFLOW_SM90 != 0 && device.major == 9};
}

Tensor on_host(const Tensor& tensor) {
    return tensor.is_cpu() ? tensor : torch::stable::to(tensor, torch::stable::Device(torch::stable::DeviceType::CPU));
}

const SweepKernels& sweep_kernels() { return variants.pick(); }

void run_on_torch_threads(int64_t members, const TeamWork& work) { torch::stable::parallel_for(0, members, 1, work); }

int64_t torch_threads() { return torch::stable::get_num_threads(); }

}  // namespace starflow
