// What the kernels of block_attention and of its gradient share: rows of a key head, and what each sees.
//
// The rows of a key head are its queries times the heads of its group, heads running fastest: row r is query
// r / group of head kv_head * group + r % group. A tile may begin and end inside of a group.
#pragma once
#include "common/visit.h"
#include "cpu/attend.h"
#include "cpu/pack_block.h"
#include "cpu/rows.h"
#include "ops/block_attention/block_attention.h"

namespace starflow::STARFLOW_ISA {
namespace {

inline int64_t group_of(const AttentionShape& shape) { return shape.heads / shape.kv_heads; }
inline int64_t rows_of(const AttentionShape& shape) { return shape.queries * group_of(shape); }

template <class T>
inline T* row_at(const HeadRows& rows, const AttentionShape& shape, int64_t b, int64_t kv_head, int64_t r) {
    const int64_t group = group_of(shape);
    return static_cast<T*>(rows.data) + b * rows.batch_stride + (kv_head * group + r % group) * rows.head_stride +
           r / group * rows.row_stride;
}
template <class T>
inline T* head_at(const HeadRows& rows, int64_t b, int64_t head) {
    return static_cast<T*>(rows.data) + b * rows.batch_stride + head * rows.head_stride;
}
// Where a row lies in a (batch, heads, queries) array.
inline int64_t index_of(const AttentionShape& shape, int64_t b, int64_t kv_head, int64_t r) {
    const int64_t group = group_of(shape);
    return (b * shape.heads + kv_head * group + r % group) * shape.queries + r / group;
}

inline VisibleKeys visible_keys(const AttentionMask& mask, const AttentionShape& shape, int64_t b, int64_t query) {
    const auto smaller = [](int64_t x, int64_t y) { return x < y ? x : y; };
    const int64_t position = (mask.starts != nullptr ? mask.starts[b] : mask.start) + query;
    const int64_t length = mask.lengths != nullptr ? mask.lengths[b] : mask.length;
    int64_t end = smaller(shape.keys, length);
    if (mask.causal) end = smaller(end, position + 1);
    if (!mask.frames) return {0, 0, end};
    const int64_t offset = position - mask.prefix;
    const int64_t frame = (offset < 0 ? offset - mask.frame_tokens + 1 : offset) / mask.frame_tokens;
    const int64_t ahead = (frame < 0 ? 0 : frame) + mask.look_ahead;
    const int64_t behind = mask.window < 0 ? 0 : frame + mask.look_ahead - 1 - mask.window;
    return {smaller(mask.prefix, end), mask.prefix + (behind < 0 ? 0 : behind) * mask.frame_tokens,
            smaller(end, mask.prefix + ahead * mask.frame_tokens)};
}

inline float scale_of(const float* scales, float scale, int64_t b) { return scales != nullptr ? scales[b] : scale; }

// Calls visitor(T{}, Product{}): products of bfloat16 where the data is and the level has them. On a level without,
// panels hold float32, and nothing is rounded on its way into a product.
template <class Visitor>
inline void visit_attention(Dtype data, const Visitor& visitor) {
    switch (data) {
        case Dtype::bfloat16:
#if defined(__AVX512BF16__)
            return visitor(BFloat16{}, PairsProduct{});
#else
            return visitor(BFloat16{}, WidenedProduct<float>{});
#endif
        case Dtype::float16:
            return visitor(Float16{}, WidenedProduct<float>{});
        default:
            return visitor(float{}, WidenedProduct<float>{});
    }
}

// Bytes of keys or values of `rows` keys as panels of the widest storage.
inline int64_t panels_bytes(int64_t rows, int64_t head_dim) {
    return cache_head_bytes(Storage::float32, rows, head_dim);
}

}  // namespace
}  // namespace starflow::STARFLOW_ISA
