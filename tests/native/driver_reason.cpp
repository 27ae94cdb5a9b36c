// What csrc/cuda/runtime.h says of a driver and a runtime of some versions, a line each.
#include "cuda/runtime.h"

#include <iostream>

int main() {
    constexpr int versions[][2] = {{0, 13000}, {12080, 13000}, {13000, 13000}, {13010, 13000}, {13000, 13020}};
    for (const auto& [driver, runtime] : versions) {
        std::cout << starflow::cuda::driver_reason(driver, runtime) << '\n';
    }
}
