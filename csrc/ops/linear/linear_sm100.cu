// linear on sm_100f (compute capability 10.0 and 10.3): the walk along the depth by TMA and tcgen05, where one warp
// loads and another has the tensor cores multiply (CUTLASS's warp-specialised collective). The sums lie in tensor
// memory, from where one or two groups of four warps take them. What is cut, split and done with the sums is as in
// linear.cu.
//
// A product of tcgen05 has 64 or 128 rows, so the columns of W x^T take that place, as on sm_90a, and the rows of x may
// be as few as 16. One of 64 rows is said to take the tensor cores as long as one of 128, which loses nothing while
// memory bounds the product (linear.h), and gives every multiprocessor a tile.
//
// Kernel, order of the tiles and epilogue are ours, and not CUTLASS's GemmUniversal with a tree of epilogue visitors.
// Its stream-K scheduler can cut the depth into a fixed number of parts, but then passes the sums of every product
// through memory, also where the tiles alone fill the device. And it has no place for the blocks in front of the
// product's that copy rows for the others of the same launch, nor for columns that leave as rotated heads, at slots
// that are read on the device.
#include <cute/tensor.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>

#include "cuda/enqueue.cuh"
#include "cuda/named_barrier.cuh"
#include "cuda/tensor_memory.cuh"
#include "ops/linear/linear_collective.cuh"
#include "ops/linear/linear_copy.cuh"

namespace starflow {
namespace {

using namespace cuda;
using cute::_;
using cute::_0;
using cute::_1;
using cute::Int;

constexpr int group_threads = 128;
// Both of the first group, whose other two warps do nothing.
constexpr int loading_warp = 0;
constexpr int multiplying_warp = 1;

template <class Element_, int rows_, int columns_, int groups_, int stages>
struct Tile {
    using Element = Element_;
    static constexpr int rows = rows_;
    static constexpr int columns = columns_;
    static constexpr int groups = groups_;
    static constexpr int threads = groups * group_threads;  // that take the sums
    static constexpr int all_threads = threads + group_threads;
    static constexpr int blocks = columns == 64 ? 2 : 1;  // that run on a multiprocessor
    using Shape = cute::Shape<Int<columns>, Int<rows>, Int<linear_depth>>;
    using Cluster = cute::Shape<_1, _1, _1>;
    using Collective = typename cutlass::gemm::collective::CollectiveBuilder<
        cutlass::arch::Sm100, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::RowMajor, linear_row_multiple,
        Element, cutlass::layout::ColumnMajor, linear_row_multiple, float, Shape, Cluster,
        cutlass::gemm::collective::StageCount<stages>, cutlass::gemm::KernelTmaWarpSpecialized1SmSm100>::CollectiveOp;

    // Tensor memory has 128 lanes of 512 columns of 32 bits; a row of x takes a column. The sums of a part are taken
    // while those of the next are made. Columns are had in powers of two from 32 on.
    static constexpr int part_sums = 2;
    static constexpr int memory_columns = part_sums * rows;
    static_assert(memory_columns >= 32 && blocks * memory_columns <= 512);
    using Parts = cutlass::PipelineUmmaAsync<part_sums>;

    // What of the sums a group takes: all columns of the weight, and its share of the rows of x. Of 64 columns a warp
    // has 16 lanes of its 32, and of 128 all.
    static constexpr int taken_rows = rows / groups;
    using Taken = cute::Shape<Int<columns>, Int<taken_rows>>;
    using Take = cute::conditional_t<
        columns == 64,
        cute::conditional_t<taken_rows == 16, cute::SM100_TMEM_LOAD_16dp256b2x, cute::SM100_TMEM_LOAD_16dp256b4x>,
        cute::SM100_TMEM_LOAD_32dp32b32x>;

