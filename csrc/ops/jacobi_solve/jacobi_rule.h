// The solver's rule, as the loop on the CPU and the kernels on CUDA apply it: no torch, no std. In words it is in
// jacobi_solve.h.
#pragma once
#include "ops/affine_common/affine_args.h"

namespace starflow {

// How two predictions become one: the Gaussian rule of jacobi_update, or the network's outputs extrapolated,
// given + w (given - free), in the channels of the log-scale, of the shift, or both; w grows along the clip if
// annealed.
struct SolveGuidance {
    double weight;
    bool linear;
    bool log_scale;
    bool shift;
    bool annealed;
};

struct SolveOptions {
    int64_t first;         // first token that is solved for
    int64_t first_token;   // of the network: slot 0 predicts it
    int64_t frame_tokens;  // of a frame
    int64_t window;        // rows of a sample
    double tolerance;
    AffineOptions affine;
    SolveGuidance guidance;
};

// Progress between calls, in tensors of the caller: each row of `frontier` is where a sample stands.
struct SolveState {
    int64_t batch;
    int64_t tokens;
    float* x;           // (batch, tokens + 1, channels): row n + 1 holds token n
    const float* z;     // (batch, tokens, channels)
    int64_t* frontier;  // (batch,)
    int64_t* fresh;     // (batch,) first token that was never evaluated
    float* kept;        // (halves, batch, tokens, out channels): the network's last output
};

STARFLOW_HOST_DEVICE constexpr int64_t halves_of(const SolveGuidance& guidance) {
    return guidance.weight > 0.0 ? 2 : 1;
}

// Whether a token moved so little that the next one may be final too; NaN never does.
STARFLOW_HOST_DEVICE constexpr bool settles(float change, const SolveOptions& options) {
    return change < static_cast<float>(options.tolerance);
}

// Tokens that a sweep makes final, of `count` in a window whose first `settled` all settled: those, and the one behind
// them, which has read final tokens alone.
STARFLOW_HOST_DEVICE constexpr int64_t reached_tokens(int64_t settled, int64_t count) {
    return settled < count ? settled + 1 : count;
}

// The token whose shift and scale place token n, which was never evaluated: a whole number of frames earlier, the last
// that was, `fresh` being the first that was not. Negative: none that is solved for.
STARFLOW_HOST_DEVICE constexpr int64_t guess_source(int64_t n, int64_t fresh, const SolveOptions& options) {
    const int64_t frames = (n - fresh) / options.frame_tokens + 1;
    const int64_t source = n - frames * options.frame_tokens;
    return source < options.first ? -1 : source;
}

// What is read of tokens that are not final must be finite: one NaN would reach every later row. A value beyond this is
// a sign of divergence; any other in its place is as right, for it is only a guess.
inline constexpr float wild = 1e6F;
STARFLOW_HOST_DEVICE constexpr bool is_wild(float value) { return !(value < wild && value > -wild); }

// Of linear guidance: the weight at token n, and whether output channel c, of tokens of `channels`, is extrapolated.
STARFLOW_HOST_DEVICE constexpr float linear_weight(const SolveGuidance& guidance, int64_t n, int64_t tokens) {
    const auto last = static_cast<double>(tokens > 1 ? tokens - 1 : 1);
    return static_cast<float>(guidance.annealed ? guidance.weight * static_cast<double>(n) / last : guidance.weight);
}
STARFLOW_HOST_DEVICE constexpr bool extrapolates(const SolveOptions& options, int64_t c, int64_t channels) {
    const bool shift = options.affine.activation == ScaleActivation::none || c >= channels;
    return shift ? options.guidance.shift : options.guidance.log_scale;
}

// Of the Gaussian rule: the weight that jacobi_update takes.
STARFLOW_HOST_DEVICE constexpr double gaussian_weight(const SolveGuidance& guidance) {
    return guidance.linear ? 0.0 : guidance.weight;
}

}  // namespace starflow
