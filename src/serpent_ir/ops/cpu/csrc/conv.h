/* The depthwise 3x3 convolution before the scan, with its SiLU, forward and backward. It is a part of the network
 * beside the scan. PyTorch prepares weights and layouts in every call, which takes longer than the arithmetic on such
 * maps. */
#ifndef SERPENT_CONV_H
#define SERPENT_CONV_H

#include "scan.h"
#include "vec.h"

enum { TAPS = 9 };

/* The nine pixels around (row, x) of the image `from`, from channel c on. A pixel outside the image points to
 * `zeros`. */
ALWAYS_INLINE void neighbours(const conv_problem *p, const float *from, int64_t row, int64_t x, int64_t c,
                              const float *zeros, const float **to) {
    for (int i = 0; i < 3; i++) {
        int64_t at = row + i - p->padding;
        int inside = at >= 0 && at < p->height;
        const float *middle = inside ? from + (at * p->width + x) * p->channels + c : zeros;
        to[3 * i] = inside && x > 0 ? middle - p->channels : zeros;
        to[3 * i + 1] = middle;
        to[3 * i + 2] = inside && x + 1 < p->width ? middle + p->channels : zeros;
    }
}

/* The convolution at LANES channels. Three separate sums shorten the dependency chains. */
ALWAYS_INLINE vf convolve(const float *const *at, const vf *taps, vf bias) {
    vf sums[3] = {bias + vload(at[0]) * taps[0], vload(at[3]) * taps[3], vload(at[6]) * taps[6]};
    for (int i = 0; i < 3; i++)
        for (int j = 1; j < 3; j++) sums[i] = sums[i] + vload(at[3 * i + j]) * taps[3 * i + j];
    return (sums[0] + sums[1]) + sums[2];
}

/* Writes one row of out = SiLU(convolution + bias), or without SiLU. `number` counts rows through all images. */
ALWAYS_INLINE void conv_row(const conv_problem *p, int64_t number, const int silu) {
    const int64_t d = p->channels, row = number % p->rows;
    const float *from = p->from + number / p->rows * p->height * p->width * d, zeros[LANES] = {0}, *at[TAPS];
    float *out = p->out + number * p->width * d;
    for (int64_t c = 0; c < d; c += LANES) {
        vf taps[TAPS], bias = vload(p->taps + TAPS * d + c);
        for (int i = 0; i < TAPS; i++) taps[i] = vload(p->taps + i * d + c);
        for (int64_t x = 0; x < p->width; x++) {
            neighbours(p, from, row, x, c, zeros, at);
            vf z = convolve(at, taps, bias);
            vstore(out + x * d + c, silu ? z * sigmoid(z, exp_minus_abs(z)) : z);
        }
    }
}

static void conv(const conv_problem *p, int64_t number) {
    if (p->silu)
        conv_row(p, number, 1);
    else
        conv_row(p, number, 0);
}

/* The backward pass of that row. z is the convolution, computed again, and `grad` the gradient for SiLU(z). The
 * gradient for z goes to `out`. The row's sums for the gradients of the taps and the bias, (10, channels), go to
 * `sums`. */
static void pull_conv(const conv_problem *p, int64_t number, float *sums) {
    const int64_t d = p->channels, row = number % p->rows;
    const float *from = p->from + number / p->rows * p->height * p->width * d, zeros[LANES] = {0}, *at[TAPS];
    const float *grad = p->grad + number * p->width * d;
    float *out = p->out + number * p->width * d;
    for (int64_t c = 0; c < d; c += LANES) {
        vf taps[TAPS], bias = vload(p->taps + TAPS * d + c), grads[TAPS + 1];
        for (int i = 0; i < TAPS; i++) taps[i] = vload(p->taps + i * d + c);
        for (int i = 0; i <= TAPS; i++) grads[i] = vset(0.0f);
        for (int64_t x = 0; x < p->width; x++) {
            neighbours(p, from, row, x, c, zeros, at);
            vf z = convolve(at, taps, bias), s = sigmoid(z, exp_minus_abs(z));
            vf pulled = vload(grad + x * d + c) * (s + z * s * (1.0f - s));
            vstore(out + x * d + c, pulled);
            for (int i = 0; i < TAPS; i++) grads[i] = grads[i] + pulled * vload(at[i]);
            grads[TAPS] = grads[TAPS] + pulled;
        }
        for (int i = 0; i <= TAPS; i++) vstore(sums + i * d + c, grads[i]);
    }
}

#endif
