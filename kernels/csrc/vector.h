// Vectors of OREAL_LANES floats over the compiler's vector extensions (GCC, Clang), and the functions made of them.
//
// Everything is in an anonymous namespace: this header is compiled once per instruction set, and a shared symbol would
// let the linker give AVX-512 code to a machine without it.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define OREAL_INLINE inline __attribute__((always_inline))

namespace {

constexpr int LANES = OREAL_LANES;
typedef float Float __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Half __attribute__((vector_size(2 * LANES)));
typedef double Double __attribute__((vector_size(8 * LANES)));

struct bf16 {
    uint16_t bits;
};

OREAL_INLINE Float splat(float x) { return x - Float{}; }

OREAL_INLINE Float load(const float* from) {
    Float x;
    memcpy(&x, from, sizeof x);
    return x;
}

OREAL_INLINE Float load(const bf16* from) {
    Half x;
    memcpy(&x, from, sizeof x);
    return (Float)(__builtin_convertvector(x, Bits) << 16);
}

OREAL_INLINE void store(float* to, Float x) { memcpy(to, &x, sizeof x); }

// Round to nearest even; NaN stays NaN.
OREAL_INLINE void store(bf16* to, Float x) {
    const Bits bits = (Bits)x;
    const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Half half = __builtin_convertvector(x == x ? rounded : Bits{} + 0x7fc0, Half);
    memcpy(to, &half, sizeof half);
}

// The first `count` < LANES values, and zeros.
template <class T>
OREAL_INLINE Float load_some(const T* from, int64_t count) {
    T padded[LANES] = {};
    memcpy(padded, from, count * sizeof(T));
    return load(padded);
}

template <class T>
OREAL_INLINE void store_some(T* to, Float x, int64_t count) {
    T padded[LANES];
    store(padded, x);
    memcpy(to, padded, count * sizeof(T));
}

// A value rounded to fp32 before any multiply-add, so that two passes compute the same bits.
OREAL_INLINE Float rounded(Float x) {
#if defined(__AVX512F__)
    asm("" : "+v"(x));
#elif defined(__x86_64__)
    asm("" : "+x"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#else
    asm("" : "+m"(x));
#endif
    return x;
}

// NaN passes through. One instruction, which gives its second operand where one is NaN; compilers make three of `?:`.
// (GCC 12 warns about the form without a mask.)
#if defined(__AVX512F__)
OREAL_INLINE Float at_least(Float x, float low) {
    return (Float)_mm512_maskz_max_ps(0xffff, (__m512)splat(low), (__m512)x);
}
OREAL_INLINE Float at_most(Float x, float high) {
    return (Float)_mm512_maskz_min_ps(0xffff, (__m512)splat(high), (__m512)x);
}
#elif defined(__AVX2__)
OREAL_INLINE Float at_least(Float x, float low) { return (Float)_mm256_max_ps((__m256)splat(low), (__m256)x); }
OREAL_INLINE Float at_most(Float x, float high) { return (Float)_mm256_min_ps((__m256)splat(high), (__m256)x); }
#else
OREAL_INLINE Float at_least(Float x, float low) { return x < low ? splat(low) : x; }
OREAL_INLINE Float at_most(Float x, float high) { return x > high ? splat(high) : x; }
#endif
OREAL_INLINE Float absolute(Float x) { return (Float)((Bits)x & 0x7fffffff); }

OREAL_INLINE float maximum_of(Float x) {
    float best = -INFINITY;
    for (int i = 0; i < LANES; ++i) best = x[i] > best ? x[i] : best;
    return best;
}

// Half a vector of floats, and the same as doubles: these fill one register.
constexpr int WIDE = LANES / 2;
typedef float Narrow __attribute__((vector_size(4 * WIDE)));
typedef double Wide __attribute__((vector_size(8 * WIDE)));
typedef int64_t WideOrder __attribute__((vector_size(8 * WIDE)));

// Every lane moves up by `shift`; zeros follow.
template <int shift, int... lane>
OREAL_INLINE Wide moved(Wide x, std::integer_sequence<int, lane...>) {
#if defined(__clang__)
    return __builtin_shufflevector(Wide{}, x, (lane < shift ? lane : WIDE + lane - shift)...);
#else
    return __builtin_shuffle(Wide{}, x, WideOrder{(lane < shift ? lane : WIDE + lane - shift)...});
#endif
}

// Lane i becomes the sum of the lanes 0 to i.
template <int shift = 1>
OREAL_INLINE Wide running_sum(Wide x) {
    if constexpr (shift < WIDE)
        return running_sum<2 * shift>(x + moved<shift>(x, std::make_integer_sequence<int, WIDE>()));
    else
        return x;
}

OREAL_INLINE double sum_of(Double x) {
    double sum = 0;
    for (int i = 0; i < LANES; ++i) sum += x[i];
    return sum;
}

// exp(x) for x in [LOWEST, HIGHEST] or NaN; results below the smallest normal number are 0. Error below 1.5 ulp:
// x = n ln 2 + r with |r| <= ln(2)/2, and a minimax polynomial for (exp(r) - 1 - r) / r^2 (relative error 3e-9).
constexpr float LOWEST = -104, HIGHEST = 88;

OREAL_INLINE Float exponential(Float x) {
    const float shifter = 0x1.8p23f;  // adding it rounds to an integer, which is left in the low bits
    const Float shifted = x * 1.44269504f + shifter;
    const Float n = shifted - shifter;
    const Float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // n times the first part of ln 2 is exact
    Float q = splat(0.00138146090f);
    q = q * r + 0.00836871186f;
    q = q * r + 0.0416683876f;
    q = q * r + 0.166665207f;
    q = q * r + 0.499999935f;
    const Float mantissa = 1.0f + (r + r * r * q);
    const Float power = (Float)(((Bits)shifted + 127) << 23);
    return x < -87.33f ? Float{} : mantissa * power;
}

// exp(x) - 1 - x for x in [LOWEST, HIGHEST], without cancellation near 0 (relative error of the fit 4e-9).
OREAL_INLINE Float exponential_after_line(Float x) {
    Float q = splat(2.77228341e-06f);
    q = q * x + 2.53548293e-05f;
    q = q * x + 0.000198440236f;
    q = q * x + 0.00138854520f;
    q = q * x + 0.00833331028f;
    q = q * x + 0.0416667345f;
    q = q * x + 0.166666670f;
    q = q * x + 0.499999998f;
    return absolute(x) < 1.0f ? x * x * q : exponential(x) - 1.0f - x;
}

// tanh(x) and its derivative 1 - tanh(x)^2, both with small relative error at both ends.
struct Tanh {
    Float value, slope;
};

OREAL_INLINE Tanh hyperbolic_tangent(Float x) {
    const Float e = exponential(at_least(-2.0f * absolute(x), LOWEST)), square = x * x;
    Float q = splat(-0.00566079448f);
    q = q * square + 0.0206020133f;
    q = q * square - 0.0537292320f;
    q = q * square + 0.133313290f;
    q = q * square - 0.333332783f;
    const Float far = (Float)((Bits)((1.0f - e) / (1.0f + e)) | ((Bits)x & 0x80000000));
    return {absolute(x) < 0.625f ? x + x * square * q : far, 4.0f * e / ((1.0f + e) * (1.0f + e))};
}

}  // namespace
