#include "cpu/pages.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace starflow::cpu {

void prefer_large_pages([[maybe_unused]] const Tensor& result) {
#ifdef __linux__
    const auto bytes = result.numel() * static_cast<int64_t>(result.element_size());
    if (bytes < large_bytes || !result.is_cpu()) return;
    const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t start = reinterpret_cast<uintptr_t>(result.data_ptr());
    const uintptr_t first = (start + page - 1) / page * page;
    const uintptr_t last = (start + static_cast<uintptr_t>(bytes)) / page * page;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace starflow::cpu
