// Schema and checks; formula and phases are in jacobi_sweep.h.
#include "ops/jacobi_sweep/jacobi_sweep.h"

#include "common/check.h"
#include "ops/jacobi_common/sweep_block.h"

namespace starflow {
namespace {

constexpr const char* op = "jacobi_sweep";

const int64_t* numbers(const char* name, const Tensor& tensor, int64_t count) {
    require(
        tensor.scalar_type() == ScalarType::Long && tensor.dim() == 1 && tensor.size(0) == count && tensor.is_cpu() &&
            tensor.is_contiguous(),
        op, std::string(name) + " has shape",
        [&] { return shape_text(shape_of(tensor)) + " and dtype " + dtype_text(tensor); },
        [&] { return shape_text({count}) + " int64 on cpu: one number a cache row"; });
    return static_cast<const int64_t*>(tensor.data_ptr());
}

Tensor run(const Tensor& keys, const Tensor& values, const Tensor& rows, const Tensor& start, const Tensor& keep,
           const std::vector<Tensor>& weights, const std::vector<int64_t>& sizes, const std::string& activations,
           bool text) {
    const Block block(op, {keys, values, weights, sizes, activations});
    const SweepBlock& b = block.args();
    const int64_t depth = text ? b.width : b.channels;
    require(
        rows.scalar_type() == ScalarType::Float && rows.dim() == 3 && rows.size(0) == b.cache_rows &&
            rows.size(2) == depth && rows.is_cpu() && rows.is_contiguous(),
        op, "rows has shape", [&] { return shape_text(shape_of(rows)) + " and dtype " + dtype_text(rows); },
        [&] {
            return "(" + std::to_string(b.cache_rows) + ", tokens, " + std::to_string(depth) +
                   "), float32, contiguous, on cpu";
        });
    const int64_t tokens = rows.size(1);
    const int64_t* first = numbers("start", start, b.cache_rows);
    const int64_t* kept = numbers("keep", keep, b.cache_rows);
    std::vector<SweepWindow> windows;
    for (int64_t row = 0; row < b.cache_rows; ++row) {
        require(
            first[row] >= 0 && first[row] + tokens <= b.slots, op, "start holds",
            [&] { return std::to_string(first[row]); },
            [&] {
                return "slots from 0 to " + std::to_string(b.slots - tokens) + " for " + std::to_string(tokens) +
                       " tokens: the caches have " + std::to_string(b.slots) + " slots, " +
                       std::to_string(first[row] + tokens) + " are needed";
            });
        windows.push_back({row, first[row], tokens, kept[row], 0});
    }
    const Tensor raw =
        empty_like_shape(rows, {b.cache_rows, text ? 0 : tokens, block.out_channels()}, ScalarType::Float);
    Sweeper sweeper(b, sweep_kernels(), {torch_threads(), run_on_torch_threads}, b.cache_rows * tokens);
    const auto* data = static_cast<const float*>(rows.data_ptr());
    sweeper.sweep(windows, text ? nullptr : data, text ? data : nullptr,
                  text ? nullptr : static_cast<float*>(raw.data_ptr()));
    return raw;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(starflow_ext, m) {
    m.def(
        "jacobi_sweep(Tensor(a!) keys, Tensor(b!) values, Tensor rows, Tensor start, Tensor keep, Tensor[] weights, "
        "int[] sizes, str activations, bool text) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(starflow_ext, CPU, m) { m.impl("jacobi_sweep", TORCH_BOX(&run)); }

}  // namespace starflow
