// How the kernels around CUTLASS's collectives are launched: linear_sm90.cu and linear_sm100.cu, which have the same
// tiles.
#pragma once

#include <cute/tensor.hpp>

#include "cuda/enqueue.cuh"
#include "ops/linear/linear_copy.cuh"

namespace starflow {

// One launch of a kernel around the collective of a tile. The weight is CUTLASS's A, and x its B.
template <class Tile, class Kernel>
int run_collective(Kernel kernel, const LinearCudaArgs& args, void* stream) {
    using Collective = typename Tile::Collective;
    using Element = typename Tile::Element;
    const auto problem = cute::make_shape(static_cast<int>(args.call.weights.columns), static_cast<int>(args.call.rows),
                                          static_cast<int>(args.depth), 1);
    const typename Collective::Arguments arguments{static_cast<const Element*>(args.call.weights.data),
                                                   {args.depth, cute::_1{}, 0},
                                                   static_cast<const Element*>(args.input.data),
                                                   {args.input.row_stride, cute::_1{}, 0}};
    const auto params = Collective::to_underlying_arguments(problem, arguments, nullptr);
    return cuda::enqueue_early(args.early, kernel, cuda::linear_grid<Tile::all_threads>(args), dim3(Tile::all_threads),
                               sizeof(typename Tile::Shared), stream, args, params);
}

// Calls `run` with an object of the tile that the schedule asks for: rows, columns, groups of warps, stages. Of the
// tiles of 64 columns two blocks fit on a multiprocessor: stages of 10, 12, 16 and 24 KB.
template <template <class, int, int, int, int> class Tile, class Element, class Run>
int with_tile(const LinearSchedule& schedule, Run run) {
    switch (schedule.tile_rows) {
        case 16:
            return run(Tile<Element, 16, 64, 1, 8>{});
        case 32:
            return run(Tile<Element, 32, 64, 1, 8>{});
        case 64:
            return run(Tile<Element, 64, 64, 1, 6>{});
        default:
            return schedule.tile_columns == 64 ? run(Tile<Element, 128, 64, 1, 4>{})
                                               : run(Tile<Element, 128, 128, 2, 6>{});
    }
}

}  // namespace starflow
