// A product of tiles by TMA and tcgen05, in every swizzle, with 64 and 128 rows, and with the right operand along the
// depth and across it; and mistakes in it, which the emulated device must notice.
#include <cuda.h>
#include <cutlass/arch/barrier.h>

#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/tensor.hpp>
#include <cutlass/cuda_host_adapter.hpp>

#include <cute/arch/tmem_allocator_sm100.hpp>
#include <cute/atom/copy_traits_sm100.hpp>
#include <cute/atom/mma_traits_sm100.hpp>

#include "common/dtype.h"
#include "cuda/declare.h"
#include "cuda/enqueue.cuh"
#include "cuda/tensor_memory.cuh"

namespace starflow {

enum class Slip : int32_t {
    none,
    odd_columns,
    late_allocation,
    no_barrier,
    no_release_of_the_right,
    no_free,
    other_place,
    no_mbarrier_fence,
    no_wait_for_tma,
    no_wait_for_readers,
    old_descriptor,
    other_type,
    beyond_its_columns,
    no_commit,
    no_wait_for_products,
    no_fence_behind_the_wait,
    no_fence_before_the_arrival,
    no_fence_behind_the_readers,
    no_wait_for_loads,
    other_lanes,
    written_by_a_thread,
};

struct TensorProductArgs {
    const void* a;  // (128, depth) bfloat16
    const void* b;  // (64, depth), or (depth, 64) where `across`
    float* out;     // (turns, rows, 64): a b^T, or a b, of each part of the depth
    int64_t rows;   // 64 or 128
    int64_t depth;
    int64_t swizzle;  // 32, 64 or 128 bytes
    bool across;
    Slip slip;
};

STARFLOW_DECLARE_SM100(TensorProductArgs, tensor_product_cuda)

namespace {

using namespace cute;
using UMMA::Major;
using Value = bfloat16_t;
using Empty = cutlass::arch::ClusterBarrier;
using Full = cutlass::arch::ClusterTransactionBarrier;

constexpr int tile = 64;  // columns, and depth of a step
constexpr int most_rows = 128;
constexpr int readers = 128;  // threads, of the first four warps; the fifth loads and multiplies

template <int swizzle, Major major>
auto atom() {
    constexpr bool along = major == Major::K;
    if constexpr (swizzle == 128) {
        return conditional_t<along, UMMA::Layout_K_SW128_Atom<Value>, UMMA::Layout_MN_SW128_Atom<Value>>{};
    } else if constexpr (swizzle == 64) {
        return conditional_t<along, UMMA::Layout_K_SW64_Atom<Value>, UMMA::Layout_MN_SW64_Atom<Value>>{};
    } else {
        return conditional_t<along, UMMA::Layout_K_SW32_Atom<Value>, UMMA::Layout_MN_SW32_Atom<Value>>{};
    }
}

struct Barriers {
    uint64_t full;   // of the operands
    uint64_t used;   // they were multiplied
    uint64_t made;   // the sums
    uint64_t taken;  // the sums
    uint32_t sums;
};

template <int rows, int swizzle, bool across>
__global__ void tensor_product(const __grid_constant__ TensorProductArgs args,
                               const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b) {
    constexpr int line = swizzle / 2;  // elements of a box's row
    constexpr Major major = across ? Major::MN : Major::K;
    STARFLOW_SHARED_MEMORY(bytes);
    auto* const a = reinterpret_cast<Value*>(bytes);
    Value* const b = a + most_rows * tile;
    auto& barriers = *reinterpret_cast<Barriers*>(b + tile * tile);
    const Slip slip = args.slip;
    const bool works = threadIdx.x >= readers;
    TMEM::Allocator1Sm memory;
    if (slip == Slip::late_allocation) cuda::await_earlier_launches();
    if (works) {
        memory.allocate(slip == Slip::odd_columns ? 48 : tile, &barriers.sums);
        if (slip != Slip::no_release_of_the_right) memory.release_allocation_lock();
        if (threadIdx.x == readers) {
            Full::init(&barriers.full, 1);
            Empty::init(&barriers.used, 1);
            Empty::init(&barriers.made, 1);
            Empty::init(&barriers.taken, readers);
            if (slip != Slip::no_mbarrier_fence) cutlass::arch::fence_barrier_init();
        }
    }
    if (slip != Slip::no_barrier) __syncthreads();
    cuda::await_earlier_launches();
    const uint32_t place = barriers.sums;
    const int steps = static_cast<int>(args.depth) / tile;

    using Product = decltype(make_tiled_mma(SM100_MMA_F16BF16_SS<Value, Value, float, rows, tile, Major::K, major>{}));
    auto sums = UMMA::tmem_frg_1sm<float>::make(Shape<Shape<Int<rows>, Int<tile>>, _1, _1>{});
    if (works) {
        Product product;
        const auto layout_a = UMMA::tile_to_mma_shape(atom<swizzle, Major::K>(),
                                                      partition_shape_A(product, Shape<Int<rows>, Int<tile>>{}));
        const auto layout_b = [&] {
            const auto shape = partition_shape_B(product, Shape<Int<tile>, Int<tile>>{});
            if constexpr (across) {
                return UMMA::tile_to_mma_shape(atom<swizzle, major>(), shape, Step<_2, _1>{});
            } else {
                return UMMA::tile_to_mma_shape(atom<swizzle, major>(), shape);
            }
        }();
        const auto left = Product::make_fragment_A(make_tensor(make_smem_ptr(a), layout_a));
        const auto right = Product::make_fragment_B(make_tensor(make_smem_ptr(b), layout_b));
        if (threadIdx.x == readers) {
            for (int step = 0; step < steps; ++step) {
                Empty::wait(&barriers.used, step % 2 ^ 1);
                Full::arrive_and_expect_tx(&barriers.full, (rows + tile) * tile * sizeof(Value));
                for (int slab = 0; slab < tile / line; ++slab) {
                    SM90_TMA_LOAD_2D::copy(&map_a, &barriers.full, 0, a + slab * line * rows,
                                           step * tile + slab * line, 0);
                    SM90_TMA_LOAD_2D::copy(&map_b, &barriers.full, 0, b + slab * line * tile,
                                           across ? slab * line : step * tile + slab * line, across ? step * tile : 0);
                }
                if (slip != Slip::no_wait_for_tma) Full::wait(&barriers.full, step % 2);
                if (slip == Slip::written_by_a_thread) a[0] = Value(1);
                if (slip != Slip::no_wait_for_readers) Empty::wait(&barriers.taken, step % 2 ^ 1);
                if (slip != Slip::no_fence_behind_the_readers) cuda::fence_tensor_memory_after_barrier();
                sums.data() = place + (slip == Slip::beyond_its_columns ? 32 : 0);
                auto instruction = product.idesc_;
                if (slip == Slip::other_type) instruction.a_format_ = 0;
                for (int k = 0; k < size<2>(left); ++k) {
                    uint64_t of_left = left(_, 0, k)[0];
                    if (slip == Slip::old_descriptor) of_left &= ~(uint64_t{3} << 46);
                    emulation::multiply_in_tensor_memory(of_left, right(_, 0, k)[0], raw_pointer_cast(sums.data()),
                                                         instruction.desc_, k > 0);
                }
                emulation::commit_tensor_products(&barriers.used);
                if (slip != Slip::no_commit) emulation::commit_tensor_products(&barriers.made);
            }
        }
        __syncwarp();
        Empty::wait(&barriers.taken, steps % 2 ^ 1);
        Empty::wait(&barriers.used, steps % 2 ^ 1);
        cuda::fence_tensor_memory_after_barrier();
        if (slip != Slip::no_free) memory.free(place + (slip == Slip::other_place ? 1 : 0), tile);
        return;
    }
    const auto shifted = (slip == Slip::other_lanes ? 32 : 0) << 16;
    sums.data() = place + shifted;
    const auto flat = sums(make_coord(_, _), _0{}, _0{});
    using Load = conditional_t<rows == 64, SM100::TMEM::LOAD::SM100_TMEM_LOAD_16dp256b4x,
                               SM100::TMEM::LOAD::SM100_TMEM_LOAD_32dp32b32x>;
    const auto load = make_tmem_copy(Load{}, flat);
    const auto slice = load.get_slice(threadIdx.x);
    for (int step = 0; step < steps; ++step) {
        if (slip != Slip::no_wait_for_products) Empty::wait(&barriers.made, step % 2);
        if (slip != Slip::no_fence_behind_the_wait) cuda::fence_tensor_memory_after_barrier();
        Tensor out = make_tensor(make_gmem_ptr(args.out + step * rows * tile), Shape<Int<rows>, Int<tile>>{},
                                 Stride<Int<tile>, _1>{});
        Tensor to = slice.partition_D(out);
        Tensor values = make_tensor<float>(shape(to));
        copy(load, slice.partition_S(flat), values);
        if (slip != Slip::no_wait_for_loads) cutlass::arch::fence_view_async_tmem_load();
        copy(values, to);
        if (slip != Slip::no_fence_before_the_arrival) cuda::fence_tensor_memory_before_barrier();
        Empty::arrive(&barriers.taken);
    }
}

int map_matrix(CUtensorMap& map, const void* data, int64_t rows, int64_t columns, int64_t swizzle, uint32_t box_rows) {
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t stride[] = {static_cast<cuuint64_t>(columns) * 2};
    const cuuint32_t box[] = {static_cast<cuuint32_t>(swizzle / 2), box_rows};
    const cuuint32_t steps[] = {1, 1};
    return CUTLASS_CUDA_DRIVER_WRAPPER_CALL(cuTensorMapEncodeTiled)(
        &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(data), sizes, stride, box, steps,
        CU_TENSOR_MAP_INTERLEAVE_NONE,
        swizzle == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
        : swizzle == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                        : CU_TENSOR_MAP_SWIZZLE_32B,
        CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

template <int rows, int swizzle, bool across>
int launch(const TensorProductArgs& args, void* stream) {
    CUtensorMap map_a;
    CUtensorMap map_b;
    int code = map_matrix(map_a, args.a, most_rows, args.depth, swizzle, rows);
    if (code == 0) {
        code = map_matrix(map_b, args.b, across ? args.depth : tile, across ? tile : args.depth, swizzle, tile);
    }
    if (code != 0) return code;
    constexpr size_t shared = (most_rows + tile) * tile * sizeof(Value) + sizeof(Barriers);
    return cuda::enqueue(tensor_product<rows, swizzle, across>, 1, readers + 32, shared, stream, args, map_a, map_b);
}

template <int rows, int swizzle>
int launch_across(const TensorProductArgs& args, void* stream) {
    return args.across ? launch<rows, swizzle, true>(args, stream) : launch<rows, swizzle, false>(args, stream);
}

template <int rows>
int launch_swizzle(const TensorProductArgs& args, void* stream) {
    switch (args.swizzle) {
        case 32:
            return launch_across<rows, 32>(args, stream);
        case 64:
            return launch_across<rows, 64>(args, stream);
        default:
            return launch_across<rows, 128>(args, stream);
    }
}

}  // namespace

int tensor_product_cuda(const TensorProductArgs& args, void* stream) {
    return args.rows == 64 ? launch_swizzle<64>(args, stream) : launch_swizzle<128>(args, stream);
}

}  // namespace starflow
