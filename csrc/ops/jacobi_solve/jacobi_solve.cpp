// Schema and checks; the rule is in jacobi_solve.h, the loop in loop.cpp.
#include "ops/jacobi_solve/jacobi_solve.h"

#include <algorithm>
#include <cmath>

#include "common/check.h"
#include "cpu/isa.h"
#include "ops/affine_common/affine_check.h"
#include "ops/jacobi_common/sweep_block.h"

namespace starflow {
namespace {

constexpr const char* op = "jacobi_solve";

const cpu::Variants<JacobiUpdateKernels> update_variants{STARFLOW_VARIANTS(jacobi_update)};

template <class T>
T* checked(const char* name, const Tensor& tensor, ScalarType type, const std::vector<int64_t>& shape) {
    require(
        tensor.scalar_type() == type && shape_of(tensor) == shape && tensor.is_cpu() && tensor.is_contiguous(), op,
        std::string(name) + " has shape",
        [&] { return shape_text(shape_of(tensor)) + " and dtype " + dtype_text(tensor); },
        [&] {
            return shape_text(shape) + (type == ScalarType::Float ? " float32" : " int64") + ", contiguous, on cpu";
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
    SolveState state{batch,
                     tokens,
                     checked<float>("x", x, ScalarType::Float, {batch, tokens + 1, channels}),
                     checked<float>("z", z, ScalarType::Float, {batch, tokens, channels}),
                     checked<int64_t>("frontier", frontier, ScalarType::Long, {batch}),
                     checked<int64_t>("fresh", fresh, ScalarType::Long, {batch}),
                     checked<float>("kept", kept, ScalarType::Float, {halves, batch, tokens, block.out_channels()})};
    for (int64_t b = 0; b < batch; ++b) {
        require(
            state.frontier[b] >= options.first && state.frontier[b] <= tokens, op, "frontier holds",
            [&] { return std::to_string(state.frontier[b]); },
            [&] { return "tokens from " + std::to_string(options.first) + " to " + std::to_string(tokens); });
    }
    const int64_t rows = halves * batch * std::min(options.window, tokens);
    Sweeper sweeper(block.args(), sweep_kernels(), {torch_threads(), run_on_torch_threads}, rows);
    const SolveCount count = solve(block.args(), sweeper, update_variants.pick(), options, state, most_sweeps);
    const auto sweeps = static_cast<int64_t>(count.accepted.size());
    const Tensor report = empty_like_shape(z, {3 + sweeps}, ScalarType::Long);
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

STABLE_TORCH_LIBRARY_IMPL(starflow_ext, CPU, m) { m.impl("jacobi_solve", TORCH_BOX(&run)); }

}  // namespace starflow
