// Schema and checks; the rule is in jacobi_solve.h, the loop in loop.cpp.
#include "ops/jacobi_solve/jacobi_solve.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "common/devices.h"
#include "cpu/isa.h"
#include "ops/affine_common/affine_check.h"
#include "ops/jacobi_solve/jacobi_solve_cuda.h"
#include "ops/jacobi_sweep/sweep_block.h"

namespace starflow {
namespace {

constexpr const char* op = "jacobi_solve";

const cpu::Variants<JacobiUpdateKernels> update_variants{STARFLOW_VARIANTS(jacobi_update)};

template <class T>
T* checked(const char* name, const Tensor& tensor, const Tensor& keys, ScalarType type,
           const std::vector<int64_t>& shape) {
    require(
        tensor.scalar_type() == type && has_shape(tensor, shape) && same_device(tensor, keys) && tensor.is_contiguous(),
        op, named(name, " has shape"),
        [&] { return shape_text(shape_of(tensor)) + " and dtype " + dtype_text(tensor); },
        [&] {
            return shape_text(shape) + (type == ScalarType::Float ? " float32" : " int64") + ", contiguous, on " +
                   device_text(keys);
        });
    return static_cast<T*>(tensor.data_ptr());
}

void check_least(const char* name, int64_t value, int64_t least) {
    require(
        value >= least, op, named(name, " is"), [&] { return value; },
        [&] { return "at least " + std::to_string(least); });
}

void check_not_negative(const char* name, double value) {
    require(
        value >= 0.0 && std::isfinite(value), op, named(name, " is"), [&] { return number_text(value); },
        [] { return "a finite number >= 0"; });
}

void check_options(const Block& block, const SolveOptions& options) {
    const ScaleActivation activation = options.affine.activation;
    const int64_t expected = block.args().channels * (activation == ScaleActivation::none ? 1 : 2);
    require(
        block.out_channels() == expected, op, "proj_out has",
        [&] { return std::to_string(block.out_channels()) + " channels"; },
        [&] {
            return std::to_string(expected) + " for activation \"" +
                   scale_activation_names[static_cast<int>(activation)] + '"';
        });
    check_least("first_token", options.first_token, 0);
    require(
        options.first >= options.first_token, op, "first is", [&] { return options.first; },
        [&] { return "at least first_token, " + std::to_string(options.first_token); });
    check_least("frame_tokens", options.frame_tokens, 1);
    check_least("window", options.window, 1);
    check_not_negative("tolerance", options.tolerance);
    check_soft_clip(op, options.affine.soft_clip);
    check_not_negative("guidance", options.guidance.weight);
    require(
        !options.guidance.linear || options.guidance.log_scale || options.guidance.shift, op, "guided is",
        [] { return "linear in nothing"; }, [] { return "linear in the log-scale, the shift, or both"; });
}

SolveCount run_cpu(const Block& block, const SolveOptions& options, const SolveState& state, int64_t most_sweeps) {
    const int64_t rows = halves_of(options.guidance) * state.batch * std::min(options.window, state.tokens);
    Sweeper sweeper(block.args(), sweep_kernels(), {torch_threads(), run_on_torch_threads}, rows);
    return solve(block.args(), sweeper, update_variants.pick(), options, state, most_sweeps);
}

SolveCount run_cuda(const Block& block, const Tensor& keys, const SolveOptions& options, const SolveState& state,
                    int64_t most_sweeps) {
    SolveCudaArgs args{};
    args.block = block.args();
    args.device = cuda_device(keys);
    args.most_rows = sweep_most_rows;
    args.options = options;
    args.state = state;
    args.most_sweeps = most_sweeps;
    args.repeat = cuda::chosen_repeat();
    const Tensor report = empty_like_shape(keys, {report_accepted + most_sweeps}, ScalarType::Long);
    args.report = static_cast<int64_t*>(report.data_ptr());
    cuda::launch_in_workspace(op, keys, args, jacobi_solve_cuda);

    const Tensor seen = on_host(report);
    const auto* said = static_cast<const int64_t*>(seen.data_ptr());
    const int64_t sweeps = said[report_sweeps];
    SolveCount count;
    count.accepted.assign(said + report_accepted, said + report_accepted + sweeps);
    count.rows = sweeps * args.block.cache_rows * window_rows(options, state);
    count.bad_sample = said[report_bad_sample];
    count.bad_token = said[report_bad_token];
    return count;
}

std::tuple<Tensor, int64_t, int64_t, int64_t> run(const Tensor& x, const Tensor& frontier, const Tensor& fresh,
                                                  const Tensor& kept, const Tensor& keys, const Tensor& values,
                                                  const Tensor& z, const std::vector<Tensor>& weights,
                                                  const std::vector<int64_t>& sizes, int64_t product_input,
                                                  int64_t first, int64_t first_token, int64_t frame_tokens,
                                                  int64_t window, double tolerance, int64_t activation,
                                                  double soft_clip, double guidance, bool linear, bool guide_log_scale,
                                                  bool guide_shift, bool annealed, int64_t most_sweeps) {
    const Block block(op, {keys, values, weights, sizes, product_input});
    require(
        !block.args().whole_frames, op, "whole_frames is", [] { return "1"; },
        [] { return "0: a token is solved from those before it"; });
    const auto scale = option_of<ScaleActivation>(op, "activation", activation, scale_activation_names);
    const SolveOptions options{first,
                               first_token,
                               frame_tokens,
                               window,
                               tolerance,
                               {scale, soft_clip, false},
                               {guidance, linear, guide_log_scale, guide_shift, annealed}};
    check_options(block, options);
    require(
        z.dim() == 3, op, "z has shape", [&] { return shape_text(shape_of(z)); },
        [] { return "(batch, tokens, channels)"; });
    const int64_t batch = z.size(0);
    const int64_t tokens = z.size(1);
    const int64_t channels = block.args().channels;
    const int64_t halves = guidance > 0.0 ? 2 : 1;
    require(
        block.args().cache_rows == halves * batch, op, "keys has",
        [&] { return std::to_string(block.args().cache_rows) + " cache rows"; },
        [&] { return std::to_string(halves * batch) + " for " + std::to_string(batch) + " samples"; });
    const int64_t needed = tokens - options.first_token + block.args().text_tokens;
    require(
        needed <= block.args().slots, op, "keys has", [&] { return std::to_string(block.args().slots) + " slots"; },
        [&] { return "at least " + std::to_string(needed); });
    const SolveState state{
        batch,
        tokens,
        checked<float>("x", x, keys, ScalarType::Float, {batch, tokens + 1, channels}),
        checked<float>("z", z, keys, ScalarType::Float, {batch, tokens, channels}),
        checked<int64_t>("frontier", frontier, keys, ScalarType::Long, {batch}),
        checked<int64_t>("fresh", fresh, keys, ScalarType::Long, {batch}),
        checked<float>("kept", kept, keys, ScalarType::Float, {halves, batch, tokens, block.out_channels()})};
    if (keys.is_cuda()) cuda::refuse_capture(op, keys, "the host reads how far it has come");
    const Tensor at = on_host(frontier);
    const auto* tokens_at = static_cast<const int64_t*>(at.data_ptr());
    bool unfinished = false;
    for (int64_t b = 0; b < batch; ++b) {
        require(
            tokens_at[b] >= options.first && tokens_at[b] <= tokens, op, "frontier holds",
            [&] { return std::to_string(tokens_at[b]); },
            [&] { return "tokens from " + std::to_string(options.first) + " to " + std::to_string(tokens); });
        unfinished = unfinished || tokens_at[b] < tokens;
    }
    SolveCount count;
    if (unfinished && most_sweeps > 0) {
        count = keys.is_cuda() ? run_cuda(block, keys, options, state, most_sweeps)
                               : run_cpu(block, options, state, most_sweeps);
    }
    const Tensor accepted = empty_like_shape(at, {static_cast<int64_t>(count.accepted.size())}, ScalarType::Long);
    std::copy(count.accepted.begin(), count.accepted.end(), static_cast<int64_t*>(accepted.data_ptr()));
    return {accepted, count.rows, count.bad_sample, count.bad_token};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(starflow_ext, m) {
    m.def(
        "jacobi_solve(Tensor(a!) x, Tensor(b!) frontier, Tensor(c!) fresh, Tensor(d!) kept, Tensor(e!) keys, "
        "Tensor(f!) values, Tensor z, Tensor[] weights, int[] sizes, int product_input, int first, int first_token, "
        "int frame_tokens, int window, float tolerance, int activation, float soft_clip, float guidance, bool linear, "
        "bool guide_log_scale, bool guide_shift, bool annealed, int most_sweeps) "
        "-> (Tensor accepted, int rows, int bad_sample, int bad_token)");
}

STARFLOW_IMPLEMENT(m) { m.impl("jacobi_solve", TORCH_BOX(&run)); }

}  // namespace starflow
