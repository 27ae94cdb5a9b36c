// Schema, checks and the loop of the solver; the rule is in jacobi_solve.h. The time goes into the kernels of
// jacobi_sweep and jacobi_update that it calls.
#include "ops/jacobi_solve/jacobi_solve.h"

#include <algorithm>
#include <cmath>

#include "common/check.h"
#include "cpu/isa.h"
#include "ops/affine_common/affine_check.h"

namespace starflow {
namespace {

constexpr const char* op = "jacobi_solve";

const cpu::Variants<JacobiUpdateKernels> update_variants{STARFLOW_VARIANTS(jacobi_update)};

// Provisional tokens beyond this are divergence, not data.
constexpr float wild = 1e6F;

class Solver {
  public:
    Solver(const Block& block, const SolveOptions& options, const SolveState& state, const Tensor& like)
        : block_(block),
          options_(options),
          state_(state),
          channels_(block.args().channels),
          out_(block.out_channels()),
          halves_(options.guidance.weight > 0.0 ? 2 : 1),
          sweeper_(block, like, halves_ * state.batch * std::min(options.window, state.tokens)) {
        const int64_t rows = state.batch * options.window;
        x_.resize(rows * channels_);
        z_.resize(rows * channels_);
        previous_.resize(halves_ * rows * channels_);
        raw_.resize(halves_ * rows * out_);
        change_.resize(rows);
    }

    SolveCount run(int64_t most_sweeps) {
        SolveCount count;
        while (static_cast<int64_t>(count.accepted.size()) < most_sweeps && count.bad_token < 0) {
            place_windows();
            if (spans_.empty()) break;
            guess();
            evaluate();
            count.rows += halves_ * rows_;
            count.accepted.push_back(accept(count));
        }
        return count;
    }

  private:
    // The window of a sample: its tokens are rows [row, row + count).
    struct Span {
        int64_t sample;
        int64_t token;
        int64_t count;
        int64_t row;
    };

    float* token(int64_t sample, int64_t n) { return state_.x + (sample * (state_.tokens + 1) + n + 1) * channels_; }
    const float* noise(int64_t sample, int64_t n) const { return state_.z + (sample * state_.tokens + n) * channels_; }
    float* kept(int64_t half, int64_t sample, int64_t n) {
        return state_.kept + ((half * state_.batch + sample) * state_.tokens + n) * out_;
    }

    void place_windows() {
        spans_.clear();
        rows_ = 0;
        for (int64_t b = 0; b < state_.batch; ++b) {
            const int64_t token = state_.frontier[b];
            const int64_t count = std::min(options_.window, state_.tokens - token);
            if (count <= 0) continue;
            spans_.push_back({b, token, count, rows_});
            rows_ += count;
        }
    }

    // x_ <- shift + scale * z_ for `rows` rows of raw_ (conditional rows, then as many unconditional ones).
    void update(int64_t rows) {
        const SolveGuidance& g = options_.guidance;
        const bool gaussian = g.weight > 0.0 && !g.linear;
        const JacobiUpdateArgs args{{1, rows, channels_, Dtype::float32, Dtype::float32, options_.affine},
                                    {x_.data(), 0, channels_},
                                    {z_.data(), 0, channels_},
                                    {raw_.data(), rows * out_, out_},
                                    change_.data(),
                                    gaussian ? g.weight : 0.0};
        update_variants.pick().update(args, 0, rows);
    }

    // Linear guidance of row `row` of raw_, which predicts token n; the other half stands `rows` rows further.
    void combine(int64_t row, int64_t rows, int64_t n) {
        const SolveGuidance& g = options_.guidance;
        if (g.weight <= 0.0 || !g.linear) return;
        const auto last = static_cast<double>(std::max<int64_t>(state_.tokens - 1, 1));
        const auto weight = static_cast<float>(g.annealed ? g.weight * static_cast<double>(n) / last : g.weight);
        float* given = raw_.data() + row * out_;
        const float* free = raw_.data() + (rows + row) * out_;
        const bool shift_alone = options_.affine.activation == Activation::none;
        for (int64_t c = 0; c < out_; ++c) {
            const bool guided = shift_alone || c >= channels_ ? g.shift : g.log_scale;
            if (guided) given[c] += weight * (given[c] - free[c]);
        }
    }

