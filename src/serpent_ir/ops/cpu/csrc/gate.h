/* LayerNorm of a map of pixels, times SiLU of its gate. It is a part of the network beside the scan. PyTorch reads and
 * writes the map three times for it; this does so once. */
#ifndef SERPENT_GATE_H
#define SERPENT_GATE_H

#include <math.h>

#include "scan.h"
#include "vec.h"

/* 1 / sqrt(squares / channels + eps) of LANES pixels. */
ALWAYS_INLINE void inverse_deviations(const float *squares, int64_t channels, float eps, float *to) {
    for (int i = 0; i < LANES; i++) to[i] = 1.0f / sqrtf(squares[i] / (float)channels + eps);
}

/* The mean and the inverse deviation of `count` pixels at y, at most LANES. Sums over the channels, whose number is a
 * multiple of GROUP, are taken in one transposition. `partial` holds LANES * LANES numbers, all finite. */
ALWAYS_INLINE void moments(const float *y, int64_t count, int64_t d, float eps, float *partial, float *means,
                           float *scales) {
    for (int64_t i = 0; i < count; i++) {
        vf sum = vset(0.0f);
        for (int64_t c = 0; c < d; c += LANES) sum = sum + vload(y + i * d + c);
        vstore(partial + i * LANES, sum);
    }
    sum_lanes(partial, means, LANES);
    for (int i = 0; i < LANES; i++) means[i] /= (float)d;
    for (int64_t i = 0; i < count; i++) {
        vf squares = vset(0.0f), mean = vset(means[i]);
        for (int64_t c = 0; c < d; c += LANES) {
            vf off = vload(y + i * d + c) - mean;
            squares = squares + off * off;
        }
        vstore(partial + i * LANES, squares);
    }
    sum_lanes(partial, scales, LANES);
    inverse_deviations(scales, d, eps, scales);
}

/* out[i] = LayerNorm(y[i]) z[i] sigmoid(z[i]) for pixels i from begin on. */
static void gate(const gate_problem *p, int64_t begin, int64_t end) {
    const int64_t d = p->channels;
    float partial[LANES * LANES] = {0}, means[LANES], scales[LANES];
    for (int64_t first = begin; first < end; first += LANES) {
        int64_t count = end - first < LANES ? end - first : LANES;
        const float *y = p->y + first * d, *z = p->z + first * d;
        float *out = p->out + first * d;
        moments(y, count, d, p->eps, partial, means, scales);
        for (int64_t i = 0; i < count; i++) {
            vf mean = vset(means[i]), scale = vset(scales[i]);
            for (int64_t c = 0; c < d; c += LANES) {
                vf normed = (vload(y + i * d + c) - mean) * scale * vload(p->weight + c) + vload(p->bias + c);
                vf gating = vload(z + i * d + c);
                vstore(out + i * d + c, normed * gating * sigmoid(gating, exp_minus_abs(gating)));
            }
        }
    }
}

/* The backward pass. n = (y - mean) scale, l = weight n + bias, s = sigmoid(z), out = l z s; g is the gradient for out:
 *
 *     grad_z = g l s (1 + z (1 - s))          grad_bias = sum of g z s, grad_weight = sum of g z s n
 *     m = g z s weight                        grad_y = scale (m - mean of m - n mean of m n), means over the channels
 *
 * sums: the sums of these pixels for grad_weight and grad_bias. */
static void pull_gate(const gate_problem *p, int64_t begin, int64_t end, float *sums) {
    const int64_t d = p->channels;
    float partial[LANES * LANES] = {0}, partial_n[LANES * LANES] = {0};
    float means[LANES], scales[LANES], of_m[LANES], of_mn[LANES];
    memset(sums, 0, 2 * d * sizeof(float));
    for (int64_t first = begin; first < end; first += LANES) {
        int64_t count = end - first < LANES ? end - first : LANES;
        const float *y = p->y + first * d;
        float *grad_y = p->grad_y + first * d;
        moments(y, count, d, p->eps, partial, means, scales);
        for (int64_t i = 0; i < count; i++) {
            vf mean = vset(means[i]), scale = vset(scales[i]), sum = vset(0.0f), sum_n = vset(0.0f);
            for (int64_t c = 0; c < d; c += LANES) {
                int64_t at = (first + i) * d + c;
                vf n = (vload(y + i * d + c) - mean) * scale, weight = vload(p->weight + c);
                vf l = n * weight + vload(p->bias + c), z = vload(p->z + at), g = vload(p->grad + at);
                vf s = sigmoid(z, exp_minus_abs(z)), silu = z * s, to_l = g * silu, m = to_l * weight;
                vstore(p->out + at, l * silu);
                vstore(p->grad_z + at, g * l * (s + silu * (1.0f - s)));
                vstore(grad_y + i * d + c, m);
                vstore(sums + c, vload(sums + c) + to_l * n);
                vstore(sums + d + c, vload(sums + d + c) + to_l);
                sum = sum + m;
                sum_n = sum_n + m * n;
            }
            vstore(partial + i * LANES, sum);
            vstore(partial_n + i * LANES, sum_n);
        }
        sum_lanes(partial, of_m, LANES);
        sum_lanes(partial_n, of_mn, LANES);
        for (int64_t i = 0; i < count; i++) {
            vf mean = vset(means[i]), scale = vset(scales[i]);
            vf of_all = vset(of_m[i] / (float)d), of_n = vset(of_mn[i] / (float)d);
            for (int64_t c = 0; c < d; c += LANES) {
                vf n = (vload(y + i * d + c) - mean) * scale, m = vload(grad_y + i * d + c);
                vstore(grad_y + i * d + c, scale * (m - of_all - n * of_n));
            }
        }
    }
}

#endif
