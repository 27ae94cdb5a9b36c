// The gradient of block_attention on sm_90a, by TMA and wgmma; the formula is in block_attention.h.
//
// A block holds 128 keys and their values and passes over the tiles of queries that see them, of all heads that share
// these keys. Of each tile it multiplies
//   S^T = K Q^T,  dP^T = V dO^T,  dV += P^T dO,  dK += dS^T Q,  dQ += dS K,
// five products, where two kernels that each own what they sum make seven. The sums of keys and values stay in
// registers. Those of queries cross blocks: they are float32 in memory, and blocks add to those of a tile in a fixed
// order, the last keys first, each once the block before it has said that it has added. So no float is added by an
// atomic, and the same bits come every time. The order is that in which the blocks of a causal mask come to a tile by
// themselves: a block begins at its own diagonal, and is a step behind the block of the next keys at every tile.
// A block waits only for blocks of lower numbers: those of the same head with later keys. The first to add does not
// read, and the last writes grad_q, rounded, so that nothing is cleared before and converted behind.
// Bytes of that: 8 a value of grad_q and tile of keys, to and from the second-level cache, beside 4 of Q and dO. The
// other way, parts of all blocks in memory and a second kernel to add them, would keep 4 bytes a value and tile of
// keys: of a clip of 33390 tokens and 64 heads of 64, 143 GB, against 0.55 GB of the sums here.
//
// Two groups of four warps multiply, with 64 keys each. A third loads: one thread by TMA, and each thread writes what
// is known of a query, its logarithm, its D and what it sees. Two stages of queries; P^T stays in registers, dS^T goes
// by way of shared memory, in two places, so that one barrier a tile is enough.
#include <cutlass/arch/reg_reconfig.h>

#include "cuda/signal.cuh"
#include "ops/block_attention/block_attention_backward.cuh"
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

// Named barriers of the warps that multiply: of all, and of those of a group. 0 is __syncthreads.
constexpr int all_warps = 1;
constexpr int warps_of = 2;

// D of each row; of the sums of grad_q that no block has added yet; and zeros for queries that see no key, which may
// be of tiles that no block comes to.
template <class Element>
__global__ void prepare_kernel(AttentionBackwardArgs args, int tile_rows) {
    const DotRow row = DotRow::here(args);
    if (!row.exists) return;
    write_dot<Element>(args, row);
    const AttentionShape& shape = args.shape;
    const int64_t tiles = divide_up(shape.queries, tile_rows);
    if (args.turns != nullptr && row.query % tile_rows == 0 && lane() < sm90_groups) {
        args.turns[(row.index / shape.queries * tiles + row.query / tile_rows) * sm90_groups + lane()] = 0;
    }
    const VisibleKeysOf<int> seen = visible_in_tile(args.mask, shape, row.b, row.query);
    if (seen.any_in(0, static_cast<int>(shape.keys))) return;
    auto* grad = row.of<Element>(args.grad_q);
    for (int64_t c = lane(); c < shape.head_dim; c += warp_size) grad[c] = Element{};
}

// What is known of a tile of queries. Numbers of two neighbours are read at once.
template <int rows>
struct alignas(8) QueryTile {
    // Of queries that see no key, and behind the last one, the logarithm is infinite: their weights are 0.
    float logs[rows];  // to the base of 2
    float dots[rows];
    VisibleInTile<rows> visible;
    int blind[rows / warp_size];  // whether one of these 32 queries sees no key
    int tile;
    int head;
    int turn;    // blocks that add to grad_q before this one
    int adders;  // all that do; 0: there are no further tiles
    int all;     // whether each query sees each key of the block
};

template <class Element_, int width_>
struct Backward {
    using Element = Element_;
    using Value = ValueOf<Element>;
    static constexpr int width = width_;
    static constexpr int columns = sm90_columns;
    static constexpr int rows = sm90_gradient_rows(width);
    static constexpr int groups = sm90_groups;
    static constexpr int group_threads = 128;
    static constexpr int multiplying = groups * group_threads;
    static constexpr int threads = multiplying + group_threads;
    static constexpr int multiplying_warps = multiplying / warp_size;
    static constexpr int loading_warps = rows / warp_size;
    static constexpr uint32_t key_bytes = columns * width * sizeof(Element);
    static constexpr uint32_t query_bytes = rows * width * sizeof(Element);
    // Of the sums of grad_q a group has 64 queries or 64 channels, where there are 128 of them.
    static constexpr bool by_queries = rows == 64 * groups;
    static_assert(rows * width == groups * 64 * 64);
    struct Registers {
        static constexpr int load = 56;
        static constexpr int multiply = 224;
    };

