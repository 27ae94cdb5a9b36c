// The products that the CPU kernels of block_attention use.
#pragma once
#include "cpu/attend.h"
#include "cpu/pack_block.h"
#include "cpu/rows.h"
#include "ops/block_attention/block_attention_rows.h"

namespace starflow::STARFLOW_ISA {
namespace {

// Calls visitor(T{}, Product{}): products are of bfloat16 where the data is bfloat16 and the level has them, on tiles
// if it can. On a level without, panels hold float32, and nothing is rounded on its way into a product.
template <class Visitor>
inline void visit_attention(Dtype data, const Visitor& visitor) {
    switch (data) {
        case Dtype::bfloat16:
#if defined(STARFLOW_TILES) && defined(__AVX512BF16__)
            return visitor(BFloat16{}, TileProduct<1, 1>{});
#elif defined(__AVX512BF16__)
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
    return cache_head_bytes(MatrixStorage::float32, rows, head_dim);
}

}  // namespace
}  // namespace starflow::STARFLOW_ISA
