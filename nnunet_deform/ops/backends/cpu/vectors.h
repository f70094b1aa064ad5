// Vectors of N floats: GCC's and Clang's vector extension, or single floats where the compiler has none.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

#if defined(__GNUC__)

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

template <int N>
struct VectorOf {
    typedef float type __attribute__((vector_size(N * sizeof(float))));
};

#else

constexpr int kLanes = 1;

template <int N>
struct VectorOf;

#endif

template <>
struct VectorOf<1> {
    typedef float type;
};

template <int N>
using Vector = typename VectorOf<N>::type;

template <int N>
inline Vector<N> load(const float* from) {
    Vector<N> v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <int N>
inline void store(float* to, const Vector<N>& v) {
    std::memcpy(to, &v, sizeof v);
}

template <int N>
inline float sum(const Vector<N>& v) {
    if constexpr (N == 1) {
        return v;
    } else {
        Vector<N / 2> low, high;
        std::memcpy(&low, &v, sizeof low);
        std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
        return sum<N / 2>(low + high);
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
