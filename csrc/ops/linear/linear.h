// linear: out = residual + epilogue(norm(x) W^T + bias) * multiply, with W in packed panels (csrc/cpu/panels.h), or on
// CUDA in rows of bfloat16 or float16.
//
// x (rows, in_channels); W (out_channels, in_channels); multiply, residual, out (rows, out_channels). Sums, epilogue
// and norm are float32; x enters the product as `product_input` says, on CUDA rounded to the type of W.
// Memory: W once for each block of rows, x and out once. Up to a few hundred rows W is nearly all of it: 16 rows times
// 3072 x 3072 in bfloat16 read 19 MB for 0.3 GFLOP. On CUDA, x that is float32 or normalised is written and read once
// more, in 16 bits; and with few rows the sums of each part of the depth, in float32 (linear_schedule.h).
#pragma once
#include "common/dtype.h"
#include "cpu/norm_kind.h"
#include "cpu/panels.h"
#include "cpu/variants.h"
#include "cuda/declare.h"
#include "ops/linear/linear_schedule.h"
#include "ops/rope_append/rope_append.h"

namespace starflow {

enum class Epilogue : int32_t { none, gelu, gelu_tanh, silu };
inline constexpr const char* epilogue_names[]{"none", "gelu", "gelu_tanh", "silu"};

// Rows whose channels lie side by side; the stride in elements. An absent matrix has null data.
struct Matrix {
    void* data;
    int64_t row_stride;
    Dtype dtype;  // float32, bfloat16 or float16
};

struct LinearArgs {
    Panels weights;  // with its bias
    Matrix x;
    int64_t rows;
    RowNorm norm;
    ProductInput product_input;
    Epilogue epilogue;
    Matrix multiply;
    Matrix residual;
    Matrix out;
    Matrix product;     // gets x W^T + bias, for the gradient
    int64_t row_block;  // rows that pass over the panels together
};

// Items [begin, end): a block of rows times a panel, panels running fastest.
struct LinearKernels {
    int64_t (*scratch_bytes)(const LinearArgs& args);
    void (*multiply)(const LinearArgs& args, int64_t begin, int64_t end, void* scratch);
};

STARFLOW_DECLARE_DOT_VARIANTS(LinearKernels, linear)

// What multiplies on CUDA: the kernel for all architectures, the one for sm_90a, or the one for sm_100f
// (linear_choice.h).
enum class LinearKernel : int32_t { mma_sync, wgmma, tcgen05 };

// On CUDA `weights.data` is (out_channels, depth) of `input.dtype`, zero from weights.depth on.
struct LinearCudaArgs {
    LinearArgs call;
    Matrix input;   // what is multiplied: x, or the copy of it at the start of the workspace
    int64_t depth;  // a multiple of linear_row_multiple
    bool copied;
    bool wide_input;   // x and the parameters of its norm can be read 4 channels at a time
    bool wide_result;  // and all that the epilogue reads and writes, 4 columns at a time
    LinearKernel kernel;
    // One of a chain of launches: the counters are zero, and blocks of the product's own launch make the copy. Else up
    // to two launches in front of it do that.
    bool chained;
    bool early;  // and the launch may begin before the one in front of it has ended
    // The columns are heads of queries, keys and values: each is normalised, rotated and stored where `heads` says, as
    // by rope_append, in place of the epilogue. For sizes that takes_heads (linear_plan.h) allows.
    bool into_heads;
    RopeAppendArgs heads;
    LinearSchedule schedule;
    LinearWorkspace layout;
    int32_t* counters;
    void* workspace;
};

STARFLOW_DECLARE_CUDA(LinearCudaArgs, linear_cuda)
STARFLOW_DECLARE_SM90(LinearCudaArgs, linear_sm90_cuda)
STARFLOW_DECLARE_SM100(LinearCudaArgs, linear_sm100_cuda)

}  // namespace starflow
