// A sweep on CUDA: what is launched in which order, and the two small kernels that no other op has; shapes and types
// are in jacobi_sweep_cuda.h, the network in jacobi_sweep.h. Every architecture.
#include "cuda/enqueue.cuh"
#include "cuda/packed.cuh"
#include "cuda/reduce.cuh"
#include "ops/block_attention/block_attention_schedule.h"
#include "ops/jacobi_sweep/jacobi_sweep_cuda.h"
#include "ops/linear/linear_finish.cuh"
#include "ops/norm/norm.h"
#include "ops/rope_append/rope_append.h"

namespace starflow {
namespace {

using namespace cuda;

constexpr int block_threads = 256;

// The places of a piece in the workspace that its first kernel fills.
struct Gather {
    SweepCudaArgs args;
    SweepPiece piece;
    int64_t* slots;
    double* temperatures;
    float* tables;
    Matrix input;
    float* h;
    int32_t* counters;
    int64_t counter_count;
};

unsigned blocks_for(int64_t threads) { return static_cast<unsigned>((threads + block_threads - 1) / block_threads); }

// One warp a row gathers the token that the row reads, rounded; what is added to its embedding, or the embedding
// itself; and the rotation tables of its slot. It handles 4 values of the residual stream at a time where `width` is 4.
// All threads together set the counters of the products behind it to zero.
// Without a launch bound on the blocks of a multiprocessor ptxas takes 32 registers and spills.
template <int width>
__global__ void __launch_bounds__(block_threads, 4) gather_kernel(Gather g) {
    const SweepCudaArgs& args = g.args;
    const SweepBlock& block = args.block;
    await_earlier_launches();
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    for (int64_t i = thread; i < g.counter_count; i += static_cast<int64_t>(gridDim.x) * blockDim.x) g.counters[i] = 0;
    const int64_t row = thread / warp_size;
    if (row >= g.piece.rows()) return;
    const int64_t window = row / g.piece.tokens;
    const int64_t cache_row = g.piece.first_window + window;
    const int64_t token = g.piece.first_token + row % g.piece.tokens;
    const int64_t slot = args.slots[cache_row] + token;
    if (row % g.piece.tokens == 0 && lane() == 0) {
        g.slots[window] = slot;
        g.temperatures[window] = static_cast<double>(block.temperature[cache_row]);
    }
    const int64_t half = block.head_dim / 2;
    const float* const tables[4] = {block.query_cos, block.query_sin, block.key_cos, block.key_sin};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (tables[i] == nullptr) continue;
        float* to = g.tables + (i * g.piece.rows() + row) * half;
        for (int64_t c = lane(); c < half; c += warp_size) to[c] = tables[i][slot * half + c];
    }
    const auto* source = row_of<const float>(args.source, cache_row % args.samples,
                                             token + (args.by_slot ? args.slots[cache_row] + args.shift : 0));
    float* h = g.h + row * block.width;
    if (args.embedded) {
        for (int64_t c = lane() * width; c < block.width; c += warp_size * width) {
            float values[width];
            load<width>(source + c, values);
            store<width>(h + c, values);
        }
        return;
    }
    if (slot == block.text_tokens && block.start_token != nullptr) source = block.start_token;
    for (int64_t c = lane(); c < block.channels; c += warp_size) {
        const float value[1] = {source[c]};
        store_row<1>(g.input, row, c, value);
    }
    if (block.position == nullptr && block.condition == nullptr) return;
    for (int64_t c = lane() * width; c < block.width; c += warp_size * width) {
        float sum[width] = {};
        float more[width] = {};
        const int64_t place = slot - block.text_tokens;
        if (block.position != nullptr) load<width>(block.position + place * block.width + c, sum);
        if (block.condition != nullptr) load<width>(condition_of(block, cache_row, place) + c, more);
#pragma unroll
        for (int i = 0; i < width; ++i) sum[i] += more[i];
        store<width>(h + c, sum);
    }
}

// h += branch, 4 of `count` values a thread. Values past the last only fill up a line of the workspace.
__global__ void __launch_bounds__(block_threads) add_kernel(float* h, const float* branch, int64_t count) {
    constexpr int width = 4;
    await_earlier_launches();
    const int64_t at = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * width;
    if (at >= count) return;
    float sum[width];
    float more[width];
    load<width>(h + at, sum);
    load<width>(branch + at, more);
#pragma unroll
    for (int i = 0; i < width; ++i) sum[i] += more[i];
    store<width>(h + at, sum);
}

// The launches of one piece; after one that fails there are no others.
class Sweep {
  public:
    Sweep(const SweepCudaArgs& args, const SweepPiece& piece, void* stream)
        : args_(args),
          block_(args.block),
          piece_(piece),
          rows_(piece.rows()),
          cache_(dtype_of_storage(args.block.cache)),
          attended_(args.block.heads * args.block.head_dim),
          layout_(sweep_layout(args.block, args.device, piece)),
          early_(args.device.early && waits_for_earlier_launches(gather_kernel<1>)),
          stream_(stream) {}

