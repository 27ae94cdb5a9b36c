// multiply_panels of csrc/cpu/matmul.h against float64, for every storage and kind of input, at the level that
// this file is compiled for. Prints the largest error of each in units of the sum of the products' magnitudes, and
// exits with 1 where a bound does not hold. tests/native/test_matmul.py compiles and runs it.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/isa.h"
#include "cpu/row_norm.h"

namespace starflow::STARFLOW_ISA {
namespace {

struct Problem {
    int64_t rows, columns, depth;
    std::vector<float> x, w;
};

uint32_t state = 1;
float draw() {
    state = state * 1664525U + 1013904223U;
    return static_cast<float>(static_cast<int32_t>(state)) / 2147483648.0F;
}

float rounded(float value) {
    BFloat16 half;
    alignas(64) float in[16] = {value};
    alignas(64) BFloat16 out[16];
    for (int i = 0; i < 16; i += Vec<float>::lanes) store(out + i, load(in + i, AllLanes{}), AllLanes{});
    half = out[0];
    return bits_as<float>(static_cast<uint32_t>(half.bits) << 16);
}

uint16_t bits_of(float bfloat) { return static_cast<uint16_t>(bits_as<uint32_t>(bfloat) >> 16); }

// Panels as csrc/cpu/panels.h describes them, element by element, and what they hold.
std::vector<char> pack(const Problem& problem, MatrixStorage storage, std::vector<double>& held) {
    const Panels shape{nullptr, nullptr, nullptr, problem.columns, problem.depth, storage};
    // Memory behind the panels is prefetched and must not be read.
    std::vector<char> bytes(static_cast<size_t>(shape.count() * shape.panel_bytes()) + 1);
    held.resize(static_cast<size_t>(problem.columns * problem.depth));
    for (int64_t n = 0; n < problem.columns; ++n) {
        for (int64_t k = 0; k < problem.depth; ++k) {
            const float weight = problem.w[static_cast<size_t>(n * problem.depth + k)];
            char* panel = bytes.data() + n / panel_columns * shape.panel_bytes();
            const int64_t column = n % panel_columns;
            double& value = held[static_cast<size_t>(n * problem.depth + k)];
            if (storage == MatrixStorage::float32) {
                std::memcpy(panel + (k * panel_columns + column) * 4, &weight, 4);
                value = weight;
                continue;
            }
            const float high = rounded(weight);
            const float low = storage == MatrixStorage::two_bfloat16 ? rounded(weight - high) : 0.0F;
            const int64_t at = (k / 2 * panel_columns * 2 + column * 2 + k % 2) * 2;
            const uint16_t high_bits = bits_of(high);
            const uint16_t low_bits = bits_of(low);
            std::memcpy(panel + at, &high_bits, 2);
            if (storage == MatrixStorage::two_bfloat16) {
                std::memcpy(panel + shape.padded_depth() * panel_columns * 2 + at, &low_bits, 2);
            }
            value = static_cast<double>(high) + low;
        }
    }
    return bytes;
}

template <class Product>
std::vector<float> multiply(const Problem& problem, const std::vector<char>& panels, MatrixStorage storage, int64_t first_row,
                            int64_t rows) {
    const Panels weights{panels.data(), nullptr, nullptr, problem.columns, problem.depth, storage};
    auto* memory = static_cast<char*>(
        std::aligned_alloc(64, static_cast<size_t>(round_up(packed_bytes(rows, problem.depth), 64))));
    // What was not written must not count.
    std::memset(memory, 0xff, static_cast<size_t>(packed_bytes(rows, problem.depth)));
    const PackedRows packed = packed_rows<Product>(memory, rows, problem.depth);
    const RowNorm norm{NormKind::none, nullptr, nullptr, 0.0F};
    pack_normalised_rows<Product>(packed, problem.depth, norm,
                                  [&](int64_t r) { return problem.x.data() + (first_row + r) * problem.depth; });
    std::vector<float> out(static_cast<size_t>(rows * problem.columns));
    std::vector<float> sums(static_cast<size_t>(sums_bytes(rows) / 4), std::numeric_limits<float>::quiet_NaN());
    multiply_panels<Product>(packed, weights, 0, weights.count(), sums.data(), [&](int64_t p, const float* sum) {
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t c = 0; c < panel_columns && p * panel_columns + c < problem.columns; ++c) {
                out[static_cast<size_t>(r * problem.columns + p * panel_columns + c)] = sum[r * panel_columns + c];
            }
        }
    });
    std::free(memory);
    return out;
}

