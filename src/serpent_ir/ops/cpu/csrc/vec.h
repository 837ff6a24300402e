/* Vectors of floats of the native width of the dispatch level, and the few functions of them that the scan needs.
 *
 * GCC and Clang have vector types with operators. Elsewhere (MSVC) a "vector" is one float and the same code runs.
 * No function here loses a NaN, and none needs -ffast-math. */
#ifndef SERPENT_VEC_H
#define SERPENT_VEC_H

#include <stdint.h>
#include <string.h>

#if defined(__SSE__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#elif defined(__GNUC__)
#define LANES 4
#else
#define LANES 1
#endif

#if LANES > 1
typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
#define ALWAYS_INLINE static inline __attribute__((always_inline))
#else
typedef float vf;
typedef int32_t vi;
#define ALWAYS_INLINE static inline
#endif

ALWAYS_INLINE vf vload(const float *from) {
    vf x;
    memcpy(&x, from, sizeof x);
    return x;
}

ALWAYS_INLINE void vstore(float *to, vf x) { memcpy(to, &x, sizeof x); }

ALWAYS_INLINE vi bits_of(vf x) {
    vi b;
    memcpy(&b, &x, sizeof b);
    return b;
}

ALWAYS_INLINE vf from_bits(vi b) {
    vf x;
    memcpy(&x, &b, sizeof x);
    return x;
}

ALWAYS_INLINE vf vset(float x) {
    vf zero;
    memset(&zero, 0, sizeof zero);
    return x - zero;
}

/* max(x, low), or x if it is NaN: the x86 instruction returns its second operand in that case. */
ALWAYS_INLINE vf at_least(vf x, float low) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)vset(low), (__m512)x);
#elif defined(__AVX__)
    return (vf)_mm256_max_ps((__m256)vset(low), (__m256)x);
#elif LANES == 4 && defined(__SSE__)
    return (vf)_mm_max_ps((__m128)vset(low), (__m128)x);
#elif LANES > 1
    vi below = x < vset(low);
    return from_bits((bits_of(vset(low)) & below) | (bits_of(x) & ~below));
#else
    return x < low ? low : x;
#endif
}

/* 2^f for f in [-1/2, 1/2] as 1 + f q(f). q is a minimax fit with a relative error of 1.1e-8, so that for decays close
 * to 1 (long memory) the relative error of 1 - 2^f stays small too. */
ALWAYS_INLINE vf exp2_fraction(vf f) {
    vf q = vset(1.54035137e-4f);
    q = q * f + 1.33907355e-3f;
    q = q * f + 9.61823749e-3f;
    q = q * f + 5.55035743e-2f;
    q = q * f + 2.40226498e-1f;
    q = q * f + 6.93147188e-1f;
    return q * f + 1.0f;
}

/* Adding ROUND rounds to an integer n and leaves 127 + n in the low bits of the sum, which is the exponent field of
 * 2^n. */
#define ROUND (12582912.0f + 127.0f)

ALWAYS_INLINE vf power_of_two(vf rounded) { return from_bits(bits_of(rounded) << 23); }

/* 2^x for x <= 0, but never below 2^-126. */
ALWAYS_INLINE vf exp2_decay(vf x) {
    x = at_least(x, -126.0f);
    vf rounded = x + ROUND;
    vf f = x - (rounded - ROUND);
    return exp2_fraction(f) * power_of_two(rounded);
}

/* The same for any x: infinity from 2^128 on. */
ALWAYS_INLINE vf exp2_any(vf x) { return exp2_decay(-at_least(-x, -128.0f)); }

/* e^z for z from -87 to 88. The reduction is in two parts, since an error in z log2(e) would grow with |z|. */
ALWAYS_INLINE vf exp_in_range(vf z) {
    vf rounded = z * 1.44269504f + ROUND;
    vf n = rounded - ROUND;
    vf r = z - n * 0.693359375f; /* exact, since the constant has few bits */
    r = r + n * 2.12194440e-4f;
    return exp2_fraction(r * 1.44269504f) * power_of_two(rounded);
}

ALWAYS_INLINE vf exp_minus_abs(vf z) { return exp_in_range(at_least(from_bits(bits_of(z) | INT32_MIN), -87.0f)); }

