// Memory that a thread uses within one call and keeps for the next: fresh pages of the system cost more than what small
// calls compute in them. Not for kernel files.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace starflow::cpu {

// At least `bytes` on a cache line, not initialised, until this thread asks again for the same owner.
template <class Owner>
void* scratch(int64_t bytes) {
    struct Buffer {
        void* data = nullptr;
        size_t size = 0;
        ~Buffer() { std::free(data); }
    };
    static thread_local Buffer buffer;
    constexpr size_t line = 64;
    const size_t size = (static_cast<size_t>(bytes) + line - 1) / line * line;
    if (size > buffer.size) {
        std::free(buffer.data);
        buffer.size = 0;
        buffer.data = std::aligned_alloc(line, size);
        if (buffer.data == nullptr) throw std::bad_alloc();
        buffer.size = size;
    }
    return buffer.data;
}

}  // namespace starflow::cpu