    using Keys = Boxes<Element, columns, width>;
    using Queries = Boxes<Element, rows, width>;
    using Products = Boxes<Element, columns, rows>;
    template <int count, int depth>
    using Along = decltype(cute::tile_to_shape(cute::GMMA::Layout_K_SW128_Atom<Value>{},
                                               Shape<Int<count>, Int<depth>, Int<stages>>{}));
    // The same memory, with keys or queries as the depth.
    template <int channels, int count>
    using Across = decltype(cute::tile_to_shape(cute::GMMA::Layout_MN_SW128_Atom<Value>{},
                                                Shape<Int<channels>, Int<count>, Int<stages>>{}, Step<_2, _1, _3>{}));
    using Weigh = decltype(cute::make_tiled_mma(
        cute::GMMA::ss_op_selector<Value, Value, float, Shape<_64, Int<rows>, Int<width>>, Major::K, Major::K>()));
    using Add = decltype(cute::make_tiled_mma(
        cute::GMMA::rs_op_selector<Value, Value, float, Shape<_64, Int<width>, Int<rows>>, Major::K, Major::MN>()));
    // dS^T as the left operand comes from shared memory, where dQ has to have it: beside the sums and what is in flight
    // there are no registers for it, and ptxas would let each wgmma wait for the one before.
    using AddGrads = decltype(cute::make_tiled_mma(
        cute::GMMA::ss_op_selector<Value, Value, float, Shape<_64, Int<width>, Int<rows>>, Major::K, Major::MN>()));
    using AddQueries = decltype(cute::make_tiled_mma(
        cute::GMMA::ss_op_selector<Value, Value, float, Shape<_64, _64, Int<columns>>, Major::MN, Major::MN>()));

    struct Shared {
        alignas(1024) Element keys[columns * width];
        alignas(1024) Element values[columns * width];
        alignas(1024) Element queries[stages][rows * width];
        alignas(1024) Element grads[stages][rows * width];
        alignas(1024) Element products[stages][columns * rows];  // dS^T
        QueryTile<rows> tiles[stages];
        uint64_t own;  // keys and values are there
        uint64_t full[stages];
        uint64_t empty[stages];
    };
};

// A block of threads: a tile of keys of a key head.
struct KeyBlock {
    int tile;
    int first;  // key
    unsigned b;
    unsigned kv_head;

    __device__ static KeyBlock here(const AttentionShape& shape) {
        const auto tiles = static_cast<unsigned>(divide_up(shape.keys, sm90_columns));
        const auto kv_heads = static_cast<unsigned>(shape.kv_heads);
        // In the order in which they add to grad_q.
        const int tile = static_cast<int>(tiles - 1 - blockIdx.x % tiles);
        const unsigned head = blockIdx.x / tiles;
        return {tile, tile * sm90_columns, head / kv_heads, head % kv_heads};
    }
};

// Begins to bring a box of rows of all channels; one thread calls this.
template <int rows, int width, class Element>
__device__ void bring(const CUtensorMap& map, uint64_t& barrier, Element* to, int row, int64_t head, unsigned b) {
#pragma unroll
    for (int channel = 0; channel < width; channel += box_channels) {
        cute::SM90_TMA_LOAD_4D::copy(&map, &barrier, static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL),
                                     to + channel * rows, channel, row, static_cast<int>(head), static_cast<int>(b));
    }
}

// Maps of the tensors that TMA reads.
struct Maps {
    CUtensorMap queries;
    CUtensorMap grads;
    CUtensorMap keys;
    CUtensorMap values;
};

