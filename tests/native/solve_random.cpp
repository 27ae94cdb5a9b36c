// The sweep and the solver on blocks of random shapes, for sanitizers: no torch, threads of its own. At tolerance 0 any
// window must give the bits of token by token, and at any tolerance the bits must not depend on the batch or on the
// number of threads. Arguments: first seed, number of seeds, most threads.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>

#include "ops/jacobi_solve/loop.cpp"
#include "ops/jacobi_sweep/jacobi_sweep_dot.cpp"
#include "ops/jacobi_sweep/sweeper.cpp"
#include "ops/jacobi_update/jacobi_update_cpu.cpp"

using namespace starflow;

namespace {

std::mt19937 generator;

int64_t any(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
float normal(float scale) { return std::normal_distribution<float>(0.0F, scale)(generator); }

std::vector<float> normals(int64_t count, float scale) {
    std::vector<float> values(count);
    for (float& value : values) value = normal(scale);
    return values;
}

uint16_t rounded(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// A matrix of random numbers, packed as panels.h says.
struct Matrix {
    std::vector<char> data;
    std::vector<float> bias;
    Panels panels;

    Matrix(int64_t columns, int64_t depth, MatrixStorage storage) : bias(normals(columns, 0.1F)) {
        panels = {nullptr, nullptr, bias.data(), columns, depth, storage};
        data.assign(panels.count() * panels.panel_bytes(), 0);
        panels.data = data.data();
        const int64_t padded = panels.padded_depth();
        for (int64_t c = 0; c < columns; ++c) {
            for (int64_t k = 0; k < depth; ++k) {
                const float value = normal(1.0F / std::sqrt(static_cast<float>(depth)));
                const int64_t panel = c / panel_columns * padded * panel_columns;
                const int64_t column = c % panel_columns;
                if (storage == MatrixStorage::float32) {
                    reinterpret_cast<float*>(data.data())[panel + k * panel_columns + column] = value;
                } else {
                    const int64_t at = panel + (k / 2 * panel_columns + column) * 2 + k % 2;
                    reinterpret_cast<uint16_t*>(data.data())[at] = rounded(value);
                }
            }
        }
    }
};

void run_team(int64_t members, const TeamWork& work) {
    std::vector<std::thread> others;
    for (int64_t m = 1; m < members; ++m) others.emplace_back([&work, m] { work(m, m + 1); });
    work(0, 1);
    for (std::thread& thread : others) thread.join();
}

// A block of random shape with its problem: noise and guidance.
struct Problem {
    int64_t batch = any(1, 3), frame = any(1, 9), frames = any(1, 3), text = any(0, 3), shifted = any(0, 1);
    int64_t tokens = frame * frames, channels = any(1, 20), kv_heads = any(1, 2), group = any(1, 3);
    int64_t head_dim = 2 * any(1, 20), width = any(1, 70), hidden = any(1, 90), halves = any(1, 2),
            layer_count = any(1, 2);
    bool gated = any(0, 1) == 1, normed = any(0, 1) == 1, masked = any(0, 1) == 1, by_frame = any(0, 1) == 1;
    MatrixStorage storage = any(0, 1) == 1 ? MatrixStorage::float32 : MatrixStorage::bfloat16;
    MatrixStorage cache = any(0, 1) == 1 ? MatrixStorage::float32 : MatrixStorage::bfloat16;
    int64_t heads = kv_heads * group, slots = text + tokens;
    Matrix in{width, channels, storage}, out{2 * channels, width, storage};
    std::vector<Matrix> matrices;
    std::vector<float> one = normals(width, 1.0F), head_one = normals(head_dim, 1.0F), start = normals(channels, 1.0F);
    std::vector<float> position = normals(tokens * width, 0.3F),
                       condition = normals(halves * batch * (by_frame ? frames : 1) * width, 0.3F);
    std::vector<float> cos = normals(slots * head_dim / 2, 0.7F), sin = normals(slots * head_dim / 2, 0.7F);
    std::vector<float> temperature = std::vector<float>(halves * batch, 1.0F);
    std::vector<float> noise = normals(batch * tokens * channels, 1.0F);

    Problem() {
        for (int64_t l = 0; l < layer_count; ++l) {
            matrices.emplace_back((heads + 2 * kv_heads) * head_dim, width, storage);
            matrices.emplace_back(width, heads * head_dim, storage);
            matrices.emplace_back(hidden, width, storage);
            matrices.emplace_back(hidden, width, storage);
            matrices.emplace_back(width, hidden, storage);
        }
    }

    // The tokens of the first `samples` samples.
    std::vector<float> solve_with(int64_t samples, int64_t window, double tolerance, int64_t threads) {
        const int64_t rows = halves * samples;
        const int64_t head_bytes = cache_head_bytes(cache, slots, head_dim);
        std::vector<char> keys(layer_count * rows * kv_heads * head_bytes), values(keys.size());
        const RowNorm norm{normed ? NormKind::layer : NormKind::none, one.data(), one.data(), 1e-5F, 0.0F};
        const RowNorm head_norm{normed ? NormKind::rms : NormKind::none, head_one.data(), nullptr, 1e-6F};
        const RowNorm post{normed ? NormKind::rms : NormKind::none, one.data(), nullptr, 1e-6F};
        std::vector<SweepLayer> layers;
        for (int64_t l = 0; l < layer_count; ++l) {
            const Matrix* of = &matrices[5 * l];
            Panels gate = of[2].panels;
            if (!gated) gate.data = nullptr;
            const int64_t offset = l * rows * kv_heads * head_bytes;
            layers.push_back({norm, of[0].panels, head_norm, head_norm, of[1].panels, post, norm, gate, of[3].panels,
                              of[4].panels, post, keys.data() + offset, values.data() + offset});
        }
        std::vector<float> conditions;  // of both halves of these samples
        const int64_t each = (by_frame ? frames : 1) * width;
        for (int64_t r = 0; r < rows; ++r) {
            const auto from = condition.begin() + (r / samples * batch + r % samples) * each;
            conditions.insert(conditions.end(), from, from + each);
        }
        SweepBlock block{channels,
                         width,
                         heads,
                         kv_heads,
                         head_dim,
                         hidden,
                         layer_count,
                         layers.data(),
                         in.panels,
                         out.panels,
                         post,
                         start.data(),
                         position.data(),
                         conditions.data(),
                         by_frame ? frame : 0,
                         cos.data(),
                         sin.data(),
                         sin.data(),
                         cos.data(),
                         temperature.data(),
                         rows,
                         text,
                         slots,
                         masked ? frame : 0,
                         1,
                         false,
                         cache,
                         ProductInput::bfloat16};
        const Team team{threads, run_team};
        Sweeper sweeper(block, STARFLOW_ISA::jacobi_sweep, team, rows * std::min(window, tokens));
        if (text > 0) {
            const std::vector<float> embedded(rows * text * width, 0.5F);
            std::vector<SweepWindow> all;
            for (int64_t r = 0; r < rows; ++r) all.push_back({r, 0, text, 0, 0});
            sweeper.sweep(all, nullptr, embedded.data(), nullptr);
        }
        std::vector<float> x(samples * (tokens + 1) * channels), kept(halves * samples * tokens * 2 * channels);
        std::vector<int64_t> frontier(samples, shifted), fresh(samples, shifted);
        for (int64_t b = 0; b < samples; ++b) {
            std::copy_n(noise.data() + b * tokens * channels, tokens * channels,
                        x.data() + (b * (tokens + 1) + 1) * channels);
        }
        const SolveState state{samples, tokens, x.data(), noise.data(), frontier.data(), fresh.data(), kept.data()};
        const SolveOptions options{shifted,
                                   shifted,
                                   frame,
                                   window,
                                   tolerance,
                                   {ScaleActivation::softplus, 4.0, false},
                                   {halves == 2 ? 0.7 : 0.0, false, true, true, false}};
        const SolveCount count = solve(block, sweeper, STARFLOW_ISA::jacobi_update, options, state, 1 << 20);
        if (count.bad_token >= 0) std::abort();
        return x;
    }
};

}  // namespace

int main(int argc, char** argv) {
    const int first = argc > 1 ? std::atoi(argv[1]) : 0;
    const int seeds = argc > 2 ? std::atoi(argv[2]) : 10;
    const int threads = argc > 3 ? std::atoi(argv[3]) : 3;
    for (int seed = first; seed < first + seeds; ++seed) {
        generator.seed(seed);
        Problem problem;
        const int64_t window = any(1, problem.tokens + 2);
        const int64_t team = any(1, threads);
        const std::vector<float> exact = problem.solve_with(problem.batch, 1, 0.0, 1);
        const std::vector<float> loose = problem.solve_with(problem.batch, window, 0.05, 1);
        const int64_t one = (problem.tokens + 1) * problem.channels;
        std::vector<float> alone = problem.solve_with(1, window, 0.05, team);
        if (exact != problem.solve_with(problem.batch, window, 0.0, team) ||
            alone != std::vector<float>(loose.begin(), loose.begin() + one)) {
            std::printf("seed %d: other bits\n", seed);
            return 1;
        }
    }
    std::printf("%d blocks\n", seeds);
    return 0;
}
