// CuTe's wgmma on the emulated device: the hardware's atoms are renamed away.
#pragma once
#include <cuda_runtime.h>

#define MMA_64x16x16_F32BF16BF16_SS MMA_64x16x16_F32BF16BF16_SS_of_hardware
#define MMA_64x16x16_F32F16F16_SS MMA_64x16x16_F32F16F16_SS_of_hardware
#define MMA_64x32x16_F32BF16BF16_SS MMA_64x32x16_F32BF16BF16_SS_of_hardware
#define MMA_64x32x16_F32F16F16_SS MMA_64x32x16_F32F16F16_SS_of_hardware
#define MMA_64x64x16_F32BF16BF16_SS MMA_64x64x16_F32BF16BF16_SS_of_hardware
#define MMA_64x64x16_F32F16F16_SS MMA_64x64x16_F32F16F16_SS_of_hardware
#define MMA_64x128x16_F32BF16BF16_SS MMA_64x128x16_F32BF16BF16_SS_of_hardware
#define MMA_64x128x16_F32F16F16_SS MMA_64x128x16_F32F16F16_SS_of_hardware
#define MMA_64x64x16_F32BF16BF16_RS MMA_64x64x16_F32BF16BF16_RS_of_hardware
#define MMA_64x64x16_F32F16F16_RS MMA_64x64x16_F32F16F16_RS_of_hardware
#define MMA_64x128x16_F32BF16BF16_RS MMA_64x128x16_F32BF16BF16_RS_of_hardware
#define MMA_64x128x16_F32F16F16_RS MMA_64x128x16_F32F16F16_RS_of_hardware
#define warpgroup_arrive warpgroup_arrive_of_hardware
#define warpgroup_wait warpgroup_wait_of_hardware
#define warpgroup_commit_batch warpgroup_commit_batch_of_hardware
#include_next <cute/arch/mma_sm90_gmma.hpp>
#undef MMA_64x16x16_F32BF16BF16_SS
#undef MMA_64x16x16_F32F16F16_SS
#undef MMA_64x32x16_F32BF16BF16_SS
#undef MMA_64x32x16_F32F16F16_SS
#undef MMA_64x64x16_F32BF16BF16_SS
#undef MMA_64x64x16_F32F16F16_SS
#undef MMA_64x128x16_F32BF16BF16_SS
#undef MMA_64x128x16_F32F16F16_SS
#undef MMA_64x64x16_F32BF16BF16_RS
#undef MMA_64x64x16_F32F16F16_RS
#undef MMA_64x128x16_F32BF16BF16_RS
#undef MMA_64x128x16_F32F16F16_RS
#undef warpgroup_arrive
#undef warpgroup_wait
#undef warpgroup_commit_batch

namespace cute {

inline void warpgroup_arrive() { emulation::fence_products(); }
inline void warpgroup_commit_batch() { emulation::commit_products(); }
template <int pending>
void warpgroup_wait() {
    emulation::wait_for_products(pending);
}

namespace SM90::GMMA {

// CuTe calls fma with what it has of a (a descriptor, or four registers), of b, the sums and the scale of the sums: an
// object, so that there is one for every number of sums.
template <emulation::Format format, int columns, bool registers, Major left, Major right>
struct EmulatedGroupProduct {
    using DRegisters = void;
    using ARegisters = std::conditional_t<registers, uint32_t[4], uint64_t[1]>;
    using BRegisters = uint64_t[1];
    using CRegisters = float[columns / 2];

    struct Multiply {
        template <class... Arguments>
        void operator()(Arguments&&... arguments) const {
            run(std::forward_as_tuple(arguments...), std::make_index_sequence<columns / 2>{});
        }

