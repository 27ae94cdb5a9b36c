// The order in which jacobi_sweep and jacobi_solve take the numbers and tensors of a block: no torch, no std. The names
// are those that messages use, and by which Python puts them in order.
#pragma once

namespace starflow {

enum BlockSize : int {
    size_channels,
    size_width,
    size_heads,
    size_kv_heads,
    size_head_dim,
    size_hidden,
    size_out_channels,
    size_text_tokens,
    size_slots,
    size_norm,               // a NormKind
    size_mask_frame_tokens,  // 0: a slot sees all before it
    size_mask_frames,
    size_condition_tokens,  // 0: a row of the caches has one condition
    size_whole_frames,      // 1: a slot sees all of its frame, and not up to itself
    block_size_count
};
inline constexpr const char* block_size_names[]{
    "channels",    "width", "heads", "kv_heads",          "head_dim",    "hidden",           "out_channels",
    "text_tokens", "slots", "norm",  "mask_frame_tokens", "mask_frames", "condition_tokens", "whole_frames"};

// A weight is its panels (on CUDA rows), the scale of its columns and its bias, one behind the other.
enum BlockTensor : int {
    block_start_token,  // (channels,)
    block_position,     // (grid slots, width)
    block_condition,    // (cache rows, width), or (cache rows, frames, width)
    block_query_cos,    // (slots, head_dim / 2), like the next three
    block_query_sin,
    block_key_cos,
    block_key_sin,
    block_temperature,  // (cache rows,)
    block_final_norm,   // (width,)
    block_proj_in,
    block_proj_out = block_proj_in + 3,
    block_tensor_count = block_proj_out + 3
};
inline constexpr const char* block_tensor_names[]{"start_token",
                                                  "position",
                                                  "condition",
                                                  "query_cos",
                                                  "query_sin",
                                                  "key_cos",
                                                  "key_sin",
                                                  "temperature",
                                                  "final_norm.weight",
                                                  "proj_in",
                                                  "proj_in.column_scale",
                                                  "proj_in.bias",
                                                  "proj_out",
                                                  "proj_out.column_scale",
                                                  "proj_out.bias"};

enum LayerTensor : int {
    layer_qkv,
    layer_proj = layer_qkv + 3,
    layer_up = layer_proj + 3,
    layer_gate = layer_up + 3,
    layer_down = layer_gate + 3,
    layer_attention_norm = layer_down + 3,        // weight and bias (width,)
    layer_query_norm = layer_attention_norm + 2,  // (head_dim,)
    layer_key_norm,                               // (head_dim,)
    layer_attention_post,                         // (width,)
    layer_mlp_norm,                               // weight and bias (width,)
    layer_mlp_post = layer_mlp_norm + 2,          // (width,)
    layer_tensor_count
};
inline constexpr const char* layer_tensor_names[]{"qkv",
                                                  "qkv.column_scale",
                                                  "qkv.bias",
                                                  "proj",
                                                  "proj.column_scale",
                                                  "proj.bias",
                                                  "up",
                                                  "up.column_scale",
                                                  "up.bias",
                                                  "gate",
                                                  "gate.column_scale",
                                                  "gate.bias",
                                                  "down",
                                                  "down.column_scale",
                                                  "down.bias",
                                                  "attention_norm.weight",
                                                  "attention_norm.bias",
                                                  "query_norm.weight",
                                                  "key_norm.weight",
                                                  "attention_post.weight",
                                                  "mlp_norm.weight",
                                                  "mlp_norm.bias",
                                                  "mlp_post.weight"};

static_assert(sizeof(block_size_names) / sizeof(*block_size_names) == block_size_count);
static_assert(sizeof(block_tensor_names) / sizeof(*block_tensor_names) == block_tensor_count);
static_assert(sizeof(layer_tensor_names) / sizeof(*layer_tensor_names) == layer_tensor_count);

}  // namespace starflow
