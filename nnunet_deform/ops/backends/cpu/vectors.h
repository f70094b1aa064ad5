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

// The lanes from FIRST on, half as many. By subscripts: a copy of bytes would keep the vector in memory.
template <int N, int FIRST, int... I>
inline Vector<N / 2> half(const Vector<N>& v, std::integer_sequence<int, I...>) {
    if constexpr (N == 2) {
        return v[FIRST];
    } else {
        return Vector<N / 2>{v[FIRST + I]...};
    }
}

template <int N>
inline float sum(const Vector<N>& v) {
    if constexpr (N == 1) {
        return v;
    } else {
        using Lanes = std::make_integer_sequence<int, N / 2>;
        return sum<N / 2>(half<N, 0>(v, Lanes()) + half<N, N / 2>(v, Lanes()));
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
