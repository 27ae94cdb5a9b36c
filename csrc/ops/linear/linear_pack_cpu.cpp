// Packing a weight on the CPU; the layout is in csrc/cpu/panels.h. Compiled once for each ISA.
#include "ops/linear/linear_pack.h"

#include "cpu/vec.h"

namespace starflow::STARFLOW_ISA {
namespace {

// A step is 16 deep: 16 rows of a panel fit in the first-level cache beside the 32 rows that they come from.
inline constexpr int step_depth = 16;
inline constexpr int columns = static_cast<int>(panel_columns);
inline constexpr float infinity = __builtin_inff();

struct Step {
    alignas(64) float rows[columns][step_depth];  // as the weight has it
    alignas(64) float turned[step_depth][columns];
};

// Zeros behind the weight, to the right and below.
template <class T>
void read_step(const LinearPackArgs& args, int64_t first_row, int64_t k, Step& step) {
    using V = Vec<float>;
    for (int c = 0; c < columns; ++c) {
        const int64_t row = first_row + c;
        const T* from = static_cast<const T*>(args.weight) + row * args.row_stride;
        for (int i = 0; i < step_depth; i += V::lanes) {
            const int64_t left = row < args.out_channels ? args.in_channels - k - i : 0;
            V value(0.0F);
            if (left >= V::lanes) {
                value = load(from + k + i, AllLanes{});
            } else if (left > 0) {
                const FirstLanes lanes{static_cast<int>(left)};
                value = keep(load(from + k + i, lanes), lanes, 0.0F);
            }
            store(&step.rows[c][i], value, AllLanes{});
        }
    }
}

void turn(Step& step) {
    for (int k = 0; k < step_depth; ++k) {
        for (int c = 0; c < columns; ++c) step.turned[k][c] = step.rows[c][k];
    }
}

template <class T>
void write_rows(const Step& step, T* to) {
    using V = Vec<float>;
    for (int k = 0; k < step_depth; ++k) {
        for (int c = 0; c < columns; c += V::lanes) {
            store(to + k * columns + c, load(&step.turned[k][c], AllLanes{}), AllLanes{});
        }
    }
}

void write_scaled(const Step& step, const float* inverse, int8_t* to) {
    using V = Vec<float>;
    for (int k = 0; k < step_depth; ++k) {
        alignas(64) float whole[columns];
        for (int c = 0; c < columns; c += V::lanes) {
            const V scaled = load(&step.turned[k][c], AllLanes{}) * load(inverse + c, AllLanes{});
            store(whole + c, round_to_integer(clamp(scaled, V(-127.0F), V(127.0F))), AllLanes{});
        }
        for (int c = 0; c < columns; ++c) to[k * columns + c] = static_cast<int8_t>(whole[c]);
    }
}

// Two neighbours along the depth side by side; `rest` gets what rounding left.
void write_pairs(Step& step, BFloat16* to, BFloat16* rest) {
    using V = Vec<float>;
    for (int k = 0; k < step_depth; k += 2) {
        alignas(64) BFloat16 rounded[2][columns];
        alignas(64) BFloat16 left[2][columns];
        for (int i = 0; i < 2; ++i) {
            for (int c = 0; c < columns; c += V::lanes) {
                const V weight = load(&step.turned[k + i][c], AllLanes{});
                store(&rounded[i][c], weight, AllLanes{});
                const V high = load(&rounded[i][c], AllLanes{});
                // The rest of infinity and of NaN is zero, so that both stay what they are.
                const V difference = select_greater(V(infinity), absolute(high), weight - high, V(0.0F));
                if (rest != nullptr) store(&left[i][c], difference, AllLanes{});
            }
        }
        for (int c = 0; c < columns; ++c) {
            for (int i = 0; i < 2; ++i) {
                to[k * columns + 2 * c + i] = rounded[i][c];
                if (rest != nullptr) rest[k * columns + 2 * c + i] = left[i][c];
            }
        }
    }
}

// Largest magnitude of a row; a NaN is the largest.
template <class T>
float largest_of_row(const T* row, int64_t channels) {
    using V = Vec<float>;
    V most(0.0F);
    int64_t k = 0;
    for (; k + V::lanes <= channels; k += V::lanes) most = maximum_magnitude(most, absolute(load(row + k, AllLanes{})));
    if (k < channels) {
        const FirstLanes lanes{static_cast<int>(channels - k)};
        most = maximum_magnitude(most, absolute(keep(load(row + k, lanes), lanes, 0.0F)));
    }
    return largest_magnitude(most);
}

// False where a row is not finite: the entry refuses the weight.
template <class T>
bool find_scales(const LinearPackArgs& args, int64_t first_row, float* inverse) {
    bool finite = true;
    for (int64_t c = 0; c < columns && first_row + c < args.out_channels; ++c) {
        const T* row = static_cast<const T*>(args.weight) + (first_row + c) * args.row_stride;
        const float most = largest_of_row(row, args.in_channels);
        finite = finite && most < infinity;
        args.column_scale[first_row + c] = most / 127.0F;
        // The inverse of a smaller maximum would be infinite: such a row is packed as zero.
        inverse[c] = most > 1e-35F ? 127.0F / most : 0.0F;
    }
    return finite;
}

template <class T>
void pack_panels(const LinearPackArgs& args, int64_t first, int64_t last) {
    const int64_t depth = round_up(args.in_channels, depth_multiple);
    const int64_t elements = depth * panel_columns;
    Step step;
    for (int64_t p = first; p < last; ++p) {
        const int64_t first_row = p * panel_columns;
        alignas(64) float inverse[columns] = {};
        if (args.storage == MatrixStorage::int8 && !find_scales<T>(args, first_row, inverse)) continue;
        char* panel = static_cast<char*>(args.panels) + p * elements * storage_bytes(args.storage);
        for (int64_t k = 0; k < depth; k += step_depth) {
            read_step<T>(args, first_row, k, step);
            turn(step);
            const int64_t at = k * panel_columns;
            switch (args.storage) {
                case MatrixStorage::float32:
                    write_rows(step, reinterpret_cast<float*>(panel) + at);
                    break;
                case MatrixStorage::float16:
                    write_rows(step, reinterpret_cast<Float16*>(panel) + at);
                    break;
                case MatrixStorage::int8:
                    write_scaled(step, inverse, reinterpret_cast<int8_t*>(panel) + at);
                    break;
                case MatrixStorage::bfloat16:
                    write_pairs(step, reinterpret_cast<BFloat16*>(panel) + at, nullptr);
                    break;
                case MatrixStorage::two_bfloat16: {
                    BFloat16* pairs = reinterpret_cast<BFloat16*>(panel) + at;
                    write_pairs(step, pairs, pairs + elements);
                    break;
                }
            }
        }
    }
}

void pack(const LinearPackArgs& args, int64_t first, int64_t last) {
    switch (args.dtype) {
        case Dtype::bfloat16:
            return pack_panels<BFloat16>(args, first, last);
        case Dtype::float16:
            return pack_panels<Float16>(args, first, last);
        default:
            return pack_panels<float>(args, first, last);
    }
}

}  // namespace

const LinearPackKernels linear_pack{pack};

}  // namespace starflow::STARFLOW_ISA