// The largest error, relative to the sum of magnitudes; infinity where a row depends on the rows beside it.
double error_of(const Problem& problem, MatrixStorage storage, ProductInput product_input) {
    std::vector<double> held;
    const std::vector<char> panels = pack(problem, storage, held);
    double worst = 0.0;
    visit_product(storage, product_input, [&](auto product) {
        using Product = decltype(product);
        const std::vector<float> out = multiply<Product>(problem, panels, storage, 0, problem.rows);
        for (int64_t r = 0; r < problem.rows; ++r) {
            for (int64_t n = 0; n < problem.columns; ++n) {
                double exact = 0.0;
                double size = 1e-30;
                for (int64_t k = 0; k < problem.depth; ++k) {
                    const double term = static_cast<double>(problem.x[static_cast<size_t>(r * problem.depth + k)]) *
                                        held[static_cast<size_t>(n * problem.depth + k)];
                    exact += term;
                    size += std::fabs(term);
                }
                const double error = std::fabs(out[static_cast<size_t>(r * problem.columns + n)] - exact) / size;
                worst = error <= worst ? worst : error;  // a NaN is the worst
            }
        }
        for (const int64_t row : {int64_t{0}, problem.rows / 2, problem.rows - 1}) {
            const std::vector<float> alone = multiply<Product>(problem, panels, storage, row, 1);
            if (std::memcmp(alone.data(), out.data() + row * problem.columns,
                            static_cast<size_t>(problem.columns) * sizeof(float)) != 0) {
                worst = std::numeric_limits<double>::infinity();
            }
        }
    });
    return worst;
}

struct Case {
    const char* name;
    MatrixStorage storage;
    ProductInput product_input;
    double bound;
};

int run() {
    // Rounding a factor to bfloat16 is 2^-9 of it, to two of them 2^-17; the product of two small terms is 2^-16.
    const Case cases[] = {
        {"float32", MatrixStorage::float32, ProductInput::float32, 1e-6},
        {"bfloat16 float32", MatrixStorage::bfloat16, ProductInput::float32, 1e-6},
        {"bfloat16 bfloat16", MatrixStorage::bfloat16, ProductInput::bfloat16, 4e-3},
        {"bfloat16 two_bfloat16", MatrixStorage::bfloat16, ProductInput::two_bfloat16, 1e-5},
        {"two_bfloat16 float32", MatrixStorage::two_bfloat16, ProductInput::float32, 1e-6},
        {"two_bfloat16 two_bfloat16", MatrixStorage::two_bfloat16, ProductInput::two_bfloat16, 3e-5},
    };
    const int64_t shapes[][3] = {{1, 1, 1},    {1, 32, 32},  {2, 33, 31},  {15, 31, 33},  {16, 32, 64},  {17, 40, 65},
                                 {31, 64, 96}, {33, 70, 40}, {47, 32, 32}, {49, 64, 513}, {65, 33, 600}, {5, 64, 300}};
    int failed = 0;
    for (const Case& item : cases) {
        double worst = 0.0;
        for (const auto& shape : shapes) {
            Problem problem{shape[0], shape[1], shape[2], {}, {}};
            for (int64_t i = 0; i < problem.rows * problem.depth; ++i) problem.x.push_back(draw());
            for (int64_t i = 0; i < problem.columns * problem.depth; ++i) problem.w.push_back(draw());
            const double error = error_of(problem, item.storage, item.product_input);
            if (!(error <= item.bound)) {
                std::printf("%s: rows %d columns %d depth %d: error %g, expected at most %g\n", item.name,
                            static_cast<int>(shape[0]), static_cast<int>(shape[1]), static_cast<int>(shape[2]), error,
                            item.bound);
                failed = 1;
            }
            worst = error <= worst ? worst : error;
        }
        std::printf("%s: %g\n", item.name, worst);
    }
    return failed;
}

}  // namespace
}  // namespace starflow::STARFLOW_ISA

int main() {
#if defined(__AMX_BF16__)
    // Asks the operating system for the tiles.
    const std::string& refused = starflow::cpu::why_not(starflow::cpu::Isa::amx);
    if (!refused.empty()) {
        std::printf("%s\n", refused.c_str());
        return 1;
    }
#endif
    return starflow::STARFLOW_ISA::run();
}
