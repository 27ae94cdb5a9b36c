// Attention on sm_90a: keys and values by TMA, products by wgmma. What is cut, split, masked and done with the results
// is as in block_attention.cu.
//
// One thread loads: tiles of 128 keys and of their values, each in two stages, with a barrier that says that a stage is
// full (TMA counts the bytes) and one that it is empty (the warps that multiply have come). One or two groups of four
// warps multiply, 64 rows each: queries and keys from shared memory, weights from registers. The products of a tile of
// keys and of the values of the tile before are begun together, and the values are waited for behind the softmax of the
// keys. Two groups begin their products in turns: while those of one run, the other has its softmax. tests/static holds
// the machine code to both orders.
#include <cutlass/arch/reg_reconfig.h>

#include "ops/block_attention/block_attention_forward.cuh"
#include "ops/block_attention/block_attention_sm90.cuh"

namespace starflow {
namespace {

using namespace cuda;
using cute::_;
using cute::_1;
using cute::_2;
using cute::_3;
using cute::_64;
using cute::Int;
using cute::Shape;
using cute::Step;
using cute::GMMA::Major;

struct StageBarriers {
    uint64_t full[stages];
    uint64_t empty[stages];
};

// Named barriers of the warps that multiply: of all, of those of a group, and of a group's turn. 0 is __syncthreads.
constexpr int all_warps = 1;
constexpr int warps_of = 2;
constexpr int turn_of = 4;

template <class Element_, int width_, int groups_>
struct Forward {
    using Element = Element_;
    using Value = ValueOf<Element>;
    static constexpr int width = width_;
    static constexpr int groups = groups_;
    static constexpr int columns = sm90_columns;
    static constexpr int rows = 64 * groups;
    static constexpr int group_threads = 128;
    static constexpr int multiplying = groups * group_threads;
    static constexpr int threads = multiplying + group_threads;
    static constexpr int multiplying_warps = multiplying / warp_size;
    static constexpr uint32_t stage_bytes = columns * width * sizeof(Element);
    // Blocks that run on a multiprocessor, as many as its shared memory holds.
    static constexpr int blocks = groups == 1 && width == 64 ? 2 : 1;
    // Where a thread's share of the registers does not hold sums and weights, the group that loads leaves some to those
    // that multiply.
    struct Registers {
        static constexpr bool move = threads * blocks > 256;
        static constexpr int load = 40;
        static constexpr int multiply = groups == 1 ? 216 : 232;
    };
    using Queries = Boxes<Element, rows, width>;
    using QueryLayout =
        decltype(cute::tile_to_shape(cute::GMMA::Layout_K_SW128_Atom<Value>{}, Shape<Int<rows>, Int<width>>{}));
    using KeyLayout = decltype(cute::tile_to_shape(cute::GMMA::Layout_K_SW128_Atom<Value>{},
                                                   Shape<Int<columns>, Int<width>, Int<stages>>{}));
    // The same memory, with the keys as the depth.
    using ValueLayout = decltype(cute::tile_to_shape(
        cute::GMMA::Layout_MN_SW128_Atom<Value>{}, Shape<Int<width>, Int<columns>, Int<stages>>{}, Step<_2, _1, _3>{}));
    using Weigh = decltype(cute::make_tiled_mma(
        cute::GMMA::ss_op_selector<Value, Value, float, Shape<_64, Int<columns>, Int<width>>, Major::K, Major::K>()));
    using Add = decltype(cute::make_tiled_mma(
        cute::GMMA::rs_op_selector<Value, Value, float, Shape<_64, Int<width>, Int<columns>>, Major::K, Major::MN>()));

