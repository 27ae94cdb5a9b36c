// Heads split, normalised, rotated and written on CUDA, and the gradient; the formula and the bytes are in
// rope_append.h. A group of lanes for each head of a token, which holds it in registers. Every architecture.
#include "ops/rope_append/rope_append.h"

#include <cuda_runtime.h>

#include "common/visit.h"
#include "cuda/enqueue.cuh"
#include "cuda/reduce.cuh"
#include "ops/rope_append/rope_append_planes.cuh"

namespace starflow {
namespace {

using namespace cuda;

constexpr int most_planes = static_cast<int>(rope_append_most_head_dim_cuda) / 2;
constexpr int block_threads = 256;

// Planes [lane * width, ...) of a head in steps of lanes * width: call step(p, piece).
template <int width, class Step>
__device__ void over_planes(const HeadLayout& layout, int lane_of_group, int lanes, const Step& step) {
    constexpr int pieces = (most_planes + warp_size * width - 1) / (warp_size * width);
#pragma unroll
    for (int piece = 0; piece < pieces; ++piece) {
        const int p = (piece * lanes + lane_of_group) * width;
        if (p < layout.planes) step(p, piece);
    }
}

template <class T, int width>
using Held = Planes<T, width>[(most_planes + warp_size * width - 1) / (warp_size * width)];

// 1 / sqrt(mean of squares + 1e-6) of the head that each group holds; zeros elsewhere do not count.
template <int width, class T>
__device__ T inverse_of(const HeadLayout& layout, const Held<T, width>& x, int lane_of_group, int lanes) {
    T squares = 0;
    over_planes<width>(layout, lane_of_group, lanes, [&](int, int piece) {
#pragma unroll
        for (int i = 0; i < width; ++i) squares += x[piece].u[i] * x[piece].u[i] + x[piece].v[i] * x[piece].v[i];
    });
    return T(1) / sqrt(group_sum(squares, lanes) / static_cast<T>(layout.head_dim) + static_cast<T>(head_epsilon));
}

// blockIdx.x: token of the batch; the groups of blockIdx.y: its heads, of queries, keys and values.
template <class Data, int width>
__global__ void __launch_bounds__(block_threads) forward_kernel(RopeAppendArgs args, int lanes) {
    await_earlier_launches();
    using T = typename Arithmetic<Data>::type;
    const RopeAppendShape& shape = args.shape;
    const HeadLayout layout(shape.head_dim, shape.interleaved);
    const int lane_of_group = static_cast<int>(threadIdx.x) % lanes;
    const int64_t head = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) / lanes;
    const int64_t b = blockIdx.x / shape.tokens;
    const int64_t t = blockIdx.x % shape.tokens;
    const int64_t slot = (args.starts == nullptr ? args.start : args.starts[b]) + t;
    const bool is_query = head < shape.heads;
    const bool is_value = head >= shape.heads + shape.kv_heads;
    const bool is_final = !is_query && args.final != nullptr && slot < args.final[b];
    const bool here = head < shape.heads + 2 * shape.kv_heads && !is_final;
    Held<T, width> x = {};
    if (here) {
        const Data* from = row_of<const Data>(args.qkv, b, t) + head * shape.head_dim;
        over_planes<width>(layout, lane_of_group, lanes,
                           [&](int p, int piece) { load_planes<width>(from, layout, p, x[piece]); });
    }
    // Every lane of the warp takes part, whatever its head goes through.
    const T inverse = inverse_of<width>(layout, x, lane_of_group, lanes);
    if (!here) return;
    const HeadTurn<T> turn(args.query, args.key, is_query, is_value, b, t);
    over_planes<width>(layout, lane_of_group, lanes, [&](int p, int piece) {
        Planes<T, width>& planes = x[piece];
        if (turn.weight != nullptr) {
            Planes<T, width> weight;
            load_planes<width>(turn.weight, layout, p, weight);
#pragma unroll
            for (int i = 0; i < width; ++i) {
                planes.u[i] *= inverse * (T(1) + weight.u[i]);
                planes.v[i] *= inverse * (T(1) + weight.v[i]);
            }
        }
        if (turn.cos != nullptr) rotate<width>(planes, turn.cos, turn.sin, p, T(1));
        if (is_query) {
            store_planes<width>(head_of<Data>(args.q, b, head, t), layout, p, planes);
        } else if (is_value) {
            store_kept<width>(args.v, shape.kept, b, head - shape.heads - shape.kv_heads, slot, layout, p, planes);
        } else {
            store_kept<width>(args.k, shape.kept, b, head - shape.heads, slot, layout, p, planes);
        }
    });
}

// A block of threads for each block of rows; each group takes heads of its tokens in turn, and sums the gradients of
// the weights in shared memory of its own: (groups, 2, head_dim).
template <class Data, int width>
__global__ void __launch_bounds__(block_threads) backward_kernel(RopeAppendBackwardArgs args, int lanes) {
    using T = typename Arithmetic<Data>::type;
    STARFLOW_SHARED_MEMORY(bytes);
    T* sums = reinterpret_cast<T*>(bytes);
    const RopeAppendShape& shape = args.shape;
    const HeadLayout layout(shape.head_dim, shape.interleaved);
    const int groups = static_cast<int>(blockDim.x) / lanes;
    const int group = static_cast<int>(threadIdx.x) / lanes;
    const int lane_of_group = static_cast<int>(threadIdx.x) % lanes;
    T* group_sums = sums + static_cast<int64_t>(group) * 2 * layout.head_dim;
    if (args.partial != nullptr) {
        over_planes<width>(layout, lane_of_group, lanes, [&](int p, int) {
            store_planes<width>(group_sums, layout, p, Planes<T, width>{});
            store_planes<width>(group_sums + layout.head_dim, layout, p, Planes<T, width>{});
        });
    }
    const int64_t heads = shape.heads + 2 * shape.kv_heads;
    const int64_t first_row = args.blocks.begin(blockIdx.x);
    const int64_t items = (args.blocks.end(blockIdx.x) - first_row) * heads;
    // All groups of a warp take the same number of turns, since every lane takes part in the sums.
    for (int64_t first = 0; first < items; first += groups) {
        const bool here = first + group < items;
        const int64_t item = here ? first + group : 0;
        const int64_t row = first_row + item / heads;
        const int64_t head = item % heads;
        const int64_t b = row / shape.tokens;
        const int64_t t = row % shape.tokens;
        const bool is_query = head < shape.heads;
        const bool is_value = head >= shape.heads + shape.kv_heads;
        const HeadTurn<T> turn(args.query, args.key, is_query, is_value, b, t);
        const bool normed = here && turn.weight != nullptr;
        Held<T, width> x = {};
        Held<T, width> gradient = {};
        if (here) {
            const Data* upstream = is_query ? head_of<const Data>(args.grad_q, b, head, t)
                                   : is_value
                                       ? head_of<const Data>(args.grad_v, b, head - shape.heads - shape.kv_heads, t)
                                       : head_of<const Data>(args.grad_k, b, head - shape.heads, t);
            const Data* from = row_of<const Data>(args.qkv, b, t) + head * shape.head_dim;
            over_planes<width>(layout, lane_of_group, lanes, [&](int p, int piece) {
                load_planes<width>(upstream, layout, p, gradient[piece]);
                if (turn.cos != nullptr) rotate<width>(gradient[piece], turn.cos, turn.sin, p, T(-1));
                if (normed) load_planes<width>(from, layout, p, x[piece]);
            });
        }
        const T inverse = inverse_of<width>(layout, x, lane_of_group, lanes);
        T along = 0;
        if (normed) {
            T* weight_sum = group_sums + (is_query ? 0 : layout.head_dim);
            over_planes<width>(layout, lane_of_group, lanes, [&](int p, int piece) {
                Planes<T, width> weight;
                Planes<T, width> sum;
                load_planes<width>(turn.weight, layout, p, weight);
                load_planes<width>(weight_sum, layout, p, sum);
                Planes<T, width>& m = x[piece];
                Planes<T, width>& g = gradient[piece];
#pragma unroll
                for (int i = 0; i < width; ++i) {
                    m.u[i] *= inverse;
                    m.v[i] *= inverse;
                    sum.u[i] += g.u[i] * m.u[i];
                    sum.v[i] += g.v[i] * m.v[i];
                    g.u[i] *= T(1) + weight.u[i];
                    g.v[i] *= T(1) + weight.v[i];
                    along += g.u[i] * m.u[i] + g.v[i] * m.v[i];
                }
                store_planes<width>(weight_sum, layout, p, sum);
            });
        }
        const T part = group_sum(along, lanes) / static_cast<T>(layout.head_dim);
        if (!here) continue;
        Data* grad = row_of<Data>(args.grad_qkv, b, t) + head * shape.head_dim;
        over_planes<width>(layout, lane_of_group, lanes, [&](int p, int piece) {
            Planes<T, width>& g = gradient[piece];
            if (normed) {
#pragma unroll
                for (int i = 0; i < width; ++i) {
                    g.u[i] = inverse * (g.u[i] - x[piece].u[i] * part);
                    g.v[i] = inverse * (g.v[i] - x[piece].v[i] * part);
                }
            }
            store_planes<width>(grad, layout, p, g);
        });
    }
    if (args.partial == nullptr) return;
    __syncthreads();
    T* partial = static_cast<T*>(args.partial) + static_cast<int64_t>(blockIdx.x) * 2 * layout.head_dim;
    for (int c = static_cast<int>(threadIdx.x); c < 2 * layout.head_dim; c += static_cast<int>(blockDim.x)) {
        T sum = 0;
        for (int g = 0; g < groups; ++g) sum += sums[g * 2 * layout.head_dim + c];
        partial[c] = sum;
    }
}

// Whether heads, tables and weights all take `width` planes at a time: pairs of that many elements.
bool all_aligned(const RopeAppendShape& shape, const RopeTurn& query, const RopeTurn& key, int64_t width,
                 int64_t size) {
    if (shape.head_dim % (2 * width) != 0) return false;
    for (const RopeTurn* turn : {&query, &key}) {
        if (!aligned(turn->cos, width, size) || !aligned(turn->sin, width, size) ||
            !aligned(turn->weight, 2 * width, size)) {
            return false;
        }
    }
    return true;
}
bool aligned_heads(const Heads& heads, int64_t width, int64_t size) {
    return aligned(heads.data, width, size, heads.batch_stride, heads.head_stride, heads.token_stride);
}

int64_t size_of(Dtype dtype) {
    int64_t size = 0;
    visit_dtype(dtype, [&](auto data) { size = sizeof(typename decltype(data)::type); });
    return size;
}

// Lanes of a group: a power of two, so that groups fill warps.
int lanes_of(int64_t head_dim, int64_t width) {
    int lanes = 1;
    while (lanes < warp_size && lanes * 2 * width < head_dim) lanes *= 2;
    return lanes;
}

// Call launch(data type, planes a lane) with 16 bytes a lane where all_aligned(width, bytes of data, of the
// arithmetic).
template <class AllAligned, class Launch>
int launch_rope(Dtype dtype, const AllAligned& fits, const Launch& launch) {
    int code = 0;
    visit_dtype(dtype, [&](auto data) {
        using Data = typename decltype(data)::type;
        constexpr int width = widest_access / 2 / sizeof(Data);
        if (fits(width, sizeof(Data), sizeof(typename Arithmetic<Data>::type))) {
            code = launch(data, Constant<width>{});
        } else {
            code = launch(data, Constant<1>{});
        }
    });
    return code;
}

}  // namespace

