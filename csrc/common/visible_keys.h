// What a query sees: a prefix and one run of keys. Kernel files of every device include this one: no torch, no std.
#pragma once
#include "common/dtype.h"

namespace starflow {
namespace {

// The keys [0, prefix) and [first, last).
template <class Index>
struct VisibleKeysOf {
    Index prefix;
    Index first;
    Index last;

    STARFLOW_HOST_DEVICE constexpr bool any_in(Index begin, Index end) const {
        return begin < prefix || (first < end && last > begin && first < last);
    }
    STARFLOW_HOST_DEVICE constexpr bool all_in(Index begin, Index end) const {
        return end <= prefix || (first <= (begin > prefix ? begin : prefix) && last >= end);
    }
    // The test has no branches.
    STARFLOW_HOST_DEVICE constexpr bool has(Index key) const {
        const auto before_prefix = static_cast<unsigned>(key < prefix);
        const auto in_run = static_cast<unsigned>(key >= first) & static_cast<unsigned>(key < last);
        return (before_prefix | in_run) != 0;
    }
};

using VisibleKeys = VisibleKeysOf<int64_t>;

}  // namespace
}  // namespace starflow