    int run() {
        gather();
        if (!args_.embedded) {
            const bool added = block_.position != nullptr || block_.condition != nullptr;
            multiply(block_.proj_in, input(), {}, Epilogue::none, stream_h(), {}, added ? stream_h() : Matrix{});
        }
        for (int64_t l = 0; l < block_.layer_count; ++l) run_layer(block_.layers[l]);
        if (args_.raw != nullptr) {
            const int64_t first = piece_.first_window * args_.tokens + piece_.first_token;
            const int64_t out = block_.proj_out.columns;
            multiply(block_.proj_out, stream_h(), block_.final_norm, Epilogue::none,
                     {args_.raw + first * out, out, Dtype::float32});
        }
        return code_;
    }

  private:
    template <class T>
    T* at(int64_t offset) const {
        return reinterpret_cast<T*>(static_cast<unsigned char*>(args_.workspace) + offset);
    }
    Matrix matrix(int64_t offset, int64_t columns, Dtype dtype) const { return {at<void>(offset), columns, dtype}; }
    Matrix stream_h() const { return matrix(layout_.h, block_.width, Dtype::float32); }
    Matrix input() const { return matrix(layout_.input, block_.channels, dtype_of_storage(block_.proj_in.storage)); }

    template <class Args>
    void call(int (*launcher)(const Args&, void*), const Args& args) {
        if (code_ == 0) code_ = launcher(args, stream_);
    }

    void gather() {
        const Gather g{args_,
                       piece_,
                       at<int64_t>(layout_.slots),
                       at<double>(layout_.temperatures),
                       at<float>(layout_.tables),
                       input(),
                       at<float>(layout_.h),
                       at<int32_t>(layout_.counters),
                       layout_.counter_count};
        const int64_t wide = 4;
        const bool fits = block_.width % wide == 0 && aligned(block_.position, wide, 4) &&
                          aligned(block_.condition, wide, 4) && (!args_.embedded || aligned(args_.source, wide, 4));
        if (code_ == 0) {
            code_ = enqueue_early(early_, fits ? gather_kernel<4> : gather_kernel<1>, blocks_for(rows_ * warp_size),
                                  block_threads, 0, stream_, g);
        }
    }

    // out = residual + epilogue(norm(x) W^T + bias) * gated
    LinearCudaArgs plan(const Panels& weights, const Matrix& x, const RowNorm& norm, Epilogue epilogue,
                        const Matrix& out, const Matrix& gated, const Matrix& residual) {
        LinearArgs product{};
        product.weights = weights;
        product.x = x;
        product.rows = rows_;
        product.norm = norm;
        product.epilogue = epilogue;
        product.multiply = gated;
        product.residual = residual;
        product.out = out;
        LinearCudaArgs args = plan_linear(product, args_.device);
        place_workspace(args, at<void>(layout_.product));
        args.chained = true;
        args.early = early_;
        args.counters = at<int32_t>(layout_.counters) + counters_taken_;
        counters_taken_ += args.schedule.counters();
        return args;
    }
    void multiply(const Panels& weights, const Matrix& x, const RowNorm& norm, Epilogue epilogue, const Matrix& out,
                  const Matrix& gated = {}, const Matrix& residual = {}) {
        call(linear_cuda, plan(weights, x, norm, epilogue, out, gated, residual));
    }

    // The last product of a branch, added to the residual stream: at once, or after its norm.
    void add_branch(const Panels& weights, const Matrix& x, const RowNorm& post) {
        if (post.kind == NormKind::none) {
            multiply(weights, x, {}, Epilogue::none, stream_h(), {}, stream_h());
            return;
        }
        const Matrix branch = matrix(layout_.branch, block_.width, Dtype::float32);
        multiply(weights, x, {}, Epilogue::none, branch);
        NormArgs norm{};
        norm.shape = {1, rows_, block_.width, Dtype::float32, false, post.epsilon, 1.0};
        norm.x = {branch.data, 0, block_.width};
        norm.weight = post.weight;
        norm.out = branch.data;
        norm.early = early_;
        call(norm_cuda, norm);
        const int64_t count = rows_ * block_.width;
        if (code_ == 0) {
            code_ = enqueue_early(early_, add_kernel, blocks_for((count + 3) / 4), block_threads, 0, stream_,
                                  at<float>(layout_.h), static_cast<const float*>(branch.data), count);
        }
    }

    RopeTurn turn(int first_table, const float* cos, const RowNorm& norm) const {
        RopeTurn turn{};
        turn.weight = norm.kind == NormKind::none ? nullptr : norm.weight;
        if (cos == nullptr) return turn;
        const int64_t half = block_.head_dim / 2;
        const auto table = [&](int i) {
            return Rows{at<float>(layout_.tables) + i * rows_ * half, piece_.tokens * half, half};
        };
        turn.cos = table(first_table);
        turn.sin = table(first_table + 1);
        return turn;
    }

    // Keys or values of the piece's windows.
    char* cached(char* layer) const {
        return layer +
               piece_.first_window * block_.kv_heads * block_.slots * block_.head_dim * storage_bytes(block_.cache);
    }

