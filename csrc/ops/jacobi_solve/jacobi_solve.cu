// The solver's turn on CUDA, and the kernels around its sweep; jacobi_solve_cuda.h says what they work on, and
// jacobi_rule.h by which rule. Every architecture.
#include "cuda/repeat.cuh"
#include "ops/jacobi_solve/jacobi_solve_cuda.h"
#include "ops/jacobi_update/jacobi_update_row.cuh"

namespace starflow {
namespace {

using namespace cuda;

constexpr int block_threads = 256;
constexpr int block_warps = block_threads / warp_size;

// What the kernels of a turn take.
struct Turn {
    SolveOptions options;
    SolveState state;
    AffineShape shape;  // of one row
    int64_t out;        // channels of raw
    int64_t window;     // rows of a sample
    int64_t text_tokens;
    int64_t most_sweeps;
    int64_t* slots;
    int64_t* keep;
    float* raw;
    float* change;
    int64_t* report;

    // Where the window of a sample begins: at its frontier, or as far before it as all rows need.
    __device__ int64_t first_token(int64_t b) const {
        const int64_t last = state.tokens - window;
        return state.frontier[b] < last ? state.frontier[b] : last;
    }
    __device__ float* x(int64_t b, int64_t n) const {
        return state.x + (b * (state.tokens + 1) + n + 1) * shape.channels;
    }
    __device__ const float* z(int64_t b, int64_t n) const { return state.z + (b * state.tokens + n) * shape.channels; }
    __device__ float* kept(int64_t half, int64_t b, int64_t n) const {
        return state.kept + ((half * state.batch + b) * state.tokens + n) * out;
    }
    __device__ float* raw_row(int64_t half, int64_t b, int64_t i) const {
        return raw + ((half * state.batch + b) * window + i) * out;
    }
};

// A row of a turn, that of this warp: token n of sample b.
struct Row {
    int64_t b, i, n;