      private:
        template <class All, size_t... sum>
        static void run(const All& all, std::index_sequence<sum...>) {
            constexpr size_t operands = registers ? 4 : 1;
            static_assert(std::tuple_size_v<All> == operands + 1 + columns / 2 + 1);
            const uint32_t* places[4] = {};
            uint64_t descriptor = 0;
            if constexpr (registers) {
                places[0] = &std::get<0>(all);
                places[1] = &std::get<1>(all);
                places[2] = &std::get<2>(all);
                places[3] = &std::get<3>(all);
            } else {
                descriptor = std::get<0>(all);
            }
            float* sums[] = {&std::get<operands + 1 + sum>(all)...};
            emulation::multiply_group({format, columns, registers, left == Major::MN, right == Major::MN,
                                       std::get<operands + 1 + columns / 2>(all) == ScaleOut::One, descriptor,
                                       static_cast<uint64_t>(std::get<operands>(all)), places, sums});
        }
    };
    static constexpr Multiply fma{};
};

template <Major left, Major right, ScaleIn = ScaleIn::One, ScaleIn = ScaleIn::One>
struct MMA_64x16x16_F32BF16BF16_SS : EmulatedGroupProduct<emulation::Format::bfloat16, 16, false, left, right> {};
template <Major left, Major right, ScaleIn = ScaleIn::One, ScaleIn = ScaleIn::One>
struct MMA_64x16x16_F32F16F16_SS : EmulatedGroupProduct<emulation::Format::float16, 16, false, left, right> {};
template <Major left, Major right, ScaleIn = ScaleIn::One, ScaleIn = ScaleIn::One>
struct MMA_64x32x16_F32BF16BF16_SS : EmulatedGroupProduct<emulation::Format::bfloat16, 32, false, left, right> {};
template <Major left, Major right, ScaleIn = ScaleIn::One, ScaleIn = ScaleIn::One>
struct MMA_64x32x16_F32F16F16_SS : EmulatedGroupProduct<emulation::Format::float16, 32, false, left, right> {};
template <Major left, Major right, ScaleIn = ScaleIn::One, ScaleIn = ScaleIn::One>
struct MMA_64x64x16_F32BF16BF16_SS : EmulatedGroupProduct<emulation::Format::bfloat16, 64, false, left, right> {};
template <Major left, Major right, ScaleIn = ScaleIn::One, ScaleIn = ScaleIn::One>
struct MMA_64x64x16_F32F16F16_SS : EmulatedGroupProduct<emulation::Format::float16, 64, false, left, right> {};
template <Major left, Major right, ScaleIn = ScaleIn::One, ScaleIn = ScaleIn::One>
struct MMA_64x128x16_F32BF16BF16_SS : EmulatedGroupProduct<emulation::Format::bfloat16, 128, false, left, right> {};
template <Major left, Major right, ScaleIn = ScaleIn::One, ScaleIn = ScaleIn::One>
struct MMA_64x128x16_F32F16F16_SS : EmulatedGroupProduct<emulation::Format::float16, 128, false, left, right> {};
template <Major left, Major right, ScaleIn = ScaleIn::One, ScaleIn = ScaleIn::One>
struct MMA_64x64x16_F32BF16BF16_RS : EmulatedGroupProduct<emulation::Format::bfloat16, 64, true, left, right> {};
template <Major left, Major right, ScaleIn = ScaleIn::One, ScaleIn = ScaleIn::One>
struct MMA_64x64x16_F32F16F16_RS : EmulatedGroupProduct<emulation::Format::float16, 64, true, left, right> {};
template <Major left, Major right, ScaleIn = ScaleIn::One, ScaleIn = ScaleIn::One>
struct MMA_64x128x16_F32BF16BF16_RS : EmulatedGroupProduct<emulation::Format::bfloat16, 128, true, left, right> {};
template <Major left, Major right, ScaleIn = ScaleIn::One, ScaleIn = ScaleIn::One>
struct MMA_64x128x16_F32F16F16_RS : EmulatedGroupProduct<emulation::Format::float16, 128, true, left, right> {};

}  // namespace SM90::GMMA
}  // namespace cute
