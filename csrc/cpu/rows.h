// Walks over a row of channels. For kernel files: no torch, no std.
#pragma once
#include "cpu/vec.h"

namespace starflow::STARFLOW_ISA {
namespace {

// A whole register goes past the caches where the caller asks for it; the end of a row never does.
template <class Storage, class V>
inline void put(Storage* p, V value, AllLanes lanes, bool past_caches) {
    if (past_caches) {
        stream(p, value);
    } else {
        store(p, value, lanes);
    }
}
template <class Storage, class V>
inline void put(Storage* p, V value, FirstLanes lanes, bool) {
    store(p, value, lanes);
}

// Call step(c, lanes) over a row: whole registers, then what is left.
template <class V = Vec<float>, class Step>
inline void over_channels(int64_t channels, const Step& step) {
    int64_t c = 0;
    for (; c + V::lanes <= channels; c += V::lanes) step(c, AllLanes{});
    if (c < channels) step(c, FirstLanes{static_cast<int>(channels - c)});
}

template <class V, class Storage>
inline void copy_row(const Storage* from, Storage* to, int64_t channels) {
    over_channels<V>(channels, [&](int64_t c, auto lanes) { store(to + c, load(from + c, lanes), lanes); });
}

template <class V, class Storage>
inline void zero_row(Storage* to, int64_t channels) {
    over_channels<V>(channels, [&](int64_t c, auto lanes) { store(to + c, V(0), lanes); });
}

// out[c] = sum over rows of in[row, c], for c in [begin, end): in (rows, channels).
template <class V, class T>
inline void sum_rows(const T* in, T* out, int64_t rows, int64_t channels, int64_t begin, int64_t end) {
    over_channels<V>(end - begin, [&](int64_t c, auto lanes) {
        V total(0);
        for (int64_t row = 0; row < rows; ++row) total = total + load(in + row * channels + begin + c, lanes);
        store(out + begin + c, total, lanes);
    });
}

// The sum of term(c, lanes) over a row, in an order that depends on the number of channels alone. Four sums at a time:
// one would wait four cycles for each addition.
template <class V, class Term>
inline auto sum_over(int64_t channels, const Term& term) {
    V a(0), b(0), c(0), d(0);
    int64_t i = 0;
    for (; i + 4 * V::lanes <= channels; i += 4 * V::lanes) {
        a = a + term(i, AllLanes{});
        b = b + term(i + V::lanes, AllLanes{});
        c = c + term(i + 2 * V::lanes, AllLanes{});
        d = d + term(i + 3 * V::lanes, AllLanes{});
    }
    for (; i + V::lanes <= channels; i += V::lanes) a = a + term(i, AllLanes{});
    if (i < channels) {
        const FirstLanes rest{static_cast<int>(channels - i)};
        b = b + keep(term(i, rest), rest, 0);
    }
    return sum((a + b) + (c + d));
}

}  // namespace
}  // namespace starflow::STARFLOW_ISA
