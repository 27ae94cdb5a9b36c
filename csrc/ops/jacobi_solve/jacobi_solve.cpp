// Schema and checks; the rule is in jacobi_solve.h, the loop in loop.cpp.
#include "ops/jacobi_solve/jacobi_solve.h"

#include <algorithm>
#include <cmath>

#include "common/devices.h"
#include "cpu/isa.h"
#include "ops/affine_common/affine_check.h"
#include "ops/jacobi_common/sweep_block.h"
#include "ops/jacobi_solve/jacobi_solve_cuda.h"

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

SolveOptions options_of(const Block& block, const std::vector<int64_t>& numbers, double tolerance,
                        const std::string& activation, double soft_clip, double guidance, const std::string& guided) {
    require(
        numbers.size() == 4, op, "numbers holds", [&] { return std::to_string(numbers.size()) + " numbers"; },
        [] { return "4: first, first token, frame tokens, window"; });
    const int64_t per_token = activation == "none" ? 1 : 2;
    require(
        activation == "softplus" || activation == "exp" || activation == "none", op, "activation is",
        [&] { return '"' + activation + '"'; }, [] { return R"("softplus", "exp" or "none")"; });
    require(
        block.out_channels() == per_token * block.args().channels, op, "proj_out has",
        [&] { return std::to_string(block.out_channels()) + " channels"; },
        [&] { return std::to_string(per_token * block.args().channels) + " for activation \"" + activation + '"'; });
    require(
        numbers[0] >= numbers[1] && numbers[1] >= 0 && numbers[2] > 0 && numbers[3] > 0, op, "numbers holds",
        [&] { return shape_text(numbers); }, [] { return "first >= first token >= 0, frame tokens and window > 0"; });
    require(
        tolerance >= 0.0 && std::isfinite(tolerance), op, "tolerance is", [&] { return number_text(tolerance); },
        [] { return "a finite number >= 0"; });
    require(
        guidance >= 0.0 && std::isfinite(guidance), op, "guidance is", [&] { return number_text(guidance); },
        [] { return "a finite number >= 0"; });
    const Activation kind = activation == "softplus" ? Activation::softplus
                            : activation == "exp"    ? Activation::exponential
                                                     : Activation::none;
    const auto has = [&](char part) { return guided.find(part) != std::string::npos; };
    return {numbers[0],
            numbers[1],
            numbers[2],
            numbers[3],
            tolerance,
            {kind, soft_clip, false},
            {guidance, guided != "gaussian", has('a'), has('b'), has('+')}};
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

Tensor run(const Tensor& x, const Tensor& frontier, const Tensor& fresh, const Tensor& kept, const Tensor& keys,
           const Tensor& values, const Tensor& z, const std::vector<Tensor>& weights, const std::vector<int64_t>& sizes,
           const std::string& activations, const std::vector<int64_t>& numbers, double tolerance,
           const std::string& activation, double soft_clip, double guidance, const std::string& guided,
           int64_t most_sweeps) {
    const Block block(op, {keys, values, weights, sizes, activations});
    const SolveOptions options = options_of(block, numbers, tolerance, activation, soft_clip, guidance, guided);
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
    const Tensor report = empty_like_shape(at, {3 + static_cast<int64_t>(count.accepted.size())}, ScalarType::Long);
    auto* out = static_cast<int64_t*>(report.data_ptr());
    out[0] = count.rows;
    out[1] = count.bad_sample;
    out[2] = count.bad_token;
    std::copy(count.accepted.begin(), count.accepted.end(), out + 3);
    return report;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(starflow_ext, m) {
    m.def(
        "jacobi_solve(Tensor(a!) x, Tensor(b!) frontier, Tensor(c!) fresh, Tensor(d!) kept, Tensor(e!) keys, "
        "Tensor(f!) values, Tensor z, Tensor[] weights, int[] sizes, str activations, int[] numbers, float tolerance, "
        "str activation, float soft_clip, float guidance, str guided, int most_sweeps) -> Tensor");
}

STARFLOW_IMPLEMENT(m) { m.impl("jacobi_solve", TORCH_BOX(&run)); }

}  // namespace starflow