// What the warps that load do.
template <class B>
__device__ void load(const AttentionBackwardArgs& args, const Maps& maps, typename B::Shared& shared) {
    const AttentionShape& shape = args.shape;
    const KeyBlock block = KeyBlock::here(shape);
    const int thread = static_cast<int>(threadIdx.x) - B::multiplying;
    if (thread == 0) {
        Full::arrive_and_expect_tx(&shared.own, 2 * B::key_bytes);
        bring<B::columns, B::width>(maps.keys, shared.own, shared.keys, block.first, block.kv_head, block.b);
        bring<B::columns, B::width>(maps.values, shared.own, shared.values, block.first, block.kv_head, block.b);
    }
    const auto queries = static_cast<int>(shape.queries);
    const auto group = static_cast<int>(group_of(shape));
    const QueryRange range = visible_query_tiles(args.mask, shape, block.b, block.first, B::columns, B::rows);
    int n = 0;
    // Waits until the stage of the n-th tile is empty, and says that this warp has filled it.
    const auto begin = [&] {
        // The first tiles find their stages empty: as if a phase had ended before the first.
        Empty::wait(&shared.empty[stage_of(n)], phase_of(n) ^ 1);
    };
    const auto finish = [&] {
        __syncwarp();
        if (lane() == 0) Full::arrive(&shared.full[stage_of(n)]);
    };
#pragma unroll 1
    for (int tile = range.begin; tile < range.end; ++tile) {
        const int first = tile * B::rows;
        const VisibleByRows seen = visible_by_tile(args.mask, shape, block.b, first, B::rows);
        const KeyTiles tiles = KeyTiles::of(seen.any, B::columns);
        const int place = tiles.place_of(block.tile);
        if (place < 0) continue;
        const int query = first + thread;
        VisibleKeysOf<int> visible{0, 0, 0};
        if (query < queries) visible = visible_in_tile(args.mask, shape, block.b, query);
        const bool sees = visible.any_in(0, static_cast<int>(shape.keys));
#pragma unroll 1
        for (int g = 0; g < group; ++g) {
            const int64_t head = static_cast<int64_t>(block.kv_head) * group + g;
            const int stage = stage_of(n);
            QueryTile<B::rows>& to = shared.tiles[stage];
            begin();
            if (thread == 0) {
                Full::arrive_and_expect_tx(&shared.full[stage], 2 * B::query_bytes);
                bring<B::rows, B::width>(maps.queries, shared.full[stage], shared.queries[stage], first, head, block.b);
                bring<B::rows, B::width>(maps.grads, shared.full[stage], shared.grads[stage], first, head, block.b);
                to.tile = tile;
                to.head = static_cast<int>(head);
                to.turn = tiles.count - 1 - place;
                to.adders = tiles.count;
                to.all = seen.every.all_in(block.first, block.first + B::columns) ? 1 : 0;
            }
            const int64_t index = (block.b * shape.heads + head) * shape.queries + query;
            to.logs[thread] = sees ? args.lse[index] * log2_of_e : INFINITY;
            to.dots[thread] = sees ? args.dots[index] : 0.0F;
            to.visible.set(thread, visible);
            const int blind = __any_sync(whole_warp, query < queries && !sees ? 1 : 0);
            if (lane() == 0) to.blind[thread / warp_size] = blind;
            finish();
            ++n;
        }
    }
    begin();
    if (thread == 0) {
        shared.tiles[stage_of(n)].adders = 0;
        Full::arrive(&shared.full[stage_of(n)]);
    }
    finish();
}

// Zeros take the place of rows that are not `kept`, for whose numbers a weight of 0 is not enough, as they may be NaN.
template <class B, int rows, class Kept>
__device__ void clear_rows(typename B::Element* tile, const Kept& kept) {
    constexpr int chunks = B::width * static_cast<int>(sizeof(typename B::Element)) / 16;
    for (int i = compute_here(static_cast<int>(threadIdx.x)); i < rows * chunks; i += B::multiplying) {
        if (!kept(i / 8 % rows)) reinterpret_cast<uint4*>(tile)[i] = uint4{};
    }
}

