#include "ops/linear/packed_weight.h"

#include <array>
#include <utility>

namespace starflow {
namespace {

constexpr std::array<std::pair<const char*, Storage>, 5> storages{{{"float32", Storage::float32},
                                                                   {"float16", Storage::float16},
                                                                   {"bfloat16", Storage::bfloat16},
                                                                   {"int8", Storage::int8},
                                                                   {"two_bfloat16", Storage::two_bfloat16}}};

}  // namespace

Storage storage_of(const char* op, const std::string& name) {
    for (const auto& [known, storage] : storages) {
        if (name == known) return storage;
    }
    require(
        false, op, "storage is", [&] { return '"' + name + '"'; },
        [] { return R"("float32", "float16", "bfloat16", "int8" or "two_bfloat16")"; });
    return Storage::float32;
}

ScalarType panels_type(Storage storage) {
    switch (storage) {
        case Storage::float32:
            return ScalarType::Float;
        case Storage::float16:
            return ScalarType::Half;
        case Storage::int8:
            return ScalarType::Char;
        default:
            return ScalarType::BFloat16;
    }
}

std::vector<int64_t> panels_shape(Storage storage, int64_t out_channels, int64_t in_channels) {
    const int64_t count = round_up(out_channels, panel_columns) / panel_columns;
    const int64_t depth = round_up(in_channels, depth_multiple);
    switch (storage) {
        case Storage::bfloat16:
            return {count, depth / 2, panel_columns, 2};
        case Storage::two_bfloat16:
            return {count, 2, depth / 2, panel_columns, 2};
        default:
            return {count, depth, panel_columns};
    }
}

namespace {

void check_panels(const char* op, const Tensor& panels, const Tensor& column_scale, Storage storage,
                  const std::string& name, int64_t out_channels, int64_t in_channels,
                  const std::vector<int64_t>& expected) {
    require(
        panels.scalar_type() == panels_type(storage) && panels.is_contiguous(), op, "panels has dtype",
        [&] { return dtype_text(panels); }, [&] { return "contiguous panels of storage \"" + name + '"'; });
    require(
        has_shape(panels, expected), op, "panels has shape", [&] { return shape_text(shape_of(panels)); },
        [&] { return shape_text(expected) + " for a weight of shape " + shape_text({out_channels, in_channels}); });
    const std::vector<int64_t> scales{storage == Storage::int8 ? out_channels : 0};
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
                 int64_t in_channels, const std::string& storage) {
    const Storage kind = storage_of(op, storage);
    require(panels.is_cpu(), op, "panels is on", [&] { return device_text(panels); }, [] { return "cpu"; });
    check_panels(op, panels, column_scale, kind, storage, out_channels, in_channels,
                 panels_shape(kind, out_channels, in_channels));
    const float* scale = kind == Storage::int8 ? static_cast<const float*>(column_scale.data_ptr()) : nullptr;
    return {panels.data_ptr(), scale, nullptr, out_channels, in_channels, kind};
}

std::vector<int64_t> device_rows_shape(int64_t out_channels, int64_t in_channels) {
    return {out_channels, round_up(in_channels, linear_row_multiple)};
}

void check_device_storage(const char* op, Storage storage, const std::string& name, const Tensor& on_device) {
    require(
        storage == Storage::bfloat16 || storage == Storage::float16, op, "storage is", [&] { return '"' + name + '"'; },
        [&] { return R"("bfloat16" or "float16" for a weight on )" + device_text(on_device); });
}

Panels device_rows_of(const char* op, const Tensor& panels, const Tensor& column_scale, int64_t out_channels,
                      int64_t in_channels, const std::string& storage) {
    const Storage kind = storage_of(op, storage);
    check_device_storage(op, kind, storage, panels);
    check_panels(op, panels, column_scale, kind, storage, out_channels, in_channels,
                 device_rows_shape(out_channels, in_channels));
    const auto address = reinterpret_cast<uintptr_t>(panels.data_ptr());
    require(
        address % 16 == 0, op, "panels is at", [&] { return "address " + std::to_string(address); },
        [] { return "a multiple of 16 bytes"; });
    return {panels.data_ptr(), nullptr, nullptr, out_channels, in_channels, kind};
}

}  // namespace starflow
