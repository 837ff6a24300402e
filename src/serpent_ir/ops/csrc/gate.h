/* LayerNorm of a map of pixels, times SiLU of its gate: a part of the network beside the scan, which PyTorch takes
 * through memory three times, and this once. */
#ifndef SERPENT_GATE_H
#define SERPENT_GATE_H

#include <math.h>

#include "scan.h"
#include "vec.h"

/* 1 / sqrt(squares / channels + eps) of LANES pixels. */
ALWAYS_INLINE void inverse_deviations(const float *squares, int64_t channels, float eps, float *to) {
    for (int i = 0; i < LANES; i++) to[i] = 1.0f / sqrtf(squares[i] / (float)channels + eps);
}

/* z[i] = LayerNorm(y[i]) z[i] sigmoid(z[i]) for pixels i from begin on, LANES of them side by side: the sums over
 * their channels, a multiple of GROUP, are taken in one transposition. */
static void gate(const gate_problem *p, int64_t begin, int64_t end) {
    const int64_t d = p->channels;
    float partial[LANES * LANES] = {0}, means[LANES], scales[LANES];
    for (int64_t first = begin; first < end; first += LANES) {
        int64_t count = end - first < LANES ? end - first : LANES;
        const float *y = p->y + first * d;
        float *z = p->z + first * d;
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
        inverse_deviations(scales, d, p->eps, scales);
        for (int64_t i = 0; i < count; i++) {
            vf mean = vset(means[i]), scale = vset(scales[i]);
            for (int64_t c = 0; c < d; c += LANES) {
                vf normed = (vload(y + i * d + c) - mean) * scale * vload(p->weight + c) + vload(p->bias + c);
                vf gating = vload(z + i * d + c);
                vstore(z + i * d + c, normed * gating * sigmoid(gating, exp_minus_abs(gating)));
            }
        }
    }
}

#endif
