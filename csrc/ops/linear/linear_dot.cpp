// Products of rows with packed panels and what follows them; the formula and the bytes are in linear.h, the products in
// csrc/cpu/matmul.h. Compiled once for each ISA.
#include "ops/linear/linear.h"

#include "common/visit.h"
#include "cpu/row_norm.h"

namespace starflow::STARFLOW_ISA {
namespace {

template <class Lanes>
Vec<float> load_from(const Matrix& matrix, int64_t row, int64_t c, Lanes lanes) {
    const int64_t at = row * matrix.row_stride + c;
    switch (matrix.dtype) {
        case Dtype::bfloat16:
            return load(static_cast<const BFloat16*>(matrix.data) + at, lanes);
        case Dtype::float16:
            return load(static_cast<const Float16*>(matrix.data) + at, lanes);
        default:
            return load(static_cast<const float*>(matrix.data) + at, lanes);
    }
}

template <class Lanes>
void store_to(const Matrix& matrix, int64_t row, int64_t c, Vec<float> value, Lanes lanes) {
    const int64_t at = row * matrix.row_stride + c;
    switch (matrix.dtype) {
        case Dtype::bfloat16:
            return store(static_cast<BFloat16*>(matrix.data) + at, value, lanes);
        case Dtype::float16:
            return store(static_cast<Float16*>(matrix.data) + at, value, lanes);
        default:
            return store(static_cast<float*>(matrix.data) + at, value, lanes);
    }
}

// What follows the product, for columns [c, c + lanes) of a row; `plain` is a bias alone.
template <bool plain, class Lanes>
inline Vec<float> finished(const LinearArgs& args, int64_t row, int64_t c, Vec<float> sum, Lanes lanes) {
    if (!plain && args.weights.column_scale != nullptr) sum = sum * load(args.weights.column_scale + c, lanes);
    if (args.weights.bias != nullptr) sum = sum + load(args.weights.bias + c, lanes);
    if constexpr (plain) return sum;
    if (args.product.data != nullptr) store_to(args.product, row, c, sum, lanes);
    if (args.epilogue == Epilogue::gelu) sum = gelu(sum);
    if (args.epilogue == Epilogue::gelu_tanh) sum = gelu_tanh(sum);
    if (args.epilogue == Epilogue::silu) sum = silu(sum);
    if (args.multiply.data != nullptr) sum = sum * load_from(args.multiply, row, c, lanes);
    if (args.residual.data != nullptr) sum = sum + load_from(args.residual, row, c, lanes);
    return sum;
}

// Rows [first, first + count) from the sums of a panel.
template <class Out, bool plain>
void finish_rows(const LinearArgs& args, int64_t first, int64_t count, int64_t panel, const float* sums) {
    using V = Vec<float>;
    const int64_t begin = panel * panel_columns;
    const int64_t width = args.weights.columns - begin < panel_columns ? args.weights.columns - begin : panel_columns;
    for (int64_t r = 0; r < count; ++r) {
        const float* sum = sums + r * panel_columns;
        Out* out = static_cast<Out*>(args.out.data) + (first + r) * args.out.row_stride + begin;
        over_channels<V>(width, [&](int64_t c, auto lanes) {
            store(out + c, finished<plain>(args, first + r, begin + c, load(sum + c, AllLanes{}), lanes), lanes);
        });
    }
}

void finish_panel(const LinearArgs& args, int64_t first, int64_t count, int64_t panel, const float* sums) {
    // The checks that `plain` spares each register take a twelfth of a call of linear where the depth is 256.
    const bool plain = args.weights.column_scale == nullptr && args.product.data == nullptr &&
                       args.epilogue == Epilogue::none && args.multiply.data == nullptr &&
                       args.residual.data == nullptr;
    const auto run = [&](auto out) {
        using Out = typename decltype(out)::type;
        plain ? finish_rows<Out, true>(args, first, count, panel, sums)
              : finish_rows<Out, false>(args, first, count, panel, sums);
    };
    switch (args.out.dtype) {
        case Dtype::bfloat16:
            return run(Type<BFloat16>{});
        case Dtype::float16:
            return run(Type<Float16>{});
        default:
            return run(Type<float>{});
    }
}

template <class Product, class T>
void pack_rows(const PackedRows& packed, const LinearArgs& args, int64_t first) {
    const T* x = static_cast<const T*>(args.x.data);
    pack_normalised_rows<Product>(packed, args.weights.depth, args.norm,
                                  [&](int64_t r) { return x + (first + r) * args.x.row_stride; });
}

int64_t scratch_bytes(const LinearArgs& args) {
    return sums_bytes(args.row_block) + packed_bytes(args.row_block, args.weights.depth);
}

void multiply(const LinearArgs& args, int64_t begin, int64_t end, void* scratch) {
    auto* sums = static_cast<float*>(scratch);
    char* rows = static_cast<char*>(scratch) + sums_bytes(args.row_block);
    const int64_t panels = args.weights.count();
    visit_product(args.weights.storage, args.product_input, [&](auto product) {
        using Product = decltype(product);
        while (begin < end) {
            const int64_t first_row = begin / panels * args.row_block;
            const int64_t left = args.rows - first_row;
            const int64_t count = left < args.row_block ? left : args.row_block;
            const PackedRows packed = packed_rows<Product>(rows, count, args.weights.depth);
            switch (args.x.dtype) {
                case Dtype::bfloat16:
                    pack_rows<Product, BFloat16>(packed, args, first_row);
                    break;
                case Dtype::float16:
                    pack_rows<Product, Float16>(packed, args, first_row);
                    break;
                default:
                    pack_rows<Product, float>(packed, args, first_row);
            }
            const int64_t first = begin % panels;
            const int64_t last = first + end - begin < panels ? first + end - begin : panels;
            multiply_panels<Product>(packed, args.weights, first, last, sums, [&](int64_t panel, const float* sum) {
                finish_panel(args, first_row, count, panel, sum);
            });
            begin += last - first;
        }
    });
}

}  // namespace

const LinearKernels linear{scratch_bytes, multiply};

}  // namespace starflow::STARFLOW_ISA
