// A product of tiles in CuTe as the attention and linear kernels have it: cp.async into two buffers, ldmatrix,
// mma.sync; and mistakes in it, which the emulated device must notice.
#include <cuda_runtime.h>

#include <cstdint>
#include <cute/tensor.hpp>

#include "common/visit.h"
#include "cuda/declare.h"
#include "cuda/enqueue.cuh"

namespace starflow {

enum class Mistake : int32_t { none, no_wait, wait_for_one_less, no_barrier, no_second_barrier };

struct ProductArgs {
    const void* a;  // (64, depth) bfloat16 or float16, like b
    const void* b;
    float* out;  // (64, 64): a b^T
    int64_t depth;
    Dtype data;
    bool swizzled;  // float16 is
    Mistake mistake;
};

STARFLOW_DECLARE_CUDA(ProductArgs, product_cuda)

namespace {

using namespace cute;

constexpr int tile = 64;
constexpr int threads = 128;

template <class Storage>
struct Element;
template <>
struct Element<BFloat16> {
    using type = cutlass::bfloat16_t;
    using Atom = SM80_16x8x16_F32BF16BF16F32_TN;
};
template <>
struct Element<Float16> {
    using type = cutlass::half_t;
    using Atom = SM80_16x8x16_F32F16F16F32_TN;
};

template <bool swizzled>
auto tile_layout() {
    auto rows = make_layout(Shape<Int<8>, Int<tile>>{}, GenRowMajor{});
    if constexpr (swizzled) {
        return tile_to_shape(composition(Swizzle<3, 3, 3>{}, rows), Shape<Int<tile>, Int<tile>>{});
    } else {
        return tile_to_shape(rows, Shape<Int<tile>, Int<tile>>{});
    }
}

template <class Storage, bool swizzled>
__global__ void product_kernel(ProductArgs args) {
    using E = typename Element<Storage>::type;
    STARFLOW_SHARED_MEMORY(bytes);
    auto layout = tile_layout<swizzled>();
    constexpr int size_of_tile = tile * tile;
    E* buffers = reinterpret_cast<E*>(bytes);
    const auto shape = make_shape(Int<tile>{}, static_cast<int>(args.depth));
    const auto whole = [&](const void* data) {
        return local_tile(make_tensor(make_gmem_ptr(static_cast<const E*>(data)), shape, GenRowMajor{}),
                          Shape<Int<tile>, Int<tile>>{}, make_coord(0, _));
    };
    auto a = whole(args.a);
    auto b = whole(args.b);
    const auto shared = [&](int stage, int which) {
        return make_tensor(make_smem_ptr(buffers + (2 * stage + which) * size_of_tile), layout);
    };
    auto to_shared =
        make_tiled_copy(Copy_Atom<SM80_CP_ASYNC_CACHEGLOBAL<uint128_t>, E>{},
                        make_layout(Shape<Int<threads / 8>, Int<8>>{}, GenRowMajor{}), Layout<Shape<_1, _8>>{});
    auto copying = to_shared.get_thread_slice(threadIdx.x);
    TiledMMA<MMA_Atom<typename Element<Storage>::Atom>, Layout<Shape<_4, _1, _1>>, Tile<Int<tile>, _16, _16>> mma;
    auto mine = mma.get_thread_slice(threadIdx.x);
    auto load_a = make_tiled_copy_A(Copy_Atom<SM75_U32x4_LDSM_N, E>{}, mma);
    auto load_b = make_tiled_copy_B(Copy_Atom<SM75_U32x4_LDSM_N, E>{}, mma);
    auto slice_a = load_a.get_thread_slice(threadIdx.x);
    auto slice_b = load_b.get_thread_slice(threadIdx.x);
    Tensor sum = partition_fragment_C(mma, Shape<Int<tile>, Int<tile>>{});
    clear(sum);
    const int steps = static_cast<int>(args.depth) / tile;
    const auto fetch = [&](int step) {
        if (step < steps) {
            copy(to_shared, copying.partition_S(a(_, _, step)), copying.partition_D(shared(step % 2, 0)));
            copy(to_shared, copying.partition_S(b(_, _, step)), copying.partition_D(shared(step % 2, 1)));
        }
        cp_async_fence();
    };
    fetch(0);
    for (int step = 0; step < steps; ++step) {
        fetch(step + 1);
        if (args.mistake == Mistake::wait_for_one_less) {
            cp_async_wait<2>();
        } else if (args.mistake != Mistake::no_wait) {
            cp_async_wait<1>();
        }
        if (args.mistake != Mistake::no_barrier) __syncthreads();
        auto tile_a = shared(step % 2, 0);
        auto tile_b = shared(step % 2, 1);
        Tensor registers_a = mine.partition_fragment_A(tile_a);
        Tensor registers_b = mine.partition_fragment_B(tile_b);
        copy(load_a, slice_a.partition_S(tile_a), slice_a.retile_D(registers_a));
        copy(load_b, slice_b.partition_S(tile_b), slice_b.retile_D(registers_b));
        gemm(mma, registers_a, registers_b, sum);
        if (args.mistake != Mistake::no_second_barrier) __syncthreads();
    }
    Tensor out = make_tensor(make_gmem_ptr(args.out), Shape<Int<tile>, Int<tile>>{}, GenRowMajor{});
    copy(sum, mine.partition_C(out));
}

template <class Storage, bool swizzled>
int launch(const ProductArgs& args, void* stream) {
    return starflow::cuda::enqueue(product_kernel<Storage, swizzled>, 1, threads, 4 * tile * tile * sizeof(Storage),
                                   stream, args);
}

}  // namespace

int product_cuda(const ProductArgs& args, void* stream) {
    if (args.data == Dtype::float16) return launch<Float16, true>(args, stream);
    return args.swizzled ? launch<BFloat16, true>(args, stream) : launch<BFloat16, false>(args, stream);
}

}  // namespace starflow
