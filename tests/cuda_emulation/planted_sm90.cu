// A product of tiles by TMA and wgmma, in every swizzle and with the right operand along the depth and across it; and
// mistakes in it, which the emulated device must notice.
#include <cuda.h>
#include <cutlass/arch/barrier.h>

#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/tensor.hpp>
#include <cutlass/cuda_host_adapter.hpp>

#include "common/dtype.h"
#include "cuda/declare.h"
#include "cuda/enqueue.cuh"

namespace starflow {

enum class Mistake : int32_t {
    none,
    no_mbarrier_fence,
    no_barrier,
    no_wait_for_tma,
    no_wait_for_readers,
    too_many_bytes,
    too_few_bytes,
    two_arrivals,
    other_parity,
    misaligned,
    no_mbarrier,
    no_fence_of_wgmma,
    no_commit,
    no_wait_for_wgmma,
    written_by_a_thread,
    other_operands,
};

struct GroupProductArgs {
    const void* a;  // (rows, depth) bfloat16, rows <= 64; what lacks is zero
    const void* b;  // (64, depth), or (depth, 64) where `across`
    float* out;     // (64, 64): a b^T, or a b
    int64_t rows;
    int64_t depth;
    int64_t swizzle;  // 32, 64 or 128 bytes
    bool across;
    Mistake mistake;
};

STARFLOW_DECLARE_SM90(GroupProductArgs, group_product_cuda)

namespace {

using namespace cute;
using GMMA::Major;
using Value = bfloat16_t;
using Empty = cutlass::arch::ClusterBarrier;
using Full = cutlass::arch::ClusterTransactionBarrier;

constexpr int tile = 64;

template <int swizzle, Major major>
auto atom() {
    if constexpr (swizzle == 128) {
        return GMMA::Layout_SW128_Atom<Value, major>{};
    } else if constexpr (swizzle == 64) {
        return GMMA::Layout_SW64_Atom<Value, major>{};
    } else {
        return GMMA::Layout_SW32_Atom<Value, major>{};
    }
}

template <int swizzle, bool across>
__global__ void group_product(const __grid_constant__ GroupProductArgs args, const __grid_constant__ CUtensorMap map_a,
                              const __grid_constant__ CUtensorMap map_b) {
    constexpr int line = swizzle / 2;  // elements of a box's row
    constexpr Major major = across ? Major::MN : Major::K;
    STARFLOW_SHARED_MEMORY(bytes);
    auto* const a = reinterpret_cast<Value*>(bytes);
    Value* const b = a + tile * tile;
    auto* const full = reinterpret_cast<uint64_t*>(b + tile * tile);
    uint64_t* const empty = full + 1;
    const Mistake mistake = args.mistake;
    if (threadIdx.x == 0 && mistake != Mistake::no_mbarrier) {
        Full::init(full, 1);
        Empty::init(empty, 128);
        if (mistake != Mistake::no_mbarrier_fence) cutlass::arch::fence_barrier_init();
    }
    if (mistake != Mistake::no_barrier) __syncthreads();
    const int steps = static_cast<int>(args.depth) / tile;
    if (threadIdx.x >= 128) {
        if (threadIdx.x != 128) return;
        for (int step = 0; step < steps; ++step) {
            if (mistake != Mistake::no_wait_for_readers) Empty::wait(empty, step % 2 ^ 1);
            const uint32_t all = 2 * tile * tile * sizeof(Value);
            Full::arrive_and_expect_tx(full, mistake == Mistake::too_many_bytes  ? all + 16
                                             : mistake == Mistake::too_few_bytes ? all - 16
                                                                                 : all);
            if (mistake == Mistake::two_arrivals) Full::arrive(full);
            for (int slab = 0; slab < tile / line; ++slab) {
                Value* const to = a + slab * line * tile + (mistake == Mistake::misaligned ? 8 : 0);
                SM90_TMA_LOAD_2D::copy(&map_a, full, 0, to, step * tile + slab * line, 0);
                SM90_TMA_LOAD_2D::copy(&map_b, full, 0, b + slab * line * tile,
                                       across ? slab * line : step * tile + slab * line, across ? step * tile : 0);
            }
        }
        return;
    }
    using Product =
        decltype(make_tiled_mma(GMMA::ss_op_selector<Value, Value, float, Shape<_64, _64, _64>, Major::K, major>()));
    Product product;
    const auto slice = product.get_slice(threadIdx.x);
    const auto layout_a = tile_to_shape(atom<swizzle, Major::K>(), Shape<_64, _64>{});
    const auto layout_b = [&] {
        if constexpr (across) {
            return tile_to_shape(atom<swizzle, major>(), Shape<_64, _64>{}, Step<_2, _1>{});
        } else {
            return tile_to_shape(atom<swizzle, major>(), Shape<_64, _64>{});
        }
    }();
    const bool shifted = mistake == Mistake::other_operands && threadIdx.x >= 96;
    const auto left = slice.make_fragment_A(slice.partition_A(make_tensor(make_smem_ptr(a), layout_a)));
    const auto right = slice.make_fragment_B(slice.partition_B(make_tensor(make_smem_ptr(shifted ? a : b), layout_b)));
    Tensor sum = partition_fragment_C(product, Shape<_64, _64>{});
    clear(sum);
    for (int step = 0; step < steps; ++step) {
        if (mistake != Mistake::no_wait_for_tma)
            Full::wait(full, step % 2 ^ (mistake == Mistake::other_parity ? 1 : 0));
        if (mistake == Mistake::written_by_a_thread && threadIdx.x == 0) a[0] = Value(1);
        if (mistake != Mistake::no_fence_of_wgmma) warpgroup_arrive();
        gemm(product, left, right, sum);
        if (mistake != Mistake::no_commit) warpgroup_commit_batch();
        if (mistake != Mistake::no_wait_for_wgmma) warpgroup_wait<0>();
        Empty::arrive(empty);
    }
    Tensor out = make_tensor(make_gmem_ptr(args.out), Shape<_64, _64>{}, GenRowMajor{});
    copy(sum, slice.partition_C(out));
}

int map_matrix(CUtensorMap& map, const void* data, int64_t rows, int64_t columns, int64_t swizzle) {
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t stride[] = {static_cast<cuuint64_t>(columns) * 2};
    const cuuint32_t box[] = {static_cast<cuuint32_t>(swizzle / 2), tile};
    const cuuint32_t steps[] = {1, 1};
    return CUTLASS_CUDA_DRIVER_WRAPPER_CALL(cuTensorMapEncodeTiled)(
        &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(data), sizes, stride, box, steps,
        CU_TENSOR_MAP_INTERLEAVE_NONE,
        swizzle == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
        : swizzle == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                        : CU_TENSOR_MAP_SWIZZLE_32B,
        CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

template <int swizzle, bool across>
int launch(const GroupProductArgs& args, void* stream) {
    CUtensorMap map_a;
    CUtensorMap map_b;
    int code = map_matrix(map_a, args.a, args.rows, args.depth, swizzle);
    if (code == 0) code = map_matrix(map_b, args.b, across ? args.depth : tile, across ? tile : args.depth, swizzle);
    if (code != 0) return code;
    return cuda::enqueue(group_product<swizzle, across>, 1, 160, 2 * tile * tile * sizeof(Value) + 16, stream, args,
                         map_a, map_b);
}

template <int swizzle>
int launch_across(const GroupProductArgs& args, void* stream) {
    return args.across ? launch<swizzle, true>(args, stream) : launch<swizzle, false>(args, stream);
}

}  // namespace

int group_product_cuda(const GroupProductArgs& args, void* stream) {
    switch (args.swizzle) {
        case 32:
            return launch_across<32>(args, stream);
        case 64:
            return launch_across<64>(args, stream);
        default:
            return launch_across<128>(args, stream);
    }
}

}  // namespace starflow
