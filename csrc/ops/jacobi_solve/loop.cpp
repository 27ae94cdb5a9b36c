// The loop of the solver; the rule is in jacobi_solve.h. The time goes into the kernels of jacobi_sweep and
// jacobi_update that it calls.
#include <algorithm>
#include <cmath>

#include "ops/jacobi_solve/jacobi_solve.h"

namespace starflow {
namespace {

class Solver {
  public:
    Solver(const SweepBlock& block, Sweeper& sweeper, const JacobiUpdateKernels& update, const SolveOptions& options,
           const SolveState& state)
        : block_(block),
          sweeper_(sweeper),
          update_(update),
          options_(options),
          state_(state),
          channels_(block.channels),
          out_(block.proj_out.columns),
          halves_(halves_of(options.guidance)) {
        const int64_t rows = state.batch * std::min(options.window, state.tokens);
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
        const JacobiUpdateArgs args{{1, rows, channels_, Dtype::float32, Dtype::float32, options_.affine},
                                    {x_.data(), 0, channels_},
                                    {z_.data(), 0, channels_},
                                    {raw_.data(), rows * out_, out_},
                                    change_.data(),
                                    gaussian_weight(options_.guidance)};
        update_.update(args, 0, rows);
    }

    // Applies linear guidance to row `row` of raw_, which predicts token n; the other half stands `rows` rows further.
    void combine(int64_t row, int64_t rows, int64_t n) {
        const SolveGuidance& g = options_.guidance;
        if (g.weight <= 0.0 || !g.linear) return;
        const float weight = linear_weight(g, n, state_.tokens);
        float* given = raw_.data() + row * out_;
        const float* free = raw_.data() + (rows + row) * out_;
        for (int64_t c = 0; c < out_; ++c) {
            if (extrapolates(options_, c, channels_)) given[c] += weight * (given[c] - free[c]);
        }
    }

    void guess() {
        std::vector<Span> wanted;  // one token each
        for (const Span& span : spans_) {
            const int64_t fresh = std::max(state_.fresh[span.sample], span.token);
            for (int64_t n = fresh; n < span.token + span.count; ++n) {
                const int64_t source = guess_source(n, state_.fresh[span.sample], options_);
                if (source >= 0) wanted.push_back({span.sample, n, source, 0});
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
        std::vector<SweepWindow> windows;
        for (int64_t half = 0; half < halves_; ++half) {
            for (const Span& span : spans_) {
                windows.push_back({half * state_.batch + span.sample,
                                   span.token - options_.first_token + block_.text_tokens, span.count, 0, 0});
            }
        }
        for (const Span& span : spans_) {
            for (int64_t i = 0; i < span.count; ++i) {
                float* read = token(span.sample, span.token + i - 1);
                for (int64_t c = 0; i > 0 && c < channels_; ++c) {
                    if (is_wild(read[c])) read[c] = noise(span.sample, span.token + i - 1)[c];
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
            while (settled < span.count && settles(change[settled], options_)) ++settled;
            const int64_t reached = reached_tokens(settled, span.count);
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

    const SweepBlock& block_;
    Sweeper& sweeper_;
    const JacobiUpdateKernels& update_;
    SolveOptions options_;
    SolveState state_;
    int64_t channels_;
    int64_t out_;
    int64_t halves_;
    std::vector<Span> spans_;
    int64_t rows_ = 0;
    std::vector<float> x_, z_, previous_, raw_, change_;
};

}  // namespace

SolveCount solve(const SweepBlock& block, Sweeper& sweeper, const JacobiUpdateKernels& update,
                 const SolveOptions& options, const SolveState& state, int64_t most_sweeps) {
    return Solver(block, sweeper, update, options, state).run(most_sweeps);
}

}  // namespace starflow
