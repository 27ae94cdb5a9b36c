#include "cpu/pages.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace starflow::cpu {

void prefer_large_pages([[maybe_unused]] const Tensor& result) {
#ifdef __linux__
    const auto bytes = static_cast<uintptr_t>(result.numel()) * result.element_size();
    if (!result.is_cpu() || bytes < large_bytes) return;
    const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    char* start = static_cast<char*>(result.data_ptr());
    const uintptr_t skipped = (page - reinterpret_cast<uintptr_t>(start) % page) % page;
    madvise(start + skipped, (bytes - skipped) / page * page, MADV_HUGEPAGE);
#endif
}

}  // namespace starflow::cpu