/* e^z; beyond the ends of that range, the value at the end. */
ALWAYS_INLINE vf exp_clamped(vf z) { return exp_in_range(-at_least(-at_least(z, -87.0f), -88.0f)); }

/* 1 / (1 + e^-z), with e = e^-|z|. */
ALWAYS_INLINE vf sigmoid(vf z, vf e) {
    vi negative = bits_of(z) >> 31;
    vi numerator = (bits_of(e) & negative) | (bits_of(vset(1.0f)) & ~negative);
    return from_bits(numerator) / (e + 1.0f);
}

/* log(1 + e^z) = max(z, 0) + log(1 + e) with e = e^-|z|. log(1 + e) = 2 atanh(e / (2 + e)) stays precise for small e,
 * that is, for small time steps. `slope`, unless NULL, receives the derivative 1 / (1 + e^-z). */
ALWAYS_INLINE vf softplus(vf z, vf *slope) {
    vf e = exp_minus_abs(z);
    vf s = e / (e + 2.0f);
    vf w = s * s;
    vf p = vset(2.79379409e-1f); /* minimax fit to 5e-9 for w in [0, 1/9] */
    p = p * w + 2.80186781e-1f;
    p = p * w + 4.00203320e-1f;
    p = p * w + 6.66664418e-1f;
    p = p * w + 2.0f;
    if (slope) *slope = sigmoid(z, e);
    return at_least(z, 0.0f) + s * p;
}

#if LANES > 1
/* In every block of four: the sums of neighbours of a, then the sums of neighbours of b. */
#if LANES == 4
#define PAIRS(first) 0 + first, 2 + first, 4 + first, 6 + first
#elif LANES == 8
#define PAIRS(f) 0 + f, 2 + f, 8 + f, 10 + f, 4 + f, 6 + f, 12 + f, 14 + f
#define BLOCKS(f) 0 + f, 1 + f, 2 + f, 3 + f, 8 + f, 9 + f, 10 + f, 11 + f
#else
#define PAIRS(f) \
    0 + f, 2 + f, 16 + f, 18 + f, 4 + f, 6 + f, 20 + f, 22 + f, 8 + f, 10 + f, 24 + f, 26 + f, 12 + f, 14 + f, \
        28 + f, 30 + f
#define BLOCKS(f) \
    0 + f, 1 + f, 2 + f, 3 + f, 8 + f, 9 + f, 10 + f, 11 + f, 16 + f, 17 + f, 18 + f, 19 + f, 24 + f, 25 + f, \
        26 + f, 27 + f
#endif
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#if !defined(SHUFFLE)
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

ALWAYS_INLINE vf add_pairs(vf a, vf b) { return SHUFFLE(a, b, PAIRS(0)) + SHUFFLE(a, b, PAIRS(1)); }
#if LANES > 4
ALWAYS_INLINE vf add_blocks(vf a, vf b) { return SHUFFLE(a, b, BLOCKS(0)) + SHUFFLE(a, b, BLOCKS(4)); }
#endif
#endif

/* Sums each row of LANES floats, by a transposition that adds on the way. */
#if LANES > 1
ALWAYS_INLINE vf sums_of_2(const float *rows) { return add_pairs(vload(rows), vload(rows + LANES)); }
ALWAYS_INLINE vf sums_of_4(const float *rows) { return add_pairs(sums_of_2(rows), sums_of_2(rows + 2 * LANES)); }
#endif
#if LANES > 4
ALWAYS_INLINE vf sums_of_8(const float *rows) { return add_blocks(sums_of_4(rows), sums_of_4(rows + 4 * LANES)); }
#endif
#if LANES > 8
ALWAYS_INLINE vf sums_of_16(const float *rows) { return add_blocks(sums_of_8(rows), sums_of_8(rows + 8 * LANES)); }
#define SUMS_OF_ROWS sums_of_16
#elif LANES > 4
#define SUMS_OF_ROWS sums_of_8
#elif LANES > 1
#define SUMS_OF_ROWS sums_of_4
#else
#define SUMS_OF_ROWS vload
#endif

/* sums[t] = the sum of the LANES floats of row t, for t < count. Up to LANES - 1 sums more are written. */
ALWAYS_INLINE void sum_lanes(const float *rows, float *sums, int64_t count) {
    for (int64_t t = 0; t < count; t += LANES) vstore(sums + t, SUMS_OF_ROWS(rows + t * LANES));
}

#endif