int rope_append_cuda(const RopeAppendArgs& args, void* stream) {
    const RopeAppendShape& shape = args.shape;
    const int64_t rows = shape.batch * shape.tokens;
    if (rows == 0 || shape.head_dim == 0) return 0;
    const auto fits = [&](int64_t width, int64_t data_size, int64_t size) {
        const int64_t kept_size = size_of(shape.kept);
        return all_aligned(shape, args.query, args.key, width, size) && aligned(args.qkv, 2 * width, data_size) &&
               aligned_heads(args.q, 2 * width, data_size) && aligned_heads(args.k, 2 * width, kept_size) &&
               aligned_heads(args.v, 2 * width, kept_size);
    };
    return launch_rope(shape.data, fits, [&](auto data, auto width) {
        const int lanes = lanes_of(shape.head_dim, width.get());
        const int64_t heads = shape.heads + 2 * shape.kv_heads;
        const int64_t threads = (heads * lanes + warp_size - 1) / warp_size * warp_size;
        const dim3 grid(static_cast<unsigned>(rows),
                        static_cast<unsigned>((threads + block_threads - 1) / block_threads));
        return enqueue_early(args.early, forward_kernel<typename decltype(data)::type, width.get()>, grid,
                             static_cast<unsigned>(threads < block_threads ? threads : block_threads), 0, stream, args,
                             lanes);
    });
}

