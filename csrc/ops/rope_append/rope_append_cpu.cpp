// Heads split, normalised, rotated and written on the CPU, and the gradient; the formula and the bytes are in
// rope_append.h. Compiled once for each ISA.
#include "ops/rope_append/rope_append.h"

#include "common/visit.h"
#include "cpu/rows.h"

namespace starflow::STARFLOW_ISA {
namespace {

template <class T>
inline T* head_of(const Heads& heads, int64_t b, int64_t h, int64_t t) {
    return static_cast<T*>(heads.data) + b * heads.batch_stride + h * heads.head_stride + t * heads.token_stride;
}

// What one token's queries, or keys, go through.
template <class T>
struct Turn {
    Turn(const RopeTurn& turn, int64_t b, int64_t t)
        : cos(turn.cos.data == nullptr ? nullptr : row_of<const T>(turn.cos, b, t)),
          sin(turn.sin.data == nullptr ? nullptr : row_of<const T>(turn.sin, b, t)),
          weight(static_cast<const T*>(turn.weight)) {}

    const T* cos;
    const T* sin;
    const T* weight;
};

template <class V>
struct Pair {
    V u, v;
};

// Lanes of the second of two registers that hold n pairs, interleaved.
inline AllLanes first_half(AllLanes lanes, int) { return lanes; }
inline AllLanes second_half(AllLanes lanes, int) { return lanes; }
inline FirstLanes first_half(FirstLanes n, int width) { return {2 * n.count < width ? 2 * n.count : width}; }
inline FirstLanes second_half(FirstLanes n, int width) { return {2 * n.count < width ? 0 : 2 * n.count - width}; }

// How the planes of a head are walked.
struct Interleaved {
    static constexpr bool rotates = true;
    static int64_t planes(int64_t head_dim) { return head_dim / 2; }

    template <class V, class Storage, class Lanes>
    static Pair<V> take(const Storage* head, int64_t, int64_t p, Lanes lanes) {
        Pair<V> pair;
        deinterleave(load(head + 2 * p, first_half(lanes, V::lanes)),
                     load(head + 2 * p + V::lanes, second_half(lanes, V::lanes)), pair.u, pair.v);
        return pair;
    }
    template <class V, class Storage, class Lanes>
    static void give(Storage* head, int64_t, int64_t p, Pair<V> pair, Lanes lanes) {
        V a, b;
        interleave(pair.u, pair.v, a, b);
        store(head + 2 * p, a, first_half(lanes, V::lanes));
        store(head + 2 * p + V::lanes, b, second_half(lanes, V::lanes));
    }
};

struct Halves {
    static constexpr bool rotates = true;
    static int64_t planes(int64_t head_dim) { return head_dim / 2; }

    template <class V, class Storage, class Lanes>
    static Pair<V> take(const Storage* head, int64_t planes, int64_t p, Lanes lanes) {
        return {load(head + p, lanes), load(head + planes + p, lanes)};
    }
    template <class V, class Storage, class Lanes>
    static void give(Storage* head, int64_t planes, int64_t p, Pair<V> pair, Lanes lanes) {
        store(head + p, pair.u, lanes);
        store(head + planes + p, pair.v, lanes);
    }
};

// Without a rotation each element stands alone; v is zero and the compiler drops what comes of it.
struct Singles {
    static constexpr bool rotates = false;
    static int64_t planes(int64_t head_dim) { return head_dim; }