    __device__ explicit Row(const Turn& turn) : b(row_of_warp() / turn.window), i(row_of_warp() % turn.window), n(-1) {
        if (b < turn.state.batch) n = turn.first_token(b) + i;
    }
    __device__ bool in(const Turn& turn) const { return b < turn.state.batch; }
};

// Linear guidance: `to`, which may be `given`, gets the combination of the two halves. All lanes of a warp call this,
// and see the result afterwards.
__device__ void extrapolate(const Turn& turn, int64_t n, const float* given, const float* free, float* to) {
    const float weight = linear_weight(turn.options.guidance, n, turn.state.tokens);
    for (int64_t c = lane(); c < turn.out; c += warp_size) {
        const float value = given[c];
        to[c] = extrapolates(turn.options, c, turn.shape.channels) ? value + weight * (value - free[c]) : value;
    }
    __syncwarp();
}

// Before a sweep. Tokens that were never evaluated are guessed where there is a frame before them, and tokens that will
// be read before they are final are kept from being wild. The first row of a sample says where its window lies.
__global__ void __launch_bounds__(block_threads) guess_kernel(Turn turn) {
    const Row row(turn);
    if (!row.in(turn)) return;
    const SolveState& state = turn.state;
    const SolveGuidance& guidance = turn.options.guidance;
    const int64_t frontier = state.frontier[row.b];
    if (row.i == 0 && lane() == 0) {
        const int64_t shift = turn.text_tokens - turn.options.first_token;
        for (int64_t half = 0; half < halves_of(guidance); ++half) {
            turn.slots[half * state.batch + row.b] = row.n + shift;
            turn.keep[half * state.batch + row.b] = frontier + shift;
        }
    }
    if (row.n < frontier) return;
    const bool never = row.n >= state.fresh[row.b];
    const int64_t source = never ? guess_source(row.n, state.fresh[row.b], turn.options) : -1;
    const float* given = nullptr;
    const float* free = nullptr;
    if (source >= 0) {
        given = turn.kept(0, row.b, source);
        if (guidance.weight > 0.0) free = turn.kept(1, row.b, source);
        if (guidance.weight > 0.0 && guidance.linear) {
            // The sweep writes this row afterwards.
            float* combined = turn.raw_row(0, row.b, row.i);
            extrapolate(turn, row.n, given, free, combined);
            given = combined;
        }
    }
    const bool read = row.i + 1 < turn.window;
    float* x = turn.x(row.b, row.n);
    const float* z = turn.z(row.b, row.n);
    const auto weight = static_cast<float>(gaussian_weight(guidance));
    for (int64_t c = lane(); c < turn.shape.channels; c += warp_size) {
        float value = x[c];
        if (source >= 0) {
            const GuidedTerms<float, 1> terms(given, free, weight, turn.shape, c);
            value = terms.shift[0] + terms.scale[0] * z[c];
        }
        x[c] = read && is_wild(value) ? z[c] : value;
    }
}

// After a sweep: what the network put out is kept, tokens that are not final are decoded, and change says how far each
// moved in units of its own scale.
__global__ void __launch_bounds__(block_threads) update_kernel(Turn turn) {
    await_earlier_launches();
    const Row row(turn);
    if (!row.in(turn) || row.n < turn.state.frontier[row.b]) return;
    const SolveGuidance& guidance = turn.options.guidance;
    for (int64_t half = 0; half < halves_of(guidance); ++half) {
        const float* raw = turn.raw_row(half, row.b, row.i);
        float* kept = turn.kept(half, row.b, row.n);
        for (int64_t c = lane(); c < turn.out; c += warp_size) kept[c] = raw[c];
    }
    float* given = turn.raw_row(0, row.b, row.i);
    const float* free = guidance.weight > 0.0 ? turn.raw_row(1, row.b, row.i) : nullptr;
    if (guidance.weight > 0.0 && guidance.linear) {
        extrapolate(turn, row.n, given, free, given);
    }
    float* x = turn.x(row.b, row.n);
    const float* z = turn.z(row.b, row.n);
    const auto weight = static_cast<float>(gaussian_weight(guidance));
    float change = 0.0F;
    for (int64_t c = lane(); c < turn.shape.channels; c += warp_size) {
        const GuidedTerms<float, 1> terms(given, free, weight, turn.shape, c);
        const float updated = terms.shift[0] + terms.scale[0] * z[c];
        change = larger(change, fabsf(updated - x[c]) / terms.scale[0]);
        x[c] = updated;
    }
    change = warp_largest(change);
    if (lane() == 0) turn.change[row.b * turn.window + row.i] = change;
}

// What a warp of accept_kernel found in its samples.
struct Found {
    int64_t accepted;
    int64_t bad_sample;  // the first; negative: none
    int64_t bad_token;
    bool more;  // tokens that are not final
};

// One block: a warp a sample in turn accepts the tokens that have settled; then one thread adds up and says whether
// there is another sweep.
__global__ void __launch_bounds__(block_threads) accept_kernel(Turn turn, Again again) {
    __shared__ Found of_warp[block_warps];
    await_earlier_launches();
    const SolveState& state = turn.state;
    const int warp = static_cast<int>(threadIdx.x) / warp_size;
    Found found{0, -1, -1, false};
    for (int64_t b = warp; b < state.batch; b += block_warps) {
        const int64_t frontier = state.frontier[b];
        if (frontier >= state.tokens) continue;
        const int64_t skipped = frontier - turn.first_token(b);
        const int64_t count = turn.window - skipped;
        const float* change = turn.change + b * turn.window + skipped;
        int64_t settled = count;
        for (int64_t begin = 0; begin < count; begin += warp_size) {
            const int64_t i = begin + lane();
            const unsigned stops = __ballot_sync(whole_warp, i < count && !settles(change[i], turn.options));
            if (stops != 0) {
                settled = begin + __ffs(static_cast<int>(stops)) - 1;
                break;
            }
        }
        const int64_t reached = reached_tokens(settled, count);
        // Of what is accepted only the last token can be other than finite: those before it moved by a number.
        if (!isfinite(change[reached - 1]) && found.bad_sample < 0) {
            found.bad_sample = b;
            found.bad_token = frontier + reached - 1;
        }
        found.accepted += reached;
        found.more = found.more || frontier + reached < state.tokens;
        __syncwarp();  // all lanes have read the frontier
        if (lane() == 0) {
            state.frontier[b] = frontier + reached;
            if (state.fresh[b] < frontier + count) state.fresh[b] = frontier + count;
        }
    }
    if (lane() == 0) of_warp[warp] = found;
    __syncthreads();
    if (threadIdx.x != 0) return;
    Found all{0, -1, -1, false};
    for (const Found& one : of_warp) {
        all.accepted += one.accepted;
        all.more = all.more || one.more;
        if (one.bad_sample >= 0 && (all.bad_sample < 0 || one.bad_sample < all.bad_sample)) {
            all.bad_sample = one.bad_sample;
            all.bad_token = one.bad_token;
        }
    }
    int64_t* report = turn.report;
    const int64_t sweep = report[report_sweeps];
    const bool more = all.more && all.bad_sample < 0 && sweep + 1 < turn.most_sweeps;
    report[report_accepted + sweep] = all.accepted;
    report[report_sweeps] = sweep + 1;
    report[report_bad_sample] = all.bad_sample;
    report[report_bad_token] = all.bad_token;
    report[report_more] = more ? 1 : 0;
    set_again(again, more);
}

// Sets the report of a solve that has not begun, one thread for each number.
__global__ void __launch_bounds__(block_threads) begin_kernel(int64_t* report, int64_t numbers) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= numbers) return;
    report[i] = i == report_more ? 1 : i == report_bad_sample || i == report_bad_token ? -1 : 0;
}

}  // namespace

