// Vectors of N floats or integers: GCC's and Clang's vector extension, or single numbers where the compiler has none.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace {

#if defined(__GNUC__)

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

template <typename T, int N>
struct VectorOf {
    typedef T type __attribute__((vector_size(N * sizeof(T))));
};

#else

constexpr int kLanes = 1;

template <typename T, int N>
struct VectorOf;

#endif

template <typename T>
struct VectorOf<T, 1> {
    typedef T type;
};

template <int N>
using Vector = typename VectorOf<float, N>::type;

template <int N>
using Integers = typename VectorOf<int32_t, N>::type;

template <int N>
inline Vector<N> load(const float* from) {
    Vector<N> v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <int N>
inline Integers<N> load(const int32_t* from) {
    Integers<N> v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <typename T, typename V>
inline void store(T* to, const V& v) {
    std::memcpy(to, &v, sizeof v);
}

template <int N>
inline Vector<N> all(float value) {
    return value - Vector<N>{};
}

template <int N>
inline Integers<N> all(int32_t value) {
    return value - Integers<N>{};
}

// Lane by lane; mask is what a comparison gives.
template <typename M, typename V>
inline V where(const M& mask, const V& yes, const V& no) {
    return mask ? yes : no;
}

// Towards zero; only of numbers that an int32_t can hold.
template <int N>
inline Integers<N> truncated(const Vector<N>& v) {
    if constexpr (N == 1) {
        return static_cast<int32_t>(v);
    } else {
        return __builtin_convertvector(v, Integers<N>);
    }
}

template <int N>
inline Vector<N> as_floats(const Integers<N>& v) {
    if constexpr (N == 1) {
        return static_cast<float>(v);
    } else {
        return __builtin_convertvector(v, Vector<N>);
    }
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define NNUNET_DEFORM_SHUFFLE
#endif
#endif

#ifdef NNUNET_DEFORM_SHUFFLE

// Every second run of RUN lanes out of a and b, the first or the ODD ones: half the lanes of each.
template <int N, int RUN, int ODD, int... I>
inline Vector<N> alternate(const Vector<N>& a, const Vector<N>& b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, (I / RUN * 2 + ODD) * RUN + I % RUN...);
}

template <int N, int RUN, int ODD>
inline Vector<N> alternate(const Vector<N>& a, const Vector<N>& b) {
    return alternate<N, RUN, ODD>(a, b, std::make_integer_sequence<int, N>());
}

// Adds the lanes of each of M vectors, which hold runs of 2 * RUN lanes of one sum each, until a run is one lane.
template <int N, int M, int RUN>
inline void add_lanes(Vector<N>* v) {
    if constexpr (RUN >= 1) {
        constexpr int half = M > 1 ? M / 2 : 1;
        for (int m = 0; m < half; ++m) {
            const Vector<N>& a = v[2 * m];
            const Vector<N>& b = v[M > 1 ? 2 * m + 1 : 0];
            v[m] = alternate<N, RUN, 0>(a, b) + alternate<N, RUN, 1>(a, b);
        }
        add_lanes<N, half, RUN / 2>(v);
    }
}

#endif

// sums[m] += the sum of the lanes of v[m]. Overwrites v.
template <int N, int M>
inline void add_sums(Vector<N> (&v)[M], float* sums) {
#ifdef NNUNET_DEFORM_SHUFFLE
    if constexpr (N >= M) {
        add_lanes<N, M, N / 2>(v);
        float first[N];
        std::memcpy(first, &v[0], sizeof first);
        for (int m = 0; m < M; ++m) sums[m] += first[m];
        return;
    }
#endif
    for (int m = 0; m < M; ++m) {
        float lanes[N];
        std::memcpy(lanes, &v[m], sizeof lanes);
        for (int n = 1; n < N; ++n) lanes[0] += lanes[n];
        sums[m] += lanes[0];
    }
}

// N records of M numbers each as M vectors: to[m] has the m-th number of each record.
template <int N, int M>
inline void transpose(const float* from, Vector<N>* to) {
#ifdef NNUNET_DEFORM_SHUFFLE
    if constexpr (N > 1) {
        for (int m = 0; m < M; ++m) to[m] = load<N>(from + m * N);
        // Each round halves the distance between a record's neighbours, and sorts even and odd numbers apart.
        for (int apart = 1; apart < M; apart *= 2) {
            Vector<N> sorted[M];
            for (int m = 0; m < M / 2; ++m) {
                sorted[m] = alternate<N, 1, 0>(to[2 * m], to[2 * m + 1]);
                sorted[m + M / 2] = alternate<N, 1, 1>(to[2 * m], to[2 * m + 1]);
            }
            for (int m = 0; m < M; ++m) to[m] = sorted[m];
        }
        return;
    }
#endif
    for (int m = 0; m < M; ++m) {
        float lanes[N];
        for (int n = 0; n < N; ++n) lanes[n] = from[n * M + m];
        std::memcpy(&to[m], lanes, sizeof lanes);
    }
}

template <int N>
using Constant = std::integral_constant<int, N>;

// Calls f(Constant<N>(), begin, end) for runs of whole vectors, from the widest vector down to single channels.
template <int N = kLanes, typename F>
inline void by_width(int64_t begin, int64_t end, const F& f) {
    const int64_t stop = begin + (end - begin) / N * N;
    if (stop > begin) f(Constant<N>(), begin, stop);
    if constexpr (N > 1) by_width<(N > 4 ? N / 2 : 1)>(stop, end, f);
}

}  // namespace