int rope_append_backward_cuda(const RopeAppendBackwardArgs& args, void* stream) {
    const RopeAppendShape& shape = args.shape;
    if (shape.head_dim == 0) return 0;
    const auto fits = [&](int64_t width, int64_t data_size, int64_t size) {
        return all_aligned(shape, args.query, args.key, width, size) && aligned(args.qkv, 2 * width, data_size) &&
               aligned(args.grad_qkv, 2 * width, data_size) && aligned_heads(args.grad_q, 2 * width, data_size) &&
               aligned_heads(args.grad_k, 2 * width, data_size) && aligned_heads(args.grad_v, 2 * width, data_size);
    };
    int code = 0;
    if (args.blocks.count > 0) {
        code = launch_rope(shape.data, fits, [&](auto data, auto width) {
            using T = typename Arithmetic<typename decltype(data)::type>::type;
            const int lanes = lanes_of(shape.head_dim, width.get());
            const size_t shared =
                args.partial == nullptr ? 0 : sizeof(T) * 2 * shape.head_dim * (block_threads / lanes);
            return enqueue(backward_kernel<typename decltype(data)::type, width.get()>,
                           static_cast<unsigned>(args.blocks.count), block_threads, shared, stream, args, lanes);
        });
    }
    if (code != 0 || args.partial == nullptr) return code;
    return shape.data == Dtype::float64
               ? sum_rows<double>(args.partial, args.weights, args.blocks.count, 2 * shape.head_dim, stream)
               : sum_rows<float>(args.partial, args.weights, args.blocks.count, 2 * shape.head_dim, stream);
}

}  // namespace starflow