template <class B>
__global__ void __launch_bounds__(B::threads, 1)
    grad_kernel(const __grid_constant__ AttentionBackwardArgs args, const __grid_constant__ Maps maps, bool wide) {
    using Element = typename B::Element;
    using Value = typename B::Value;
    using HalfProducts = cuda::Products<Element>;
    STARFLOW_SHARED_MEMORY(memory);
    auto& shared = *reinterpret_cast<typename B::Shared*>(memory);
    const AttentionShape& shape = args.shape;
    if (threadIdx.x == 0) {
        Full::init(&shared.own, 1);
#pragma unroll
        for (int stage = 0; stage < stages; ++stage) {
            Full::init(&shared.full[stage], 1 + B::loading_warps);
            Empty::init(&shared.empty[stage], B::multiplying_warps);
        }
        cutlass::arch::fence_barrier_init();
    }
    __syncthreads();

    if (warp() >= B::multiplying_warps) {
        cutlass::arch::warpgroup_reg_dealloc<B::Registers::load>();
        if (warp() < B::multiplying_warps + B::loading_warps) load<B>(args, maps, shared);
        return;
    }

    cutlass::arch::warpgroup_reg_alloc<B::Registers::multiply>();
    const KeyBlock block = KeyBlock::here(shape);
    const int group = cutlass::canonical_warp_group_idx();
    const int warp_key = 16 * warp();
    const float scale = scale_of(args.scale, block.b);

    typename B::Weigh weigh_product;
    typename B::Add add_product;
    typename B::AddGrads add_grads_product;
    typename B::AddQueries query_product;
    const auto weigh_slice = weigh_product.get_slice(0);
    const auto add_slice = add_product.get_slice(0);
    const auto add_grads_slice = add_grads_product.get_slice(0);
    const auto query_slice = query_product.get_slice(0);
    const auto shared_tensor = [](Element* data, auto layout) {
        return cute::make_tensor(cute::make_smem_ptr(reinterpret_cast<Value*>(data)), layout);
    };
    const auto own_rows = [&](Element* data) {
        const auto all = shared_tensor(data, cute::take<0, 2>(typename B::template Along<B::columns, B::width>{}));
        return weigh_slice.make_fragment_A(
            weigh_slice.partition_A(cute::local_tile(all, Shape<_64, Int<B::width>>{}, cute::make_coord(group, 0))));
    };
    const auto columns_of = [&](Element* data) {
        return weigh_slice.make_fragment_B(
            weigh_slice.partition_B(shared_tensor(data, typename B::template Along<B::rows, B::width>{})));
    };
    const auto depth_of = [&](Element* data) {
        return add_slice.make_fragment_B(
            add_slice.partition_B(shared_tensor(data, typename B::template Across<B::width, B::rows>{})));
    };
    const auto keys = own_rows(shared.keys);
    const auto values = own_rows(shared.values);
    const auto queries = columns_of(shared.queries[0]);
    const auto grads = columns_of(shared.grads[0]);
    const auto queries_across = depth_of(shared.queries[0]);
    const auto grads_across = depth_of(shared.grads[0]);
    const auto products = query_slice.make_fragment_A(query_slice.partition_A(cute::local_tile(
        shared_tensor(shared.products[0], typename B::template Across<B::rows, B::columns>{}),
        Shape<_64, Int<B::columns>, Int<stages>>{}, cute::make_coord(B::by_queries ? group : 0, 0, 0))));
    const auto own_products = add_grads_slice.make_fragment_A(add_grads_slice.partition_A(
        cute::local_tile(shared_tensor(shared.products[0], typename B::template Along<B::columns, B::rows>{}),
                         Shape<_64, Int<B::rows>, Int<stages>>{}, cute::make_coord(group, 0, 0))));
    const auto keys_across = query_slice.make_fragment_B(query_slice.partition_B(cute::local_tile(
        shared_tensor(shared.keys, cute::take<0, 2>(typename B::template Across<B::width, B::columns>{})),
        Shape<_64, Int<B::columns>>{}, cute::make_coord(B::by_queries ? 0 : group, 0))));

    float key_sums[B::width / 8][4] = {};
    float value_sums[B::width / 8][4] = {};
    float weights[B::rows / 8][4];
    float weight_grads[B::rows / 8][4];
    float query_sums[8][4];
    HalfOperand rounded[B::rows / 16];
    // Registers as CuTe counts them, which is the order that they are in.
    const auto by_product = [](float* data, const auto& product, auto tile) {
        return cute::make_tensor(data, cute::make_layout(cute::partition_shape_C(product, tile)));
    };
    auto key_registers = by_product(&key_sums[0][0], add_product, Shape<_64, Int<B::width>>{});
    auto value_registers = by_product(&value_sums[0][0], add_product, Shape<_64, Int<B::width>>{});
    auto weight_registers = by_product(&weights[0][0], weigh_product, Shape<_64, Int<B::rows>>{});
    auto weight_grad_registers = by_product(&weight_grads[0][0], weigh_product, Shape<_64, Int<B::rows>>{});
    auto query_registers = by_product(&query_sums[0][0], query_product, Shape<_64, _64>{});
    const auto rounded_registers =
        cute::make_tensor(reinterpret_cast<Value*>(&rounded[0]),
                          cute::make_layout(cute::partition_shape_A(add_product, Shape<_64, Int<B::rows>>{})));

    // Begin products of this group's keys, or of their values, and the queries of a stage.
    const auto weigh = [&](const auto& left, const auto& right, int stage, auto& sums) {
        cute::warpgroup_fence_operand(sums);
        weigh_product.accumulate_ = cute::GMMA::ScaleOut::Zero;
#pragma unroll
        for (int k = 0; k < B::width / 16; ++k) {
            cute::gemm(weigh_product, left(_, _, k), right(_, _, k, stage), sums);
            weigh_product.accumulate_ = cute::GMMA::ScaleOut::One;
        }
        cute::warpgroup_commit_batch();
    };
    // Begin to add to the sums of keys or values.
    const auto add = [&](auto& product, const auto& left, const auto& right, int stage, auto& sums) {
        cute::warpgroup_fence_operand(sums);
#pragma unroll
        for (int k = 0; k < B::rows / 16; ++k) cute::gemm(product, left(k), right(_, _, k, stage), sums);
        cute::warpgroup_commit_batch();
    };
    // Begin this group's share of dS K.
    const auto multiply_products = [&](int stage) {
        cute::warpgroup_fence_operand(query_registers);
        query_product.accumulate_ = cute::GMMA::ScaleOut::Zero;
#pragma unroll
        for (int k = 0; k < B::columns / 16; ++k) {
            cute::gemm(query_product, products(_, _, k, stage), keys_across(_, _, k), query_registers);
            query_product.accumulate_ = cute::GMMA::ScaleOut::One;
        }
        cute::warpgroup_commit_batch();
    };
    // Adds this block's share of grad_q of a tile, in its turn.
    const auto add_queries = [&](int tile, int head, int turn, int adders) {
        constexpr int chunks = 8;
        // What is computed of these here would else be kept from the start, in registers that sums need.
        const int b = compute_here(static_cast<int>(block.b));
        const int64_t of_head = b * shape.heads + head;
        const int64_t place = (of_head * divide_up(shape.queries, B::rows) + tile) * B::groups + group;
        const int thread = compute_here(static_cast<int>(threadIdx.x));
        const int in_group = thread % B::group_threads;
        // Each thread has its sums side by side with those of its neighbours, whatever they are the sums of.
        auto* const sums = reinterpret_cast<float4*>(args.sums) + place * chunks * B::group_threads + in_group;
        if (turn > 0) {
            if (in_group == 0) wait_for_signals(args.turns + place, turn);
            sync_named<B::group_threads>(warps_of + group);
#pragma unroll
            for (int i = 0; i < chunks; ++i) {
                const float4 before = sums[i * B::group_threads];
                query_sums[i][0] += before.x;
                query_sums[i][1] += before.y;
                query_sums[i][2] += before.z;
                query_sums[i][3] += before.w;
            }
        }
        if (turn + 1 < adders) {
#pragma unroll
            for (int i = 0; i < chunks; ++i) {
                sums[i * B::group_threads] =
                    float4{query_sums[i][0], query_sums[i][1], query_sums[i][2], query_sums[i][3]};
            }
            sync_named<B::group_threads>(warps_of + group);
            if (in_group == 0) signal(args.turns + place);
            return;
        }
        using Pair = Packed<Element, 2>;
        auto* const rows = head_at<Element>(args.grad_q, b, head);
        const int first_channel = B::by_queries ? 0 : 64 * group;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int64_t query = static_cast<int64_t>(tile) * B::rows +
                                  (B::by_queries ? thread : in_group) / warp_size * 16 + 8 * h + thread % warp_size / 4;
            if (query >= shape.queries) continue;
            Element* const row = rows + query * args.grad_q.row_stride;
#pragma unroll
            for (int i = 0; i < chunks; ++i) {
                const int channel = first_channel + 8 * i + thread % 4 * 2;
                Pair pair;
                narrow(query_sums[i][2 * h] * scale, pair.values[0]);
                narrow(query_sums[i][2 * h + 1] * scale, pair.values[1]);
                if (wide) {
                    if (channel < shape.head_dim) *reinterpret_cast<Pair*>(row + channel) = pair;
                } else {
                    if (channel < shape.head_dim) row[channel] = pair.values[0];
                    if (channel + 1 < shape.head_dim) row[channel + 1] = pair.values[1];
                }
            }
        }
    };

    Full::wait(&shared.own, 0);
    // Keys that no query sees may be NaN, and a product of theirs and 0 is.
    const VisibleKeysOf<int> any = visible_by_tile(args.mask, shape, block.b, 0, static_cast<int>(shape.queries)).any;
    if (!any.all_in(block.first, block.first + B::columns)) {
        clear_rows<B, B::columns>(shared.keys, [&](int row) { return any.has(block.first + row); });
        cutlass::arch::fence_view_async_shared();
        sync_named<B::multiplying>(all_warps);
    }