    template <class V, class Storage, class Lanes>
    static Pair<V> take(const Storage* head, int64_t, int64_t p, Lanes lanes) {
        return {load(head + p, lanes), V(0)};
    }
    template <class V, class Storage, class Lanes>
    static void give(Storage* head, int64_t, int64_t p, Pair<V> pair, Lanes lanes) {
        store(head + p, pair.u, lanes);
    }
};

// Call function(walk) with the walk that a turn takes.
template <class T, class Function>
inline void with_walk(const Turn<T>& turn, bool interleaved, const Function& function) {
    if (turn.cos == nullptr) {
        function(Singles{});
    } else if (interleaved) {
        function(Interleaved{});
    } else {
        function(Halves{});
    }
}

// The products are fused wherever the level fuses: GCC 12 turns pairs of products, difference and sum of doubles into
// vfmaddsub in a vectorised loop, in spite of -ffp-contract=off, and which loop runs depends on addresses.
template <class V>
inline Pair<V> rotated(Pair<V> x, V cos, V sin) {
    return {multiply_add(x.u, cos, V(0) - x.v * sin), multiply_add(x.v, cos, x.u * sin)};
}

template <class V, class Data>
inline V inverse_of(const Data* head, int64_t head_dim) {
    const auto squares = sum_over<V>(head_dim, [&](int64_t c, auto lanes) {
        const V x = load(head + c, lanes);
        return x * x;
    });
    const double mean = static_cast<double>(squares) / static_cast<double>(head_dim);
    using T = decltype(sum(V(0)));
    return V(static_cast<T>(1.0 / __builtin_sqrt(mean + 1e-6)));
}

template <class V, class T, class Data, class Out>
inline void turn_head(const Data* head, Out* out, int64_t head_dim, const Turn<T>& turn, bool interleaved) {
    const V inverse = turn.weight == nullptr ? V(1) : inverse_of<V>(head, head_dim);
    with_walk(turn, interleaved, [&](auto walk) {
        using Walk = decltype(walk);
        const int64_t planes = Walk::planes(head_dim);
        over_channels<V>(planes, [&](int64_t p, auto lanes) {
            Pair<V> x = Walk::template take<V>(head, planes, p, lanes);
            if (turn.weight != nullptr) {
                const Pair<V> weight = Walk::template take<V>(turn.weight, planes, p, lanes);
                x.u = x.u * inverse * (V(1) + weight.u);
                x.v = x.v * inverse * (V(1) + weight.v);
            }
            if constexpr (Walk::rotates) x = rotated(x, load(turn.cos + p, lanes), load(turn.sin + p, lanes));
            Walk::template give<V>(out, planes, p, x, lanes);
        });
    });
}

template <class Data, class Kept>
void forward_rows(const RopeAppendArgs& args, int64_t begin, int64_t end) {
    using T = typename Arithmetic<Data>::type;
    using V = Vec<T>;
    const RopeAppendShape& shape = args.shape;
    const int64_t head_dim = shape.head_dim;
    for (int64_t row = begin; row < end; ++row) {
        const int64_t b = row / shape.tokens;
        const int64_t t = row % shape.tokens;
        const Data* head = row_of<const Data>(args.qkv, b, t);
        const Turn<T> query(args.query, b, t);
        for (int64_t h = 0; h < shape.heads; ++h, head += head_dim) {
            turn_head<V>(head, head_of<Data>(args.q, b, h, t), head_dim, query, shape.interleaved);
        }
        const int64_t slot = (args.starts == nullptr ? args.start : args.starts[b]) + t;
        if (args.final != nullptr && slot < args.final[b]) continue;
        const Turn<T> key(args.key, b, t);
        for (int64_t h = 0; h < shape.kv_heads; ++h, head += head_dim) {
            turn_head<V>(head, head_of<Kept>(args.k, b, h, slot), head_dim, key, shape.interleaved);
        }
        for (int64_t h = 0; h < shape.kv_heads; ++h, head += head_dim) {
            Kept* out = head_of<Kept>(args.v, b, h, slot);
            over_channels<V>(head_dim, [&](int64_t c, auto lanes) { store(out + c, load(head + c, lanes), lanes); });
        }
    }
}

// The gradient of one head. Both walks over it first rotate the upstream gradient back: cheaper than keeping it.
template <class Walk, class V, class T, class Data>
inline void turn_back_by(const Data* head, const Data* upstream, Data* grad, int64_t head_dim, const Turn<T>& turn,
                         T* weight_sum) {
    const int64_t planes = Walk::planes(head_dim);
    const auto back = [&](int64_t p, auto lanes) {
        const Pair<V> g = Walk::template take<V>(upstream, planes, p, lanes);
        if constexpr (Walk::rotates) {
            return rotated(g, load(turn.cos + p, lanes), V(0) - load(turn.sin + p, lanes));
        } else {
            return g;
        }
    };
    if (turn.weight == nullptr) {
        over_channels<V>(
            planes, [&](int64_t p, auto lanes) { Walk::template give<V>(grad, planes, p, back(p, lanes), lanes); });
        return;
    }
    const V inverse = inverse_of<V>(head, head_dim);
    const auto along = sum_over<V>(planes, [&](int64_t p, auto lanes) {
        const Pair<V> g = back(p, lanes);
        const Pair<V> x = Walk::template take<V>(head, planes, p, lanes);
        const Pair<V> weight = Walk::template take<V>(turn.weight, planes, p, lanes);
        const Pair<V> product{g.u * (x.u * inverse), g.v * (x.v * inverse)};
        const Pair<V> before = Walk::template take<V>(weight_sum, planes, p, lanes);
        Walk::template give<V>(weight_sum, planes, p, Pair<V>{before.u + product.u, before.v + product.v}, lanes);
        return product.u * (V(1) + weight.u) + product.v * (V(1) + weight.v);
    });
    const V part(along / static_cast<T>(head_dim));
    over_channels<V>(planes, [&](int64_t p, auto lanes) {
        const Pair<V> g = back(p, lanes);
        const Pair<V> x = Walk::template take<V>(head, planes, p, lanes);
        const Pair<V> weight = Walk::template take<V>(turn.weight, planes, p, lanes);
        const Pair<V> result{inverse * (g.u * (V(1) + weight.u) - x.u * inverse * part),
                             inverse * (g.v * (V(1) + weight.v) - x.v * inverse * part)};
        Walk::template give<V>(grad, planes, p, result, lanes);
    });
}

template <class V, class T, class Data>
inline void turn_back(const Data* head, const Data* upstream, Data* grad, int64_t head_dim, const Turn<T>& turn,
                      T* weight_sum, bool interleaved) {
    with_walk(turn, interleaved,
              [&](auto walk) { turn_back_by<decltype(walk), V>(head, upstream, grad, head_dim, turn, weight_sum); });
}

template <class Data>
void backward_blocks(const RopeAppendBackwardArgs& args, int64_t begin, int64_t end) {
    using T = typename Arithmetic<Data>::type;
    using V = Vec<T>;
    const RopeAppendShape& shape = args.shape;
    const int64_t head_dim = shape.head_dim;
    for (int64_t block = begin; block < end; ++block) {
        T* query_sum = args.partial == nullptr ? nullptr : static_cast<T*>(args.partial) + block * 2 * head_dim;
        T* key_sum = args.partial == nullptr ? nullptr : query_sum + head_dim;
        if (query_sum != nullptr) zero_row<V>(query_sum, 2 * head_dim);
        for (int64_t row = args.blocks.begin(block); row < args.blocks.end(block); ++row) {
            const int64_t b = row / shape.tokens;
            const int64_t t = row % shape.tokens;
            const Data* head = row_of<const Data>(args.qkv, b, t);
            Data* grad = row_of<Data>(args.grad_qkv, b, t);
            const Turn<T> query(args.query, b, t);
            const Turn<T> key(args.key, b, t);
            for (int64_t h = 0; h < shape.heads; ++h, head += head_dim, grad += head_dim) {
                turn_back<V>(head, head_of<const Data>(args.grad_q, b, h, t), grad, head_dim, query, query_sum,
                             shape.interleaved);
            }
            for (int64_t h = 0; h < shape.kv_heads; ++h, head += head_dim, grad += head_dim) {
                turn_back<V>(head, head_of<const Data>(args.grad_k, b, h, t), grad, head_dim, key, key_sum,
                             shape.interleaved);
            }
            for (int64_t h = 0; h < shape.kv_heads; ++h, grad += head_dim) {
                copy_row<V>(head_of<const Data>(args.grad_v, b, h, t), grad, head_dim);
            }
        }
    }
}

void forward(const RopeAppendArgs& args, int64_t begin, int64_t end) {
    visit_dtype(args.shape.data, [&](auto data) {
        using Data = typename decltype(data)::type;
        // Float64 keeps to itself; each of the others goes into a cache of any of them.
        if constexpr (sizeof(Data) == sizeof(double)) {
            forward_rows<double, double>(args, begin, end);
        } else {
            visit_dtype(args.shape.kept, [&](auto kept) {
                using Kept = typename decltype(kept)::type;
                if constexpr (sizeof(Kept) != sizeof(double)) forward_rows<Data, Kept>(args, begin, end);
            });
        }
    });
}

void backward(const RopeAppendBackwardArgs& args, int64_t begin, int64_t end) {
    visit_dtype(args.shape.data, [&](auto data) { backward_blocks<typename decltype(data)::type>(args, begin, end); });
}

template <class T>
void sum_blocks_as(const RopeAppendBackwardArgs& args) {
    const int64_t width = 2 * args.shape.head_dim;
    sum_rows<Vec<T>>(static_cast<const T*>(args.partial), static_cast<T*>(args.weights), args.blocks.count, width, 0,
                     width);
}

void sum_blocks(const RopeAppendBackwardArgs& args) {
    if (args.shape.data == Dtype::float64) {
        sum_blocks_as<double>(args);
    } else {
        sum_blocks_as<float>(args);
    }
}

}  // namespace

const RopeAppendKernels rope_append{forward, backward, sum_blocks};

}  // namespace starflow::STARFLOW_ISA