    // Queries, keys and values of a layer: where they go and what they go through.
    RopeAppendArgs heads_of(const SweepLayer& layer) const {
        const int64_t head_dim = block_.head_dim;
        const int64_t qkv = attended_ + 2 * block_.kv_heads * head_dim;
        const int64_t head = block_.slots * head_dim;
        RopeAppendArgs rope{};
        rope.shape = {piece_.windows, piece_.tokens, block_.heads, block_.kv_heads, head_dim, cache_, cache_, false};
        rope.qkv = {at<void>(layout_.qkv), piece_.tokens * qkv, qkv};
        rope.query = turn(0, block_.query_cos, layer.query_norm);
        rope.key = turn(2, block_.key_cos, layer.key_norm);
        rope.q = {at<void>(layout_.queries), piece_.tokens * attended_, head_dim, attended_};
        rope.k = {cached(layer.keys), block_.kv_heads * head, head, head_dim};
        rope.v = {cached(layer.values), block_.kv_heads * head, head, head_dim};
        rope.starts = at<int64_t>(layout_.slots);
        rope.final = args_.keep + piece_.first_window;
        rope.early = early_;
        return rope;
    }

    // By the product that makes them, or, where their size does not suit it, by a launch behind it.
    void project_heads(const SweepLayer& layer, const RopeAppendArgs& rope) {
        LinearCudaArgs args = plan(layer.qkv, stream_h(), layer.attention_norm, Epilogue::none,
                                   matrix(layout_.qkv, layer.qkv.columns, cache_), {}, {});
        args.into_heads = takes_heads(args, rope);
        args.heads = rope;
        call(linear_cuda, args);
        if (!args.into_heads) call(rope_append_cuda, rope);
    }

    void attend(const RopeAppendArgs& rope) {
        const int64_t head_dim = block_.head_dim;
        AttentionArgs attention{};
        attention.shape = {piece_.windows, block_.heads, block_.kv_heads, piece_.tokens,
                           block_.slots,   head_dim,     cache_};
        attention.mask = mask_of(block_);
        attention.mask.starts = rope.starts;
        attention.scale = {0.0F, sqrt(static_cast<double>(head_dim)), at<double>(layout_.temperatures)};
        attention.q = {rope.q.data, rope.q.batch_stride, rope.q.head_stride, rope.q.token_stride};
        attention.k = {rope.k.data, rope.k.batch_stride, rope.k.head_stride, rope.k.token_stride};
        attention.v = {rope.v.data, rope.v.batch_stride, rope.v.head_stride, rope.v.token_stride};
        attention.out = attention.q;
        attention.out.data = at<void>(layout_.attended);
        attention.lse = at<float>(layout_.lse);
        attention.sm90 = args_.device.sm90 && forward_kernel_for(attention.shape, attention.k, attention.v, 9, true) ==
                                                  AttentionKernel::wgmma;
        // The keys are not split, so that a row's bits depend on nothing but the row.
        attention.tile_rows =
            attention_schedule(attention.shape, args_.device.multiprocessors, attention.sm90).tile_rows;
        attention.splits = 1;
        attention.early = early_;
        call(block_attention_cuda, attention);
    }

    void run_layer(const SweepLayer& layer) {
        const RopeAppendArgs rope = heads_of(layer);
        project_heads(layer, rope);
        attend(rope);
        add_branch(layer.proj, matrix(layout_.attended, attended_, cache_), layer.attention_post);
        const Matrix hidden = matrix(layout_.hidden, block_.hidden, dtype_of_storage(layer.down.storage));
        if (layer.gate.data == nullptr) {
            multiply(layer.up, stream_h(), layer.mlp_norm, Epilogue::gelu, hidden);
        } else {
            const Matrix up = matrix(layout_.up, block_.hidden, Dtype::float32);
            multiply(layer.up, stream_h(), layer.mlp_norm, Epilogue::none, up);
            multiply(layer.gate, stream_h(), layer.mlp_norm, Epilogue::gelu_tanh, hidden, up);
        }
        add_branch(layer.down, hidden, layer.mlp_post);
    }

    const SweepCudaArgs& args_;
    const SweepBlock& block_;
    SweepPiece piece_;
    int64_t rows_;
    Dtype cache_;
    int64_t attended_;
    SweepLayout layout_;
    bool early_;
    void* stream_;
    int64_t counters_taken_ = 0;  // by the products up to here
    int code_ = 0;
};

}  // namespace

int jacobi_sweep_cuda(const SweepCudaArgs& args, void* stream) {
    if (args.workspace == nullptr) {
        *args.workspace_bytes = sweep_workspace(args.block, args.device, args.most_rows, args.tokens);
        return 0;
    }
    int code = 0;
    over_sweep_pieces(args.most_rows, args.block.cache_rows, args.tokens, [&](const SweepPiece& piece) {
        if (code == 0) code = Sweep(args, piece, stream).run();
    });
    return code;
}

}  // namespace starflow