int jacobi_solve_cuda(const SolveCudaArgs& args, void* stream) {
    const SolveLayout layout = solve_layout(args);
    if (args.workspace == nullptr) {
        *args.workspace_bytes = layout.bytes;
        return 0;
    }
    auto* workspace = static_cast<unsigned char*>(args.workspace);
    const int64_t channels = args.block.channels;
    Turn turn{};
    turn.options = args.options;
    turn.state = args.state;
    turn.shape = {1, 1, channels, Dtype::float32, Dtype::float32, args.options.affine};
    turn.out = args.block.proj_out.columns;
    turn.window = window_rows(args.options, args.state);
    turn.text_tokens = args.block.text_tokens;
    turn.most_sweeps = args.most_sweeps;
    turn.slots = reinterpret_cast<int64_t*>(workspace + layout.slots);
    turn.keep = reinterpret_cast<int64_t*>(workspace + layout.keep);
    turn.raw = reinterpret_cast<float*>(workspace + layout.raw);
    turn.change = reinterpret_cast<float*>(workspace + layout.change);
    turn.report = args.report;

    SweepCudaArgs sweep{};
    sweep.block = args.block;
    sweep.device = args.device;
    sweep.most_rows = args.most_rows;
    sweep.tokens = turn.window;
    // Row n of x is token n - 1: what the network reads for token n.
    sweep.source = {args.state.x, (args.state.tokens + 1) * channels, channels};
    sweep.samples = args.state.batch;
    sweep.by_slot = true;
    sweep.shift = args.options.first_token - args.block.text_tokens;
    sweep.slots = turn.slots;
    sweep.keep = turn.keep;
    sweep.raw = turn.raw;
    sweep.workspace = workspace + layout.sweep;

    const bool early = args.device.early && waits_for_earlier_launches(update_kernel);
    const auto blocks = static_cast<unsigned>((args.state.batch * turn.window + block_warps - 1) / block_warps);
    const int64_t numbers = report_accepted + args.most_sweeps;
    const int code = enqueue(begin_kernel, static_cast<unsigned>((numbers + block_threads - 1) / block_threads),
                             block_threads, 0, stream, args.report, numbers);
    if (code != 0) return code;
    return repeat(args.repeat, args.report + report_more, stream, [&](void* to, const Again& again) {
        // In the body of a graph there is nothing in front of it.
        int launched = enqueue(guess_kernel, blocks, block_threads, 0, to, turn);
        if (launched == 0) launched = jacobi_sweep_cuda(sweep, to);
        if (launched == 0) launched = enqueue_early(early, update_kernel, blocks, block_threads, 0, to, turn);
        if (launched == 0) launched = enqueue_early(early, accept_kernel, 1, block_threads, 0, to, turn, again);
        return launched;
    });
}

}  // namespace starflow