    struct Shared {
        alignas(1024) Element queries[rows * width];
        alignas(1024) Element keys[stages][columns * width];
        alignas(1024) Element values[stages][columns * width];
        VisibleInTile<rows> visible;
        StageBarriers key_stages;
        StageBarriers value_stages;
    };
};

// Loads the n-th tile into its stage; one thread calls this.
template <class F>
__device__ void bring(const CUtensorMap& map, const StageBarriers& barriers, int n, typename F::Element* tile, int key,
                      unsigned kv_head, unsigned b) {
    const int stage = stage_of(n);
    // The first tiles find their stages empty: as if a phase had ended before the first.
    Empty::wait(&barriers.empty[stage], phase_of(n) ^ 1);
    Full::arrive_and_expect_tx(&barriers.full[stage], F::stage_bytes);
#pragma unroll
    for (int channel = 0; channel < F::width; channel += box_channels) {
        cute::SM90_TMA_LOAD_4D::copy(&map, const_cast<uint64_t*>(&barriers.full[stage]),
                                     static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL),
                                     tile + stage * F::columns * F::width + channel * F::columns, channel, key,
                                     static_cast<int>(kv_head), static_cast<int>(b));
    }
}

// Says that this warp has read what it needs of the n-th tile.
__device__ inline void leave(const StageBarriers& barriers, int n) {
    if (lane() == 0) Empty::arrive(&barriers.empty[stage_of(n)]);
}

// Two groups take turns at beginning their products: group 0, group 1, group 0 ... Both walk over the same tiles, and
// so take the same number of turns.
template <class F>
struct Turns {
    int group;

