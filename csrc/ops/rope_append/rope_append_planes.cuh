// Planes of a head in registers: how they are loaded, rotated and stored, for every CUDA kernel that turns heads. The
// formula is in rope_append.h.
#pragma once
#include "cuda/packed.cuh"
#include "ops/rope_append/rope_append.h"

namespace starflow::cuda {

// What is added to the mean square of a head before its root.
inline constexpr double head_epsilon = 1e-6;

// Neighbouring planes of a head: plane p is the elements (u, v).
template <class T, int width>
struct Planes {
    T u[width];
    T v[width];
};

// Where the planes of a head lie. A head of odd size has no rotation, and a last plane without v.
struct HeadLayout {
    int head_dim;
    int planes;
    bool interleaved;

    __device__ HeadLayout(int64_t size, bool interleaved)
        : head_dim(static_cast<int>(size)), planes((head_dim + 1) / 2), interleaved(interleaved) {}

    __device__ int u(int p) const { return interleaved ? 2 * p : p; }
    __device__ int v(int p) const { return interleaved ? 2 * p + 1 : planes + p; }
};

// One plane is two accesses of one element each: of any alignment.
template <int width, class Storage, class T>
__device__ void load_planes(const Storage* head, const HeadLayout& layout, int p, Planes<T, width>& planes) {
    if constexpr (width == 1) {
        load<1>(head + layout.u(p), planes.u);
        planes.v[0] = T(0);
        if (layout.v(p) < layout.head_dim) load<1>(head + layout.v(p), planes.v);
    } else if (layout.interleaved) {
        T both[2 * width];
        load<2 * width>(head + 2 * p, both);
#pragma unroll
        for (int i = 0; i < width; ++i) {
            planes.u[i] = both[2 * i];
            planes.v[i] = both[2 * i + 1];
        }
    } else {
        load<width>(head + layout.u(p), planes.u);
        load<width>(head + layout.v(p), planes.v);
    }
}

template <int width, class Storage, class T>
__device__ void store_planes(Storage* head, const HeadLayout& layout, int p, const Planes<T, width>& planes) {
    if constexpr (width == 1) {
        store<1>(head + layout.u(p), planes.u);
        if (layout.v(p) < layout.head_dim) store<1>(head + layout.v(p), planes.v);
    } else if (layout.interleaved) {
        T both[2 * width];
#pragma unroll
        for (int i = 0; i < width; ++i) {
            both[2 * i] = planes.u[i];
            both[2 * i + 1] = planes.v[i];
        }
        store<2 * width>(head + 2 * p, both);
    } else {
        store<width>(head + layout.u(p), planes.u);
        store<width>(head + layout.v(p), planes.v);
    }
}

// (u, v) -> (u cos - v sin, v cos + u sin); back with sign -1.
template <int width, class T>
__device__ void rotate(Planes<T, width>& x, const T* cos, const T* sin, int p, T sign) {
    T c[width];
    T s[width];
    load<width>(cos + p, c);
    load<width>(sin + p, s);
#pragma unroll
    for (int i = 0; i < width; ++i) {
        const T u = x.u[i];
        x.u[i] = u * c[i] - x.v[i] * (sign * s[i]);
        x.v[i] = x.v[i] * c[i] + u * (sign * s[i]);
    }
}

// What a head of a token goes through; nothing for values.
template <class T>
struct HeadTurn {
    const T* cos = nullptr;
    const T* sin = nullptr;
    const T* weight = nullptr;

    __device__ HeadTurn(const RopeTurn& query, const RopeTurn& key, bool is_query, bool is_value, int64_t b,
                        int64_t t) {
        if (is_value) return;
        const Rows& cosines = is_query ? query.cos : key.cos;
        const Rows& sines = is_query ? query.sin : key.sin;
        weight = static_cast<const T*>(is_query ? query.weight : key.weight);
        if (cosines.data == nullptr) return;
        cos = row_of<const T>(cosines, b, t);
        sin = row_of<const T>(sines, b, t);
    }
};

template <class T>
__device__ T* head_of(const Heads& heads, int64_t b, int64_t h, int64_t t) {
    return static_cast<T*>(heads.data) + b * heads.batch_stride + h * heads.head_stride + t * heads.token_stride;
}

// Stores planes in a cache of any dtype: one kernel serves all, since the choice is the same for every thread.
template <int width, class T>
__device__ void store_kept(const Heads& heads, Dtype kept, int64_t b, int64_t h, int64_t slot, const HeadLayout& layout,
                           int p, const Planes<T, width>& planes) {
    if constexpr (sizeof(T) == sizeof(double)) {
        store_planes<width>(head_of<double>(heads, b, h, slot), layout, p, planes);
    } else if (kept == Dtype::float32) {
        store_planes<width>(head_of<float>(heads, b, h, slot), layout, p, planes);
    } else if (kept == Dtype::bfloat16) {
        store_planes<width>(head_of<BFloat16>(heads, b, h, slot), layout, p, planes);
    } else {
        store_planes<width>(head_of<Float16>(heads, b, h, slot), layout, p, planes);
    }
}

}  // namespace starflow::cuda