    struct Shared {
        // The sums take the place of the operands, which are used by then.
        union {
            CopyBlock<all_threads> copy;
            typename Collective::TensorStorage operands;
            // Rows 4 banks apart: the fragments of a warp are 8 columns in pairs of rows, or 32 columns.
            Staged<rows, columns, threads, 4> staged;
        };
        alignas(16) typename Collective::PipelineStorage pipeline;
        alignas(16) typename Parts::SharedStorage parts;
        uint32_t sums;  // their place in tensor memory
    };

    // The sums of a part that one group takes, as (column, row), at a place in tensor memory.
    static __device__ auto taken(uint32_t place) {
        constexpr auto shape = cute::make_shape(Taken{}, _1{}, _1{});
        auto sums = cute::UMMA::tmem_frg_1sm<float>::make(shape)(cute::make_coord(_, _), _0{}, _0{});
        sums.data() = place;
        return sums;
    }
};

template <class Tile>
__global__ void __launch_bounds__(Tile::all_threads, Tile::blocks)
    multiply(const __grid_constant__ LinearCudaArgs args,
             const __grid_constant__ typename Tile::Collective::Params params) {
    using Collective = typename Tile::Collective;
    using Pipeline = typename Collective::MainloopPipeline;
    using Parts = typename Tile::Parts;
    STARFLOW_SHARED_MEMORY(memory);
    auto& shared = *reinterpret_cast<typename Tile::Shared*>(memory);
    const LinearSchedule& schedule = args.schedule;
    const uint32_t copying = copying_blocks<Tile::all_threads>(args);
    if (blockIdx.x < copying) {
        await_earlier_launches();
        return shared.copy.copy(args, blockIdx.x);
    }
    const LinearBlock block = LinearBlock::at(schedule, blockIdx.x - copying);
    const int warp = cutlass::canonical_warp_idx_sync();
    const bool loads = warp == loading_warp;
    const bool multiplies = warp == multiplying_warp;
    const bool takes = threadIdx.x >= group_threads;

    Collective collective(params, typename Tile::Cluster{}, 0);
    if (loads && cute::elect_one_sync()) collective.prefetch_tma_descriptors();
    typename Pipeline::Params roles;
    if (loads) roles.role = Pipeline::ThreadCategory::Producer;
    if (multiplies) roles.role = Pipeline::ThreadCategory::Consumer;
    roles.is_leader = loads && cute::elect_one_sync() != 0;
    roles.transaction_bytes = Collective::TmaTransactionBytes;
    roles.initializing_warp = loading_warp;
    Pipeline pipeline(shared.pipeline, roles, typename Tile::Cluster{});
    typename Parts::Params part_roles;
    if (multiplies) part_roles.role = Parts::ThreadCategory::Producer;
    if (takes) part_roles.role = Parts::ThreadCategory::Consumer;
    part_roles.producer_arv_count = 1;
    part_roles.consumer_arv_count = Tile::threads;
    part_roles.initializing_warp = multiplying_warp;
    Parts parts(shared.parts, part_roles, typename Tile::Cluster{});

    cute::TMEM::Allocator1Sm tensor_memory;
    if (multiplies) {
        // Waits until other blocks of this multiprocessor have left enough. So it comes before the next launch may
        // begin, whose blocks would take what this one waits for, and wait for it to end.
        tensor_memory.allocate(Tile::memory_columns, &shared.sums);
        tensor_memory.release_allocation_lock();
    }
    // The barriers of the pipelines are set up, and tensor memory has its place.
    __syncthreads();
    await_earlier_launches();
    const uint32_t sums_place = shared.sums;

    const int32_t last_part = schedule.split ? block.part + 1 : schedule.parts;
    if (loads) {
        const auto operands =
            collective.load_init(cute::make_shape(static_cast<int>(args.call.weights.columns),
                                                  static_cast<int>(args.call.rows), static_cast<int>(args.depth), 1),
                                 shared.operands);
        const int32_t begin = schedule.part_begin(block.part);
        const int32_t steps = schedule.part_begin(last_part) - begin;
        auto state = cutlass::make_producer_start_state<Pipeline>();
        if (copying > 0) {
            wait_for_copy(args, block.row_tile);
            fence_proxy_of_memory();
        }
        const auto next =
            collective.load(pipeline, state, operands, cute::make_coord(block.column_tile, block.row_tile, _, 0),
                            cute::make_coord_iterator(cute::idx2crd(begin, operands.k_tiles), operands.k_tiles), steps);
        collective.load_tail(pipeline, cute::get<0>(next));
        return;
    }
    if (multiplies) {
        const auto operands = collective.mma_init(_0{}, shared.operands);
        typename Collective::MainloopPipelineState state;
        auto part_state = cutlass::make_producer_start_state<Parts>();
        auto sums = Collective::TiledMma::make_fragment_C(Collective::partition_accumulator_shape());
        for (int32_t part = block.part; part < last_part; ++part) {
            parts.producer_acquire(part_state);
            fence_tensor_memory_after_barrier();
            sums.data() = sums_place + part_state.index() * Tile::rows;
            state = collective.mma(cute::make_tuple(pipeline, parts), cute::make_tuple(state, part_state),
                                   cute::make_tuple(sums), operands, _0{},
                                   schedule.part_begin(part + 1) - schedule.part_begin(part));
            parts.producer_commit(part_state);
            ++part_state;
        }
        // All sums are taken.
        parts.producer_tail(part_state);
        fence_tensor_memory_after_barrier();
        tensor_memory.free(sums_place, Tile::memory_columns);
        return;
    }
    if (!takes) return;

    const int thread = static_cast<int>(threadIdx.x) - group_threads;
    const int first_row = thread / group_threads * Tile::taken_rows;
    const auto taking = cute::make_tmem_copy(typename Tile::Take{}, Tile::taken(0));
    const auto take = taking.get_slice(thread % group_threads);
    const auto places = take.partition_D(cute::make_identity_tensor(typename Tile::Taken{}));
    auto sums = cute::make_tensor<float>(cute::shape(places));
    cute::clear(sums);
    typename Parts::PipelineState part_state;
    for (int32_t part = block.part; part < last_part; ++part) {
        parts.consumer_wait(part_state);
        fence_tensor_memory_after_barrier();
        const auto from = take.partition_S(Tile::taken(sums_place + part_state.index() * Tile::rows + first_row));
        // One instruction at a time, whose values wait in registers until they are added.
        const auto flat = cute::group_modes<1, cute::rank(from)>(from);
        auto flat_sums = cute::group_modes<1, cute::rank(sums)>(sums);
#pragma unroll
        for (int i = 0; i < cute::size<1>(flat); ++i) {
            auto more = cute::make_fragment_like(flat_sums(_, i));
            cute::copy(taking, flat(_, i), more);
            cutlass::arch::fence_view_async_tmem_load();
#pragma unroll
            for (int j = 0; j < cute::size(more); ++j) flat_sums(j, i) += more(j);
        }
        fence_tensor_memory_before_barrier();
        parts.consumer_release(part_state);
        ++part_state;
    }

    // The last sums were there once all products had read the operands, in whose place they go: no barrier is needed.
#pragma unroll
    for (int i = 0; i < cute::size(sums); ++i) {
        shared.staged.at(first_row + cute::get<1>(places(i)), cute::get<0>(places(i))) = sums(i);
    }
    finish_tile(args, block, shared.staged, thread, [] { sync_named<Tile::threads>(1); });
}

template <class Element>
int run(const LinearCudaArgs& args, void* stream) {
    return with_tile<Tile, Element>(args.schedule, [&](auto tile) {
        using Chosen = decltype(tile);
        return run_collective<Chosen>(multiply<Chosen>, args, stream);
    });
}

}  // namespace

int linear_sm100_cuda(const LinearCudaArgs& args, void* stream) {
    return args.input.dtype == Dtype::bfloat16 ? run<cute::bfloat16_t>(args, stream) : run<cute::half_t>(args, stream);
}

}  // namespace starflow
