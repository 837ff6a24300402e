/* The interface to the parts of the network beside the scan: the gate and the convolution. */
#include <string.h>

#include "driver.h"
#include "threads.h"

/* to[i] = the sum of column i over `count` rows of `width` numbers, a multiple of GROUP. Summed in double, in row
 * order. */
static void add_up(const float *rows, int64_t count, int64_t width, float *to) {
    for (int64_t first = 0; first < width; first += GROUP) {
        double sums[GROUP] = {0};
        for (int64_t row = 0; row < count; row++)
            for (int i = 0; i < GROUP; i++) sums[i] += rows[row * width + first + i];
        for (int i = 0; i < GROUP; i++) to[first + i] = (float)sums[i];
    }
}

typedef struct {
    gate_problem problem;
    const scan_kernels *kernels;
    float *sums; /* backward: (task, 2, channels) */
} gate_call;

enum { GATED = 256 }; /* pixels per task */

static int64_t gate_tasks(int64_t pixels) { return (pixels + GATED - 1) / GATED; }

static void gate_task(void *context, int64_t task, int thread) {
    const gate_call *c = context;
    int64_t begin = task * GATED, left = c->problem.pixels - begin, end = begin + (left < GATED ? left : GATED);
    (void)thread;
    if (c->sums)
        c->kernels->pull_gate(&c->problem, begin, end, c->sums + task * 2 * c->problem.channels);
    else
        c->kernels->gate(&c->problem, begin, end);
}

/* out = LayerNorm(y) SiLU(z), for maps of (pixels, channels) with a multiple of 16 channels; out may be z. */
EXPORT int serpent_scan_gate(int level, int threads, gomp_parallel *openmp, int64_t pixels, int64_t channels,
                             const float *y, const float *weight, const float *bias, float eps, const float *z,
                             float *out) {
    gate_call c = {{pixels, channels, y, weight, bias, z, eps, out, NULL, NULL, NULL}, kernels_at(level), NULL};
    if (!c.kernels) return NO_LEVEL;
    run_tasks(gate_task, &c, gate_tasks(pixels), clamp_threads(threads, gate_tasks(pixels)), openmp);
    return OK;
}

/* Given `grad`, the gradient for out, writes the gradients of y, of z, and of weight and bias (one after the other in
 * grad_affine). Also writes out again, so that it need not be kept. */
EXPORT int serpent_scan_gate_backward(int level, int threads, gomp_parallel *openmp, int64_t pixels, int64_t channels,
                                      const float *y, const float *weight, const float *bias, float eps,
                                      const float *z, const float *grad, float *out, float *grad_y, float *grad_z,
                                      float *grad_affine) {
    gate_call c = {{pixels, channels, y, weight, bias, z, eps, out, grad, grad_y, grad_z}, kernels_at(level), NULL};
    if (!c.kernels) return NO_LEVEL;
    int64_t tasks = gate_tasks(pixels);
    block *memory = borrow(tasks * 2 * channels);
    if (!memory) return NO_MEMORY;
    c.sums = memory->from;
    run_tasks(gate_task, &c, tasks, clamp_threads(threads, tasks), openmp);
    add_up(c.sums, tasks, 2 * channels, grad_affine);
    give_back(memory);
    return OK;
}

typedef struct {
    conv_problem problem;
    const scan_kernels *kernels;
    float *sums; /* backward: (row of all images, 10, channels) */
} conv_call;

enum { WITH_BIAS = 10 };

static void conv_task(void *context, int64_t task, int thread) {
    const conv_call *c = context;
    (void)thread;
    if (c->sums)
        c->kernels->pull_conv(&c->problem, task, c->sums + task * WITH_BIAS * c->problem.channels);
    else
        c->kernels->conv(&c->problem, task);
}

/* out = SiLU(convolution). sizes: images, height, width, channels, padding. taps: (10, channels), the bias last. */
EXPORT int serpent_scan_conv(int level, int threads, gomp_parallel *openmp, const int64_t sizes[5], const float *from,
                             const float *taps, float *out) {
    int64_t rows = sizes[1] - 2 + 2 * sizes[4], tasks = sizes[0] * rows;
    conv_call c = {{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], rows, from, taps, NULL, out, 1},
                   kernels_at(level), NULL};
    if (!c.kernels) return NO_LEVEL;
    run_tasks(conv_task, &c, tasks, clamp_threads(threads, tasks), openmp);
    return OK;
}

/* Given `grad`, the gradient for out with padding 1, writes the gradients of `from` and of the taps and the bias. */
EXPORT int serpent_scan_conv_backward(int level, int threads, gomp_parallel *openmp, const int64_t sizes[5],
                                      const float *from, const float *taps, const float *grad, float *grad_from,
                                      float *grad_taps) {
    int64_t d = sizes[3], tasks = sizes[0] * sizes[1], map = tasks * sizes[2] * d, row = WITH_BIAS * d;
    conv_call c = {{sizes[0], sizes[1], sizes[2], d, 1, sizes[1], from, taps, grad, NULL, 0}, kernels_at(level), NULL};
    if (!c.kernels) return NO_LEVEL;
    block *memory = borrow(map + (tasks + 1) * row);
    if (!memory) return NO_MEMORY;
    float *turned = memory->from + map;
    c.problem.out = memory->from;
    c.sums = turned + row;
    run_tasks(conv_task, &c, tasks, clamp_threads(threads, tasks), openmp);
    add_up(c.sums, tasks, row, grad_taps);
    /* The gradient of the input is the same convolution, with its taps reversed, of the gradient before SiLU. */
    for (int i = 0; i < WITH_BIAS - 1; i++) memcpy(turned + i * d, taps + (WITH_BIAS - 2 - i) * d, d * sizeof(float));
    memset(turned + (WITH_BIAS - 1) * d, 0, d * sizeof(float));
    c.problem.from = memory->from, c.problem.taps = turned, c.problem.out = grad_from;
    c.sums = NULL;
    run_tasks(conv_task, &c, tasks, clamp_threads(threads, tasks), openmp);
    give_back(memory);
    return OK;
}
