#include "ops/linear/packed_weight.h"

namespace starflow {

std::string quoted(MatrixStorage storage) {
    return std::string("\"") + matrix_storage_names[static_cast<int>(storage)] + '"';
}

ScalarType panels_type(MatrixStorage storage) {
    switch (storage) {
        case MatrixStorage::float32:
            return ScalarType::Float;
        case MatrixStorage::float16:
            return ScalarType::Half;
        case MatrixStorage::int8:
            return ScalarType::Char;
        default:
            return ScalarType::BFloat16;
    }
}

std::vector<int64_t> panels_shape(MatrixStorage storage, int64_t out_channels, int64_t in_channels) {
    const int64_t count = round_up(out_channels, panel_columns) / panel_columns;
    const int64_t depth = round_up(in_channels, depth_multiple);
    switch (storage) {
        case MatrixStorage::bfloat16:
            return {count, depth / 2, panel_columns, 2};
        case MatrixStorage::two_bfloat16:
            return {count, 2, depth / 2, panel_columns, 2};
        default:
            return {count, depth, panel_columns};
    }
}

namespace {

void check_panels(const char* op, const Tensor& panels, const Tensor& column_scale, MatrixStorage storage,
                  int64_t out_channels, int64_t in_channels, const std::vector<int64_t>& expected) {
    require(
        panels.scalar_type() == panels_type(storage) && panels.is_contiguous(), op, "panels has dtype",
        [&] { return dtype_text(panels); }, [&] { return "contiguous panels of storage " + quoted(storage); });
    require(
        has_shape(panels, expected), op, "panels has shape", [&] { return shape_text(shape_of(panels)); },
        [&] { return shape_text(expected) + " for a weight of shape " + shape_text({out_channels, in_channels}); });
    const std::vector<int64_t> scales{storage == MatrixStorage::int8 ? out_channels : 0};
    require(
        same_device(column_scale, panels) && column_scale.scalar_type() == ScalarType::Float &&
            column_scale.is_contiguous(),
        op, "column_scale has dtype", [&] { return dtype_text(column_scale); }, [] { return "contiguous float32"; });
    require(
        has_shape(column_scale, scales), op, "column_scale has shape",
        [&] { return shape_text(shape_of(column_scale)); }, [&] { return shape_text(scales); });
}

}  // namespace

Panels panels_of(const char* op, const Tensor& panels, const Tensor& column_scale, int64_t out_channels,
                 int64_t in_channels, MatrixStorage storage) {
    require(panels.is_cpu(), op, "panels is on", [&] { return device_text(panels); }, [] { return "cpu"; });
    check_panels(op, panels, column_scale, storage, out_channels, in_channels,
                 panels_shape(storage, out_channels, in_channels));
    const float* scale = storage == MatrixStorage::int8 ? static_cast<const float*>(column_scale.data_ptr()) : nullptr;
    return {panels.data_ptr(), scale, nullptr, out_channels, in_channels, storage};
}

std::vector<int64_t> device_rows_shape(int64_t out_channels, int64_t in_channels) {
    return {out_channels, round_up(in_channels, linear_row_multiple)};
}

void check_device_storage(const char* op, MatrixStorage storage, const Tensor& on_device) {
    require(
        storage == MatrixStorage::bfloat16 || storage == MatrixStorage::float16, op, "storage is",
        [&] { return quoted(storage); },
        [&] { return R"("bfloat16" or "float16" for a weight on )" + device_text(on_device); });
}

Panels device_rows_of(const char* op, const Tensor& panels, const Tensor& column_scale, int64_t out_channels,
                      int64_t in_channels, MatrixStorage storage) {
    check_device_storage(op, storage, panels);
    check_panels(op, panels, column_scale, storage, out_channels, in_channels,
                 device_rows_shape(out_channels, in_channels));
    const auto address = reinterpret_cast<uintptr_t>(panels.data_ptr());
    require(
        address % 16 == 0, op, "panels is at", [&] { return "address " + std::to_string(address); },
        [] { return "a multiple of 16 bytes"; });
    return {panels.data_ptr(), nullptr, nullptr, out_channels, in_channels, storage};
}

}  // namespace starflow
