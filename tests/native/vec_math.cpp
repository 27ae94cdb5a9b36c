// The functions of csrc/cpu/vec_math.h whose results are rounded to bfloat16 next, against float64 on dense grids, at
// the level that this file is compiled for. Prints the largest errors: of gelu, absolute, then relative where the
// result is above 0.01; of 2^x, relative; and how often NaN or a large number is lost.
#include <cmath>
#include <cstdio>

#include "cpu/vec.h"

namespace starflow::STARFLOW_ISA {
namespace {

template <class Function>
float at(float x, const Function& function) {
    float lanes[Vec<float>::lanes];
    store(lanes, function(Vec<float>(x)), AllLanes{});
    return lanes[0];
}

int run() {
    const auto gelu = [](Vec<float> x) { return coarse_gelu(x); };
    const auto power = [](Vec<float> x) { return coarse_power_of_two(x); };
    double absolute = 0.0;
    double relative = 0.0;
    double of_power = 0.0;
    // A NaN is larger than any error.
    const auto take = [](double& worst, double error) { worst = error <= worst ? worst : error; };
    for (int i = -40000; i <= 40000; ++i) {
        const float x = static_cast<float>(i) / 1000.0F;
        const double exact = 0.5 * x * std::erfc(-x / std::sqrt(2.0));
        const double error = std::fabs(at(x, gelu) - exact);
        take(absolute, error / (1.0 + std::fabs(exact)));
        if (std::fabs(exact) > 0.01) take(relative, error / std::fabs(exact));
    }
    for (int i = -125000; i <= 125000; ++i) {
        const float x = static_cast<float>(i) / 1000.0F;
        take(of_power, std::fabs(at(x, power) / std::exp2(static_cast<double>(x)) - 1.0));
    }
    const int lost =
        !std::isnan(at(NAN, gelu)) + !std::isnan(at(NAN, power)) + !(std::fabs(at(1e30F, gelu) / 1e30F - 1.0F) < 1e-6F);
    std::printf("%g %g %g %d\n", absolute, relative, of_power, lost);
    return 0;
}

}  // namespace
}  // namespace starflow::STARFLOW_ISA

int main() { return starflow::STARFLOW_ISA::run(); }
