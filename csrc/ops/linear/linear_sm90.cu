// linear on sm_90a: the walk along the depth by TMA and wgmma, one warp that loads and one or two groups of four that
// multiply (CUTLASS's warp-specialised collective). What is cut, split and done with the sums is as in linear.cu.
//
// A product of wgmma has 64 rows, so the columns of W x^T take that place and the rows of x may be as few as 16.
#include <cutlass/arch/reg_reconfig.h>
#include <cute/tensor.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>

#include "cuda/enqueue.cuh"
#include "cuda/named_barrier.cuh"
#include "ops/linear/linear_collective.cuh"
#include "ops/linear/linear_copy.cuh"

namespace starflow {
namespace {

using namespace cuda;
using cute::_;
using cute::_1;
using cute::Int;
using cute::Shape;

constexpr int group_threads = 128;

template <class Element_, int rows_, int columns_, int groups, int stages>
struct Tile {
    using Element = Element_;
    static constexpr int rows = rows_;
    static constexpr int columns = columns_;
    static constexpr int threads = groups * group_threads;  // that multiply
    static constexpr int all_threads = threads + group_threads;
    static constexpr bool cooperative = groups > 1;
    // Blocks that run on a multiprocessor, and registers that the loading group leaves to the groups that multiply:
    // together they have those of a block.
    static constexpr int blocks = cooperative ? 1 : 2;
    static constexpr int load_registers = 40;
    static constexpr int multiply_registers = cooperative ? 232 : 216;
    using Shape = cute::Shape<Int<columns>, Int<rows>, Int<linear_depth>>;
    using Cluster = cute::Shape<_1, _1, _1>;
    using Schedule = cute::conditional_t<cooperative, cutlass::gemm::KernelTmaWarpSpecializedCooperative,
                                         cutlass::gemm::KernelTmaWarpSpecialized>;
    using Collective = typename cutlass::gemm::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::RowMajor, linear_row_multiple,
        Element, cutlass::layout::ColumnMajor, linear_row_multiple, float, Shape, Cluster,
        cutlass::gemm::collective::StageCount<stages>, Schedule>::CollectiveOp;

    struct Shared {
        // The sums take the place of the operands, which are used by then.
        union {
            CopyBlock<all_threads> copy;
            typename Collective::TensorStorage operands;
            // Rows 4 banks apart: the fragments of a warp are 8 columns in pairs of rows.
            Staged<rows, columns, threads, 4> staged;
        };
        alignas(16) typename Collective::PipelineStorage pipeline;
    };
};

template <class Tile>
__global__ void __launch_bounds__(Tile::all_threads, Tile::blocks)
    multiply(const __grid_constant__ LinearCudaArgs args,
             const __grid_constant__ typename Tile::Collective::Params params) {
    using Collective = typename Tile::Collective;
    using Pipeline = typename Collective::MainloopPipeline;
    STARFLOW_SHARED_MEMORY(memory);
    auto& shared = *reinterpret_cast<typename Tile::Shared*>(memory);
    const LinearSchedule& schedule = args.schedule;
    const uint32_t copying = copying_blocks<Tile::all_threads>(args);
    if (blockIdx.x < copying) {
        await_earlier_launches();
        return shared.copy.copy(args, blockIdx.x);
    }
    const LinearBlock block = LinearBlock::at(schedule, blockIdx.x - copying);
    const bool loads = cutlass::canonical_warp_group_idx() == 0;
    const bool first_warp = cutlass::canonical_warp_idx_sync() == 0;
    if (first_warp && cute::elect_one_sync()) Collective::prefetch_tma_descriptors(params);

    typename Pipeline::Params roles;
    if (first_warp) roles.role = Pipeline::ThreadCategory::Producer;
    if (!loads) roles.role = Pipeline::ThreadCategory::Consumer;
    roles.is_leader = threadIdx.x % group_threads == 0;
    roles.num_consumers = Tile::threads;
    roles.transaction_bytes = params.tma_transaction_bytes;
    Pipeline pipeline(shared.pipeline, roles, typename Tile::Cluster{});
    Collective collective;
    const auto operands =
        collective.load_init(cute::make_shape(static_cast<int>(args.call.weights.columns),
                                              static_cast<int>(args.call.rows), static_cast<int>(args.depth), 1),
                             params);
    // The barriers of the pipeline are set up.
    __syncthreads();
    await_earlier_launches();

    const int32_t last_part = schedule.split ? block.part + 1 : schedule.parts;
    if (loads) {
        cutlass::arch::warpgroup_reg_dealloc<Tile::load_registers>();
        if (first_warp) {
            const int32_t begin = schedule.part_begin(block.part);
            const int32_t steps = schedule.part_begin(last_part) - begin;
            const auto all_steps = cute::shape<3>(cute::get<0>(operands));
            auto state = cutlass::make_producer_start_state<Pipeline>();
            if (copying > 0) {
                wait_for_copy(args, block.row_tile);
                fence_proxy_of_memory();
            }
            collective.load(params, pipeline, state, operands,
                            cute::make_coord(block.column_tile, block.row_tile, _, 0),
                            cute::make_coord_iterator(cute::idx2crd(begin, all_steps), all_steps), steps,
                            cutlass::canonical_lane_idx(), 0, shared.operands);
            state.advance(steps);
            collective.load_tail(pipeline, state);
        }
        return;
    }
    cutlass::arch::warpgroup_reg_alloc<Tile::multiply_registers>();
    const int thread = static_cast<int>(threadIdx.x) - group_threads;
    typename Collective::TiledMma product;
    constexpr auto shape = cute::Shape<Int<Tile::columns>, Int<Tile::rows>>{};
    auto sums = cute::partition_fragment_C(product, shape);
    auto part_sums = cute::make_fragment_like(sums);
    cute::clear(sums);
    typename Collective::PipelineState state;
    for (int32_t part = block.part; part < last_part; ++part) {
        const int32_t steps = schedule.part_begin(part + 1) - schedule.part_begin(part);
        collective.mma(pipeline, state, part_sums, steps, thread, shared.operands, params);
        collective.mma_tail(pipeline, state, steps);
        state.advance(steps);
        // The products are done: what they wrote may be read from here on, and not before.
        cute::warpgroup_fence_operand(part_sums);
#pragma unroll
        for (int i = 0; i < cute::size(sums); ++i) sums(i) += part_sums(i);
    }

    const auto sync = [] { sync_named<Tile::threads>(1); };
    // No thread of either group reads the operands after this barrier.
    sync();
    const auto places = product.get_slice(thread).partition_C(cute::make_identity_tensor(shape));
#pragma unroll
    for (int i = 0; i < cute::size(sums); ++i) {
        shared.staged.at(cute::get<1>(places(i)), cute::get<0>(places(i))) = sums(i);
    }
    finish_tile(args, block, shared.staged, thread, sync);
}

template <class Element>
int run(const LinearCudaArgs& args, void* stream) {
    return with_tile<Tile, Element>(args.schedule, [&](auto tile) {
        using Chosen = decltype(tile);
        return run_collective<Chosen>(multiply<Chosen>, args, stream);
    });
}

}  // namespace

int linear_sm90_cuda(const LinearCudaArgs& args, void* stream) {
    return args.input.dtype == Dtype::bfloat16 ? run<cute::bfloat16_t>(args, stream) : run<cute::half_t>(args, stream);
}

}  // namespace starflow