#pragma unroll 1
    for (int n = 0;; ++n) {
        const int stage = stage_of(n);
        Full::wait(&shared.full[stage], phase_of(n));
        const QueryTile<B::rows>& tile = shared.tiles[stage];
        if (tile.adders == 0) break;
        int blind = 0;
#pragma unroll
        for (int w = 0; w < B::loading_warps; ++w) blind |= tile.blind[w];
        if (blind != 0) {
            // So may be queries that see no key, and what comes from above for them.
            const auto kept = [&](int row) { return tile.visible.get(row).any_in(0, static_cast<int>(shape.keys)); };
            clear_rows<B, B::rows>(shared.queries[stage], kept);
            clear_rows<B, B::rows>(shared.grads[stage], kept);
            cutlass::arch::fence_view_async_shared();
            sync_named<B::multiplying>(all_warps);
        }
        cute::warpgroup_arrive();
        weigh(keys, queries, stage, weight_registers);
        weigh(values, grads, stage, weight_grad_registers);
        cute::warpgroup_wait<0>();
        cute::warpgroup_fence_operand(weight_registers);
        cute::warpgroup_fence_operand(weight_grad_registers);
        const bool all = tile.all != 0;
        // Here, since no register is left for it beside the sums of grad_q.
        const float slope = compute_here(scale) * log2_of_e;
        const typename B::Products to{shared.products[stage]};
        // By 16 queries: products and their gradients make room for what they are rounded to.
#pragma unroll
        for (int k = 0; k < B::rows / 16; ++k) {
#pragma unroll
            for (int i = 2 * k; i < 2 * k + 2; ++i) {
                const int column = 8 * i + lane() % 4 * 2;
                const auto logs = *reinterpret_cast<const float2*>(tile.logs + column);
                const auto dots = *reinterpret_cast<const float2*>(tile.dots + column);
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    weights[i][e] = power_of_two(weights[i][e] * slope - (e % 2 == 0 ? logs.x : logs.y));
                    weight_grads[i][e] = weights[i][e] * (weight_grads[i][e] - (e % 2 == 0 ? dots.x : dots.y));
                }
                if (!all) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const int key = block.first + warp_key + e / 2 * 8 + lane() / 4;
                        const bool visible = tile.visible.get(column + e % 2).has(key);
                        weights[i][e] = visible ? weights[i][e] : 0.0F;
                        weight_grads[i][e] = visible ? weight_grads[i][e] : 0.0F;
                    }
                }
            }
            rounded[k] = HalfProducts::left_from(weights[2 * k], weights[2 * k + 1]);
            const HalfOperand rounded_grad = HalfProducts::left_from(weight_grads[2 * k], weight_grads[2 * k + 1]);
            // Else all addresses of a tile would be computed before its products, and take the registers of these.
            const int line = compute_here(lane() / 4 * to.chunk);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                *reinterpret_cast<uint32_t*>(to.at(warp_key + lane() / 4, line, i % 2 * 8, lane() % 4 * 2,
                                                   16 * k + i / 2 * 8)) = rounded_grad.words[i];
            }
        }
        // The fence makes what threads have written visible to wgmma, which reads by the asynchronous proxy. Behind the
        // barrier all have multiplied what was in the other place, which the next tile is written to.
        cutlass::arch::fence_view_async_shared();
        sync_named<B::multiplying>(all_warps);
        cute::warpgroup_arrive();
        multiply_products(stage);
        add(add_product, [&](int k) { return rounded_registers(_, _, k); }, grads_across, stage, value_registers);
        add(
            add_grads_product, [&](int k) { return own_products(_, _, k, stage); }, queries_across, stage,
            key_registers);
        cute::warpgroup_wait<2>();
        cute::warpgroup_fence_operand(query_registers);
        add_queries(tile.tile, tile.head, tile.turn, tile.adders);
        cute::warpgroup_wait<0>();
        cute::warpgroup_fence_operand(value_registers);
        cute::warpgroup_fence_operand(key_registers);
        __syncwarp();
        if (lane() == 0) Empty::arrive(&shared.empty[stage]);
    }
    // The values, which all had multiplied by before the barrier of the last tile, become the results: one after the
    // other, in rows that a warp has to itself.
    const typename B::Keys through{shared.values};
    const auto write = [&](const HeadRows& to, const auto& sums, float factor) {
        __syncwarp();
#pragma unroll
        for (int h = 0; h < 2; ++h) write_sums(through, warp_key + 8 * h + lane() / 4, sums, h, factor);
        __syncwarp();
        auto* const rows = head_at<Element>(to, block.b, block.kv_head);
        flush<16>(through, warp_key, static_cast<int>(shape.head_dim), wide, [&](int row) {
            const int64_t key = block.first + warp_key + row;
            return key < shape.keys ? rows + key * to.row_stride : nullptr;
        });
    };
    write(args.grad_v, value_sums, 1.0F);
    write(args.grad_k, key_sums, scale);
}

