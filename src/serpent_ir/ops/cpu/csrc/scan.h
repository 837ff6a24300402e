/* What the kernels of every dispatch level and the driver (driver.c) share. All floats are float32. */
#ifndef SERPENT_SCAN_H
#define SERPENT_SCAN_H

#include <stdint.h>

#if defined(__GNUC__)
#define PREFETCH(from) __builtin_prefetch(from)
#else
#define PREFETCH(from) ((void)(from))
#endif

enum {
    GROUP = 16, /* channels that one task walks side by side: a cache line of floats */
    CHUNK = 32, /* positions whose values are packed in the first level cache */
    PULLED = 2, /* groups that a backward task takes side by side, a pair: their gradients of proj leave it added up */
    KEPT_FLOATS = 1 << 18, /* what a backward task keeps rather than compute again: a second level cache */
    DIRECTIONS = 4
};

/* One call. Maps are (batch, height, width, ...), contiguous; parameters as in serpent_ir.ops.ss2d. */
typedef struct {
    int64_t batch, height, width, channels, state, rank;
    const float *u, *proj, *dt_weight, *dt_bias, *A_log, *D;
    /* h before each chunk, (batch, direction, group, chunk, state, GROUP): written by the forward pass and read by the
     * backward pass instead of walking there again; NULL where nobody keeps them. */
    float *states;
    const float *grad_y; /* this and what follows: the backward pass's */
    float *dproj;
    double *dparams; /* (batch, direction, group, rank + 2 + state, GROUP): rows of dt_weight, dt_bias, D, A_log */
    /* dproj before its sum over channels, for the directions and pairs of channel groups of the current phase:
     * (direction, batch, pair, chunk of the direction's walk, rank + 2 state, CHUNK) */
    float *partial;
    int64_t k_begin, k_end, pair_begin, pair_end;
} scan_problem;

static inline int64_t scan_length(const scan_problem *p) { return p->height * p->width; }
static inline int64_t scan_chunks(const scan_problem *p) { return (scan_length(p) + CHUNK - 1) / CHUNK; }
static inline int64_t scan_groups(const scan_problem *p) { return (p->channels + GROUP - 1) / GROUP; }
static inline int64_t scan_pairs(const scan_problem *p) { return (scan_groups(p) + PULLED - 1) / PULLED; }
static inline int64_t scan_row(const scan_problem *p) { return p->rank + 2 * p->state; }
static inline int64_t scan_states(const scan_problem *p) { return scan_chunks(p) * p->state * GROUP; } /* of a group */
static inline int64_t scan_params(const scan_problem *p) { return p->rank + 2 + p->state; }

/* Where `count` steps of direction k from step `first` on fall: pixel numbers row * width + column.
 * 0 walks row by row, 1 column by column, 2 and 3 are those two backwards. */
static inline void scan_pixels(const scan_problem *p, int64_t k, int64_t first, int64_t count, int64_t *pixel) {
    int64_t forward = k < 2 ? first : scan_length(p) - 1 - first;
    int64_t step = k < 2 ? 1 : -1;
    if (k % 2 == 0) {
        for (int64_t t = 0; t < count; t++) pixel[t] = forward + step * t;
        return;
    }
    int64_t column = forward / p->height, row = forward % p->height;
    for (int64_t t = 0; t < count; t++) {
        pixel[t] = row * p->width + column;
        row += step;
        if (row == p->height) {
            row = 0;
            column++;
        } else if (row < 0) {
            row = p->height - 1;
            column--;
        }
    }
}

/* One channel group of one image, backward the pair that begins with it, in the directions from k_begin to k_end, whose
 * y (forward) or du (backward) goes to the map `out`: added to it, but by the first direction only if `add`. */
typedef struct {
    int64_t image, group, k_begin, k_end;
    float *out;
    int add;
} scan_task;

/* LayerNorm(y) SiLU(z), which may lie over z; maps are (pixels, channels), channels a multiple of GROUP. */
typedef struct {
    int64_t pixels, channels;
    const float *y, *weight, *bias, *z;
    float eps;
    float *out;
    const float *grad; /* this and what follows: the backward pass's, which writes gradients of y and z */
    float *grad_y, *grad_z;
} gate_problem;

/* A depthwise 3x3 convolution: from (images, height, width, channels) to (images, rows, width, channels), channels a
 * multiple of GROUP, with `padding` rows of zeros above and below and a column of them at each side. */
typedef struct {
    int64_t images, height, width, channels, padding, rows;
    const float *from, *taps; /* taps: (9 and the bias, channels) */
    const float *grad;        /* backward: of the result */
    float *out;
    int silu;
} conv_problem;

/* One dispatch level: kernels.c compiled for one instruction set. */
typedef struct {
    const char *name;
    int64_t (*scratch_floats)(const scan_problem *p, int backward);
    void (*forward)(const scan_problem *p, const scan_task *task, float *scratch);
    void (*backward)(const scan_problem *p, const scan_task *task, float *scratch);
    void (*gate)(const gate_problem *p, int64_t begin, int64_t end);
    void (*pull_gate)(const gate_problem *p, int64_t begin, int64_t end, float *sums);
    void (*conv)(const conv_problem *p, int64_t number);
    void (*pull_conv)(const conv_problem *p, int64_t number, float *sums);
} scan_kernels;

#endif