    __device__ void await() const {
        if constexpr (F::groups == 2) sync_named<F::multiplying>(turn_of + group);
    }
    __device__ void pass_on() const {
        if constexpr (F::groups == 2) arrive_named<F::multiplying>(turn_of + 1 - group);
    }
    // The first turn is group 0's, and the last, group 1's, has none behind it.
    __device__ void open() const {
        if (group == 1) pass_on();
    }
    __device__ void close() const {
        if (group == 0) pass_on();
    }
};

// Keeps the compiler from moving a wait for products from behind the softmax to in front of it: the loop never runs, as
// no total is negative, but it ends a run of instructions within which nvcc 13.0 puts the wait first. With a branch
// that does not come back in its place, nvcc uses few of the registers that `setmaxnreg` gives, and spills.
__device__ inline void end_softmax(const SoftmaxRow (&rows)[2]) {
    while (rows[0].total + rows[1].total < 0.0F) __nanosleep(20);
}

template <class F>
__global__ void __launch_bounds__(F::threads, F::blocks)
    forward_kernel(const __grid_constant__ AttentionArgs args, const __grid_constant__ CUtensorMap keys,
                   const __grid_constant__ CUtensorMap values, bool wide) {
    using Element = typename F::Element;
    using Value = typename F::Value;
    using Products = cuda::Products<Element>;
    STARFLOW_SHARED_MEMORY(memory);
    auto& shared = *reinterpret_cast<typename F::Shared*>(memory);
    const AttentionShape& shape = args.shape;
    const auto block = ForwardBlock<F::rows>::here(args);
    await_earlier_launches();
    block.template see<F::threads>(args, shared.visible);
    if (threadIdx.x == 0) {
#pragma unroll
        for (int stage = 0; stage < stages; ++stage) {
            for (StageBarriers* barriers : {&shared.key_stages, &shared.value_stages}) {
                Full::init(&barriers->full[stage], 1);
                Empty::init(&barriers->empty[stage], F::multiplying_warps);
            }
        }
        cutlass::arch::fence_barrier_init();
    }
    __syncthreads();
    const auto seen = [&] { return block.seen(shared.visible); };
    const KeyTiles tiles = KeyTiles::of(seen().any, F::columns);
    const int begin = block.part_begin(args, tiles, 0);
    const int count = block.part_begin(args, tiles, 1) - begin;
    const auto key_of = [&](int n) { return tiles.tile(begin + n) * F::columns; };

    if (warp() >= F::multiplying_warps) {
        if constexpr (F::Registers::move) cutlass::arch::warpgroup_reg_dealloc<F::Registers::load>();
        if (threadIdx.x != F::multiplying) return;
#pragma unroll 1
        for (int n = 0; n < count; ++n) {
            bring<F>(keys, shared.key_stages, n, shared.keys[0], key_of(n), block.kv_head, block.b);
            bring<F>(values, shared.value_stages, n, shared.values[0], key_of(n), block.kv_head, block.b);
        }
        return;
    }

    if constexpr (F::Registers::move) cutlass::arch::warpgroup_reg_alloc<F::Registers::multiply>();
    const typename F::Queries queries{shared.queries};
    const int warp_row = 16 * warp();
    SoftmaxRow state[1][2];
    float sums[1][F::width / 8][4] = {};
    const float scale = scale_of(args.scale, block.b);
    if (count > 0) {
        const auto head_dim = static_cast<int>(shape.head_dim);
        fetch<F::rows, F::multiplying>(queries, args.q.data, head_dim, wide,
                                       [&](int row) { return block.template row<const Element>(args.q, shape, row); });
        cute::cp_async_wait<0>();
        // The fence makes what threads have written visible to wgmma, which reads by the async proxy.
        cutlass::arch::fence_view_async_shared();
        sync_named<F::multiplying>(all_warps);

        float weights[1][F::columns / 8][4];
        HalfOperand rounded[F::columns / 16];
        typename F::Weigh weigh_product;
        typename F::Add add_product;
        const auto weigh_slice = weigh_product.get_slice(0);
        const auto add_slice = add_product.get_slice(0);
        const int group = cutlass::canonical_warp_group_idx();
        const Turns<F> turns{group};
        const auto left = weigh_slice.make_fragment_A(weigh_slice.partition_A(cute::local_tile(
            cute::make_tensor(cute::make_smem_ptr(reinterpret_cast<Value*>(shared.queries)), typename F::QueryLayout{}),
            Shape<_64, Int<F::width>>{}, cute::make_coord(group, 0))));
        const auto right = weigh_slice.make_fragment_B(weigh_slice.partition_B(
            cute::make_tensor(cute::make_smem_ptr(reinterpret_cast<Value*>(shared.keys[0])), typename F::KeyLayout{})));
        const auto added = add_slice.make_fragment_B(add_slice.partition_B(cute::make_tensor(
            cute::make_smem_ptr(reinterpret_cast<Value*>(shared.values[0])), typename F::ValueLayout{})));
        // Registers as CuTe counts them, which is the order that they are in.
        auto weight_registers =
            cute::make_tensor(&weights[0][0][0],
                              cute::make_layout(cute::partition_shape_C(weigh_product, Shape<_64, Int<F::columns>>{})));
        auto sum_registers = cute::make_tensor(
            &sums[0][0][0], cute::make_layout(cute::partition_shape_C(add_product, Shape<_64, Int<F::width>>{})));
        const auto rounded_registers =
            cute::make_tensor(reinterpret_cast<Value*>(&rounded[0]),
                              cute::make_layout(cute::partition_shape_A(add_product, Shape<_64, Int<F::columns>>{})));

        // Begin products of the n-th tile of keys.
        const auto multiply_keys = [&](int n) {
            cute::warpgroup_fence_operand(weight_registers);
            weigh_product.accumulate_ = cute::GMMA::ScaleOut::Zero;
#pragma unroll
            for (int k = 0; k < F::width / 16; ++k) {
                cute::gemm(weigh_product, left(_, _, k), right(_, _, k, stage_of(n)), weight_registers);
                weigh_product.accumulate_ = cute::GMMA::ScaleOut::One;
            }
            cute::warpgroup_commit_batch();
        };
        // Begin to add the n-th tile of values.
        const auto add_values = [&](int n) {
            cute::warpgroup_fence_operand(sum_registers);
#pragma unroll
            for (int k = 0; k < F::columns / 16; ++k) {
                cute::gemm(add_product, rounded_registers(_, _, k), added(_, _, k, stage_of(n)), sum_registers);
            }
            cute::warpgroup_commit_batch();
        };
        // Wait for the n-th tile of values. A weight of 0 hides no NaN, and keys that no row sees may be anything:
        // where a tile has such keys, zeros take the place of their values.
        const auto take_values = [&](int n) {
            Full::wait(&shared.value_stages.full[stage_of(n)], phase_of(n));
            const VisibleKeysOf<int> any = seen().any;
            const int key = key_of(n);
            if (any.all_in(key, key + F::columns)) return;
            constexpr int chunks = F::width * static_cast<int>(sizeof(Element)) / 16;
            auto* const tile = reinterpret_cast<uint4*>(shared.values[stage_of(n)]);
            for (int i = static_cast<int>(threadIdx.x); i < F::columns * chunks; i += F::multiplying) {
                if (!any.has(key + i / 8 % F::columns)) tile[i] = uint4{};
            }
            cutlass::arch::fence_view_async_shared();
            sync_named<F::multiplying>(all_warps);
        };
        // Weights of the n-th tile from its products; those of hidden keys are 0.
        float shrink[2];
        const auto weigh_keys = [&](int n) {
            const int key = key_of(n);
            if (!seen().every.all_in(key, key + F::columns)) hide(shared.visible, warp_row, key, weights);
            weigh(scale * log2_of_e, state, weights, [&](int, int h, float factor) { shrink[h] = factor; });
        };
        const auto round_weights = [&] {
#pragma unroll
            for (int k = 0; k < F::columns / 16; ++k) {
                rounded[k] = Products::left_from(weights[0][2 * k], weights[0][2 * k + 1]);
            }
        };

        turns.open();
        Full::wait(&shared.key_stages.full[stage_of(0)], phase_of(0));
        turns.await();
        cute::warpgroup_arrive();
        multiply_keys(0);
        turns.pass_on();
        cute::warpgroup_wait<0>();
        cute::warpgroup_fence_operand(weight_registers);
        leave(shared.key_stages, 0);
        weigh_keys(0);
        round_weights();
#pragma unroll 1
        for (int n = 1; n < count; ++n) {
            Full::wait(&shared.key_stages.full[stage_of(n)], phase_of(n));
            // Both groups meet in here, and so before either waits for its turn.
            take_values(n - 1);
            turns.await();
            cute::warpgroup_arrive();
            multiply_keys(n);
            add_values(n - 1);
            turns.pass_on();
            cute::warpgroup_wait<1>();
            cute::warpgroup_fence_operand(weight_registers);
            leave(shared.key_stages, n);
            weigh_keys(n);
            end_softmax(state[0]);
            cute::warpgroup_wait<0>();
            cute::warpgroup_fence_operand(sum_registers);
            leave(shared.value_stages, n - 1);
#pragma unroll
            for (int h = 0; h < 2; ++h) scale_sums(sums[0], h, shrink[h]);
            round_weights();
        }
        take_values(count - 1);
        turns.await();
        cute::warpgroup_arrive();
        add_values(count - 1);
        turns.close();
        cute::warpgroup_wait<0>();
        cute::warpgroup_fence_operand(sum_registers);
        // A group's rows of the queries, which all of its warps have read, become those of the result.
        sync_named<F::group_threads>(warps_of + group);
    }
    finish_rows<F::rows>(args, queries, warp_row, wide, scale, state, sums);
}

template <class Element, int width, int groups>
int launch_forward(const AttentionArgs& args, void* stream) {
    using F = Forward<Element, width, groups>;
    const AttentionShape& shape = args.shape;
    CUtensorMap keys;
    CUtensorMap values;
    int code = map_keys(keys, args.k, shape);
    if (code == 0) code = map_keys(values, args.v, shape);
    if (code != 0) return code;
    const int64_t blocks = divide_up(rows_of(shape), F::rows) * shape.batch * shape.kv_heads * args.splits;
    const bool wide = whole_chunks(shape, args.q, args.out);
    return enqueue_early(args.early, forward_kernel<F>, static_cast<unsigned>(blocks), F::threads,
                         sizeof(typename F::Shared), stream, args, keys, values, wide);
}

template <class Element>
int launch_by_width(const AttentionArgs& args, void* stream) {
    const bool large = args.tile_rows == forward_tile(sizeof(Element), tile_width(args.shape.head_dim), true).rows;
    if (tile_width(args.shape.head_dim) == 64) {
        return large ? launch_forward<Element, 64, 2>(args, stream) : launch_forward<Element, 64, 1>(args, stream);
    }
    return large ? launch_forward<Element, 128, 2>(args, stream) : launch_forward<Element, 128, 1>(args, stream);
}

}  // namespace

int block_attention_sm90_cuda(const AttentionArgs& args, void* stream) {
    return args.shape.data == Dtype::bfloat16 ? launch_by_width<BFloat16>(args, stream)
                                              : launch_by_width<Float16>(args, stream);
}

}  // namespace starflow