    void guess() {
        std::vector<Span> wanted;  // one token each
        for (const Span& span : spans_) {
            const int64_t fresh = std::max(state_.fresh[span.sample], span.token);
            for (int64_t n = fresh; n < span.token + span.count; ++n) {
                const int64_t frames = (n - state_.fresh[span.sample]) / options_.frame_tokens + 1;
                if (n - frames * options_.frame_tokens < options_.first) continue;
                wanted.push_back({span.sample, n, n - frames * options_.frame_tokens, 0});
            }
            state_.fresh[span.sample] = std::max(state_.fresh[span.sample], span.token + span.count);
        }
        const auto rows = static_cast<int64_t>(wanted.size());
        if (rows == 0) return;
        for (int64_t i = 0; i < rows; ++i) {
            const auto& [sample, n, source, unused] = wanted[i];
            for (int64_t half = 0; half < halves_; ++half) {
                std::copy_n(kept(half, sample, source), out_, raw_.data() + (half * rows + i) * out_);
            }
            combine(i, rows, n);
            std::copy_n(noise(sample, n), channels_, z_.data() + i * channels_);
            std::fill_n(x_.data() + i * channels_, channels_, 0.0F);
        }
        update(rows);
        for (int64_t i = 0; i < rows; ++i) {
            std::copy_n(x_.data() + i * channels_, channels_, token(wanted[i].sample, wanted[i].token));
        }
    }

    void evaluate() {
        const SweepBlock& b = block_.args();
        std::vector<SweepWindow> windows;
        for (int64_t half = 0; half < halves_; ++half) {
            for (const Span& span : spans_) {
                windows.push_back({half * state_.batch + span.sample, span.token - options_.first_token + b.text_tokens,
                                   span.count, 0, 0});
            }
        }
        for (const Span& span : spans_) {
            for (int64_t i = 0; i < span.count; ++i) {
                float* read = token(span.sample, span.token + i - 1);
                // What is read of tokens that are not final must be finite: one NaN would reach every later row. Any
                // value in its place is as right, for it is only a guess.
                for (int64_t c = 0; i > 0 && c < channels_; ++c) {
                    if (!(std::abs(read[c]) < wild)) read[c] = noise(span.sample, span.token + i - 1)[c];
                }
                std::copy_n(read, channels_, previous_.data() + (span.row + i) * channels_);
            }
        }
        if (halves_ == 2) std::copy_n(previous_.data(), rows_ * channels_, previous_.data() + rows_ * channels_);
        sweeper_.sweep(windows, previous_.data(), nullptr, raw_.data());
        for (const Span& span : spans_) {
            for (int64_t half = 0; half < halves_; ++half) {
                std::copy_n(raw_.data() + (half * rows_ + span.row) * out_, span.count * out_,
                            kept(half, span.sample, span.token));
            }
            for (int64_t i = 0; i < span.count; ++i) combine(span.row + i, rows_, span.token + i);
            std::copy_n(token(span.sample, span.token), span.count * channels_, x_.data() + span.row * channels_);
            std::copy_n(noise(span.sample, span.token), span.count * channels_, z_.data() + span.row * channels_);
        }
        update(rows_);
        for (const Span& span : spans_) {
            std::copy_n(x_.data() + span.row * channels_, span.count * channels_, token(span.sample, span.token));
        }
    }

    int64_t accept(SolveCount& count) {
        int64_t accepted = 0;
        for (const Span& span : spans_) {
            const float* change = change_.data() + span.row;
            int64_t settled = 0;
            // NaN never settles.
            while (settled < span.count && change[settled] < static_cast<float>(options_.tolerance)) ++settled;
            const int64_t reached = std::min(settled + 1, span.count);
            // Of what is accepted only the last token can be other than finite: those before it moved by a number.
            if (!std::isfinite(change[reached - 1]) && count.bad_token < 0) {
                count.bad_sample = span.sample;
                count.bad_token = span.token + reached - 1;
            }
            state_.frontier[span.sample] += reached;
            accepted += reached;
        }
        return accepted;
    }

    const Block& block_;
    SolveOptions options_;
    SolveState state_;
    int64_t channels_;
    int64_t out_;
    int64_t halves_;
    Sweeper sweeper_;
    std::vector<Span> spans_;
    int64_t rows_ = 0;
    std::vector<float> x_, z_, previous_, raw_, change_;
};

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

Tensor run(Tensor x, Tensor frontier, Tensor fresh, Tensor kept, Tensor keys, Tensor values, Tensor z,
           std::vector<Tensor> weights, std::vector<int64_t> sizes, std::string activations,
           std::vector<int64_t> numbers, double tolerance, std::string activation, double soft_clip, double guidance,
           std::string guided, int64_t most_sweeps) {
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
    Solver solver(block, options, state, z);
    const SolveCount count = solver.run(most_sweeps);
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
