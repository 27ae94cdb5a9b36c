// What the kernels of block_attention and of its gradient share on every device: rows of a key head, and what each
// sees. No torch, no std.
//
// The rows of a key head are its queries times the heads of its group, heads running fastest: row r is query
// r / group of head kv_head * group + r % group. A tile may begin and end inside of a group.
#pragma once
#include "common/visible_keys.h"
#include "ops/block_attention/block_attention.h"

namespace starflow {
namespace {

STARFLOW_HOST_DEVICE constexpr int64_t group_of(const AttentionShape& shape) { return shape.heads / shape.kv_heads; }
STARFLOW_HOST_DEVICE constexpr int64_t rows_of(const AttentionShape& shape) { return shape.queries * group_of(shape); }

template <class T, class Index>
STARFLOW_HOST_DEVICE inline T* row_at(const HeadRows& rows, const AttentionShape& shape, int64_t b, int64_t kv_head,
                                      Index r) {
    const auto group = static_cast<Index>(group_of(shape));
    return static_cast<T*>(rows.data) + b * rows.batch_stride + (kv_head * group + r % group) * rows.head_stride +
           r / group * rows.row_stride;
}
template <class T>
STARFLOW_HOST_DEVICE inline T* head_at(const HeadRows& rows, int64_t b, int64_t head) {
    return static_cast<T*>(rows.data) + b * rows.batch_stride + head * rows.head_stride;
}
// Where a row lies in a (batch, heads, queries) array.
template <class Index>
STARFLOW_HOST_DEVICE constexpr int64_t index_of(const AttentionShape& shape, int64_t b, int64_t kv_head, Index r) {
    const auto group = static_cast<Index>(group_of(shape));
    return (b * shape.heads + kv_head * group + r % group) * shape.queries + r / group;
}

STARFLOW_HOST_DEVICE constexpr float scale_of(const AttentionScale& scale, int64_t b) {
    return scale.temperatures != nullptr ? static_cast<float>(1.0 / (scale.root * scale.temperatures[b])) : scale.scale;
}

// With the position of a query its prefix, its first and its last key grow, or stay.
STARFLOW_HOST_DEVICE constexpr VisibleKeys visible_keys(const AttentionMask& mask, const AttentionShape& shape,
                                                        int64_t b, int64_t query) {
    const auto smaller = [](int64_t x, int64_t y) { return x < y ? x : y; };
    // No tensor has so many keys: beyond, a position sees what it sees there, and sums do not overflow.
    constexpr int64_t far = int64_t{1024} * 1024 * 1024 * 1024;
    const int64_t start = mask.starts != nullptr ? mask.starts[b] : mask.start;
    const int64_t position = (start < -far ? -far : smaller(start, far)) + query;
    const int64_t length = mask.lengths != nullptr ? mask.lengths[b] : mask.length;
    int64_t end = smaller(shape.keys, length);
    if (mask.causal) end = smaller(end, position + 1);
    const int64_t hidden = mask.firsts != nullptr ? mask.firsts[b] : mask.first;
    if (!mask.frames) return {0, hidden < 0 ? 0 : hidden, end};
    const int64_t offset = position - mask.prefix;
    const int64_t frame = (offset < 0 ? offset - mask.frame_tokens + 1 : offset) / mask.frame_tokens;
    const int64_t ahead = (frame < 0 ? 0 : frame) + mask.look_ahead;
    const int64_t behind = mask.window < 0 ? 0 : frame + mask.look_ahead - 1 - mask.window;
    return {smaller(mask.prefix, end), mask.prefix + (behind < 0 ? 0 : behind) * mask.frame_tokens,
            smaller(end, mask.prefix + ahead * mask.frame_tokens)};
}

}  // namespace
}  // namespace starflow
