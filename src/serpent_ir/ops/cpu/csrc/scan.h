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
    GROUP = 16, /* channels that one task processes together: a cache line of floats */
    CHUNK = 32, /* positions whose values are packed into the first-level cache */
    PULLED = 2, /* groups that a backward task processes together (a pair), so their gradients of proj are added up */
    KEPT_FLOATS = 1 << 18, /* what a backward task keeps instead of computing it again: fits a second-level cache */
    DIRECTIONS = 4
};

/* One call. Maps are (batch, height, width, ...), contiguous; parameters as in serpent_ir.ops.ss2d. */
typedef struct {
    int64_t batch, height, width, channels, state, rank;
    const float *u, *proj, *dt_weight, *dt_bias, *A_log, *D;
    /* h before each chunk, (batch, direction, group, chunk, state, GROUP). The forward pass writes it, and the backward
     * pass reads it instead of walking forward again. NULL if nobody keeps it. */
    float *states;
    const float *grad_y; /* this and everything below belong to the backward pass */
    float *dproj;
    double *dparams; /* (batch, direction, group, rank + 2 + state, GROUP): rows of dt_weight, dt_bias, D, A_log */
    /* dproj before its sum over channels, for the directions and the pairs of channel groups of the current phase:
     * (direction, batch, pair, chunk of the direction's walk, rank + 2 state, CHUNK) */
    float *partial;
    int64_t k_begin, k_end, pair_begin, pair_end;
    int plain_A; /* A_log holds A itself, and its gradient is wanted */
} scan_problem;

static inline int64_t scan_length(const scan_problem *p) { return p->height * p->width; }
static inline int64_t scan_chunks(const scan_problem *p) { return (scan_length(p) + CHUNK - 1) / CHUNK; }
static inline int64_t scan_groups(const scan_problem *p) { return (p->channels + GROUP - 1) / GROUP; }
static inline int64_t scan_pairs(const scan_problem *p) { return (scan_groups(p) + PULLED - 1) / PULLED; }
static inline int64_t scan_row(const scan_problem *p) { return p->rank + 2 * p->state; }
static inline int64_t scan_states(const scan_problem *p) { return scan_chunks(p) * p->state * GROUP; } /* per group */
static inline int64_t scan_params(const scan_problem *p) { return p->rank + 2 + p->state; }

/* The pixels (row * width + column) of `count` steps of direction k, from step `first` on. Direction 0 walks row by row
 * and 1 column by column; 2 and 3 are those two backward. */
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

/* A task: one channel group of one image (in the backward pass the pair of groups that begins with it), in the
 * directions from k_begin to k_end. Its y (forward) or du (backward) is added to the map `out`. Only if `add` is unset
 * does the first direction overwrite instead. */
typedef struct {
    int64_t image, group, k_begin, k_end;
    float *out;
    int add;
} scan_task;

/* LayerNorm(y) SiLU(z), written over z if wanted. Maps are (pixels, channels), channels a multiple of GROUP. */
typedef struct {
    int64_t pixels, channels;
    const float *y, *weight, *bias, *z;
    float eps;
    float *out;
    const float *grad; /* this and everything below belong to the backward pass, which writes gradients of y and z */
    float *grad_y, *grad_z;
} gate_problem;

/* A depthwise 3x3 convolution from (images, height, width, channels) to (images, rows, width, channels), channels a
 * multiple of GROUP. It pads `padding` rows of zeros above and below, and one column of zeros at each side. */
typedef struct {
    int64_t images, height, width, channels, padding, rows;
    const float *from, *taps; /* taps: (9 taps and the bias, channels) */
    const float *grad;        /* backward: the gradient of the result */
    float *out;
    int silu;
} conv_problem;

/* Numbers in memory, float32, float16 or bfloat16: of a sequence (image, channel, position), or of B or C (image, group,
 * state, position). Strides count numbers; `of` is that of channels or states. */
enum { FLOAT32, FLOAT16, BFLOAT16 };
typedef struct {
    void *data; /* NULL if there is none */
    int64_t type, image, group, of, position;
} view;

/* The scan of sequences: the problem of `rank` 0 in one direction, where an image is one group of channels of a sequence,
 * and dt is given. */
typedef struct {
    scan_problem scan; /* A_log holds A */
    int64_t groups, shared_B, shared_C; /* groups of a sequence, and how many of them share a group of B, of C */
    view u, delta, z, B, C, out;
    const float *bias; /* NULL for 0; so may be scan.D */
    float *last;       /* (sequence, channel, state) */
    int softplus, grows;
    /* Backward: */
    view grad_out, grad_u, grad_delta, grad_z;
    const float *grad_last; /* NULL for 0 */
    view grad_B, grad_C;    /* if its `position` is 0, B or C is one value for each channel and state */
} sequence_problem;

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
    int64_t (*sequence_floats)(const scan_problem *p, int backward);
    /* For an image (see sequence_problem) and a pair of channel groups. */
    void (*forward_sequence)(const sequence_problem *s, int64_t image, int64_t pair, float *scratch);
    void (*backward_sequence)(const sequence_problem *s, int64_t image, int64_t pair, float *scratch);
    void (*write_row)(const view *v, int64_t first, int64_t count, const float *from);
} scan_kernels;

#endif
