// Schema and checks; formula and phases are in jacobi_sweep.h.
#include "ops/jacobi_sweep/jacobi_sweep.h"

#include "common/devices.h"
#include "ops/jacobi_sweep/jacobi_sweep_cuda.h"
#include "ops/jacobi_sweep/sweep_block.h"

namespace starflow {
namespace {

constexpr const char* op = "jacobi_sweep";

// One number for each cache row, in memory of the host. The numbers are checked there, so with a CUDA device too they
// are best given there: otherwise the host waits for the stream.
Tensor numbers(const char* name, const Tensor& tensor, const SweepBlock& block, const Tensor& keys) {
    require(
        tensor.scalar_type() == ScalarType::Long && shape_of(tensor) == std::vector<int64_t>{block.cache_rows} &&
            (tensor.is_cpu() || same_device(tensor, keys)),
        op, named(name, " has shape"),
        [&] { return shape_text(shape_of(tensor)) + " and dtype " + dtype_text(tensor); },
        [&] {
            return shape_text({block.cache_rows}) + " int64 on cpu" +
                   (keys.is_cpu() ? "" : " or " + device_text(keys)) + ": one number a cache row";
        });
    return torch::stable::contiguous(on_host(tensor));
}

void run_cpu(const Block& block, const Tensor& rows, const int64_t* start, const int64_t* keep, bool text, float* raw) {
    const SweepBlock& b = block.args();
    const int64_t tokens = rows.size(1);
    std::vector<SweepWindow> windows;
    windows.reserve(b.cache_rows);
    for (int64_t row = 0; row < b.cache_rows; ++row) windows.push_back({row, start[row], tokens, keep[row], 0});
    const int64_t together = b.whole_frames ? tokens : b.cache_rows * tokens;
    Sweeper sweeper(b, sweep_kernels(), {torch_threads(), run_on_torch_threads}, together);
    const auto* data = static_cast<const float*>(rows.data_ptr());
    sweeper.sweep(windows, text ? nullptr : data, text ? data : nullptr, raw);
}

void run_cuda(const Block& block, const Tensor& rows, const Tensor& start, const Tensor& keep, bool text, float* raw) {
    const torch::stable::Device device(torch::stable::DeviceType::CUDA, rows.get_device_index());
    const Tensor slots = torch::stable::to(start, device);
    const Tensor kept = torch::stable::to(keep, device);
    SweepCudaArgs args{};
    args.block = block.args();
    args.device = cuda_device(rows);
    args.most_rows = sweep_most_rows;
    args.tokens = rows.size(1);
    args.source = rows_of(rows);
    args.samples = args.block.cache_rows;
    args.embedded = text;
    args.slots = static_cast<const int64_t*>(slots.data_ptr());
    args.keep = static_cast<const int64_t*>(kept.data_ptr());
    args.raw = raw;
    cuda::launch_in_workspace(op, rows, args, jacobi_sweep_cuda);
}

Tensor run(const Tensor& keys, const Tensor& values, const Tensor& rows, const Tensor& start, const Tensor& keep,
           const std::vector<Tensor>& weights, const std::vector<int64_t>& sizes, int64_t product_input, bool text) {
    const Block block(op, {keys, values, weights, sizes, product_input});
    const SweepBlock& b = block.args();
    const int64_t depth = text ? b.width : b.channels;
    require(
        rows.scalar_type() == ScalarType::Float && rows.dim() == 3 && rows.size(0) == b.cache_rows &&
            rows.size(2) == depth && same_device(rows, keys) && rows.is_contiguous(),
        op, "rows has shape", [&] { return shape_text(shape_of(rows)) + " and dtype " + dtype_text(rows); },
        [&] {
            return "(" + std::to_string(b.cache_rows) + ", tokens, " + std::to_string(depth) +
                   "), float32, contiguous, on " + device_text(keys);
        });
    if (rows.is_cuda()) cuda::refuse_capture(op, rows, "slots are checked by the host");
    const int64_t tokens = rows.size(1);
    const Tensor slots = numbers("start", start, b, keys);
    const Tensor kept = numbers("keep", keep, b, keys);
    const auto* first = static_cast<const int64_t*>(slots.data_ptr());
    for (int64_t row = 0; row < b.cache_rows; ++row) {
        require(
            first[row] >= 0 && first[row] <= b.slots - tokens, op, "start holds",
            [&] { return std::to_string(first[row]); },
            [&] {
                return "slots from 0 to " + std::to_string(b.slots - tokens) + " for " + std::to_string(tokens) +
                       " tokens: the caches have " + std::to_string(b.slots) + " slots, " +
                       sum_text(first[row], tokens) + " are needed";
            });
        // Of a frame that is there in part, slots would see others that are not written yet.
        const auto between = [&](int64_t slot) { return slot == b.slots || slot % b.mask_frame_tokens == 0; };
        require(
            !b.whole_frames || (between(first[row]) && between(first[row] + tokens)), op, "start holds",
            [&] { return std::to_string(first[row]) + " for " + std::to_string(tokens) + " tokens"; },
            [&] { return "whole frames of " + std::to_string(b.mask_frame_tokens) + " tokens (whole_frames)"; });
    }
    const Tensor raw =
        empty_like_shape(rows, {b.cache_rows, text ? 0 : tokens, block.out_channels()}, ScalarType::Float);
    float* out = text ? nullptr : static_cast<float*>(raw.data_ptr());
    if (tokens == 0) return raw;
    if (rows.is_cuda()) {
        run_cuda(block, rows, slots, kept, text, out);
    } else {
        run_cpu(block, rows, first, static_cast<const int64_t*>(kept.data_ptr()), text, out);
    }
    return raw;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(starflow_ext, m) {
    m.def(
        "jacobi_sweep(Tensor(a!) keys, Tensor(b!) values, Tensor rows, Tensor start, Tensor keep, Tensor[] weights, "
        "int[] sizes, int product_input, bool text) -> Tensor");
}

STARFLOW_IMPLEMENT(m) { m.impl("jacobi_sweep", TORCH_BOX(&run)); }

}  // namespace starflow