template <class Element, int width>
int launch_backward(const AttentionBackwardArgs& args, void* stream) {
    using B = Backward<Element, width>;
    const AttentionShape& shape = args.shape;
    Maps maps;
    int code = map_queries(maps.queries, args.q, shape, B::rows);
    if (code == 0) code = map_queries(maps.grads, args.grad_out, shape, B::rows);
    if (code == 0) code = map_keys(maps.keys, args.k, shape);
    if (code == 0) code = map_keys(maps.values, args.v, shape);
    if (code != 0) return code;
    code = enqueue(prepare_kernel<Element>, dot_blocks(shape), dot_threads, 0, stream, args, B::rows);
    if (code != 0) return code;
    const int64_t blocks = divide_up(shape.keys, B::columns) * shape.batch * shape.kv_heads;
    const bool wide = whole_chunks(shape, args.grad_q, args.grad_k, args.grad_v);
    return enqueue(grad_kernel<B>, static_cast<unsigned>(blocks), B::threads, sizeof(typename B::Shared), stream, args,
                   maps, wide);
}

template <class Element>
int launch_by_width(const AttentionBackwardArgs& args, void* stream) {
    return tile_width(args.shape.head_dim) == 64 ? launch_backward<Element, 64>(args, stream)
                                                 : launch_backward<Element, 128>(args, stream);
}

}  // namespace

int block_attention_backward_sm90_cuda(const AttentionBackwardArgs& args, void* stream) {
    return args.shape.data == Dtype::bfloat16 ? launch_by_width<BFloat16>(args, stream)
                                              : launch_by_width<Float16>(args, stream);
}

}  // namespace starflow
