#include "cpu/pages.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace starflow::cpu {

void prefer_large_pages([[maybe_unused]] const Tensor& result, [[maybe_unused]] int64_t least) {
#ifdef __linux__
    const auto bytes = static_cast<uintptr_t>(result.numel()) * result.element_size();
    if (!result.is_cpu() || bytes < static_cast<uintptr_t>(least)) return;
    const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    char* start = static_cast<char*>(result.data_ptr());
    const uintptr_t skipped = (page - reinterpret_cast<uintptr_t>(start) % page) % page;
    madvise(start + skipped, (bytes - skipped) / page * page, MADV_HUGEPAGE);
#endif
}

}  // namespace starflow::cpu

namespace starflow {

Tensor new_result(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
    const Tensor result = empty_like_shape(like, shape, type);
    cpu::prefer_large_pages(result);
    return result;
}

Tensor new_result(const Tensor& like) { return new_result(like, shape_of(like), like.scalar_type()); }

bool worth_streaming(const Tensor& result) {
    constexpr int64_t cache_line = 64;
    const auto width = static_cast<int64_t>(result.element_size());
    return result.numel() * width >= cpu::large_bytes && result.size(result.dim() - 1) * width % cache_line == 0 &&
           reinterpret_cast<uintptr_t>(result.data_ptr()) % cache_line == 0;
}

}  // namespace starflow
