/* The interface to the scan of sequences: tasks, and sums over them in a fixed order. */
#include <string.h>

#include "driver.h"
#include "threads.h"

enum { VIEWS = 12, VIEW = 6, SIZES = 9 };

typedef struct {
    sequence_problem problem;
    const scan_kernels *kernels;
    float *scratch;
    int64_t scratch_floats, sequences;
    float *grad_A, *grad_D, *grad_bias; /* the last two may be NULL */
} sequence_call;

/* sizes: sequences, groups, channels of a group, positions, states, groups that share a B, a C, softplus, grows. views: u,
 * delta, z, B, C, out, grad_out, grad_u, grad_delta, grad_z, grad_B, grad_C, each as address, type and four strides. */
static sequence_call call_of(int level, const int64_t sizes[SIZES], const int64_t views[VIEWS * VIEW],
                             const float *const parameters[3]) {
    sequence_call c = {.kernels = kernels_at(level), .sequences = sizes[0]};
    sequence_problem *s = &c.problem;
    s->scan.batch = sizes[0] * sizes[1], s->scan.height = 1, s->scan.width = sizes[3];
    s->scan.channels = sizes[2], s->scan.state = sizes[4], s->scan.plain_A = 1;
    s->groups = sizes[1], s->shared_B = sizes[5], s->shared_C = sizes[6];
    s->softplus = (int)sizes[7], s->grows = (int)sizes[8];
    s->scan.A_log = parameters[0], s->scan.D = parameters[1], s->bias = parameters[2];
    view *const to[VIEWS] = {&s->u, &s->delta, &s->z, &s->B, &s->C, &s->out, &s->grad_out, &s->grad_u,
                             &s->grad_delta, &s->grad_z, &s->grad_B, &s->grad_C};
    for (int i = 0; i < VIEWS; i++) {
        const int64_t *from = views + i * VIEW;
        view v = {(void *)(intptr_t)from[0], from[1], from[2], from[3], from[4], from[5]};
        *to[i] = v;
    }
    return c;
}

static void forward_task(void *context, int64_t task, int thread) {
    const sequence_call *c = context;
    int64_t pairs = scan_pairs(&c->problem.scan);
    c->kernels->forward_sequence(&c->problem, task / pairs, task % pairs, c->scratch + thread * c->scratch_floats);
}

/* parameters: A, D, bias, of which the last two may be NULL. Writes out and the last states. */
EXPORT int serpent_scan_sequence_forward(int level, int threads, gomp_parallel *openmp, const int64_t sizes[SIZES],
                                         const int64_t views[VIEWS * VIEW], const float *const parameters[3],
                                         float *last) {
    sequence_call c = call_of(level, sizes, views, parameters);
    if (!c.kernels) return NO_LEVEL;
    c.problem.last = last;
    int64_t tasks = c.problem.scan.batch * scan_pairs(&c.problem.scan);
    int workers = clamp_threads(threads, tasks);
    c.scratch_floats = c.kernels->sequence_floats(&c.problem.scan, 0);
    block *memory = borrow(workers * c.scratch_floats);
    if (!memory) return NO_MEMORY;
    c.scratch = memory->from;
    run_tasks(forward_task, &c, tasks, workers, openmp);
    give_back(memory);
    return OK;
}

static void backward_task(void *context, int64_t task, int thread) {
    const sequence_call *c = context;
    int64_t pairs = scan_pairs(&c->problem.scan);
    c->kernels->backward_sequence(&c->problem, task / pairs, task % pairs, c->scratch + thread * c->scratch_floats);
}

/* A chunk of the gradient of B or C, for the states of one of its groups: the sum over the channel groups that share it. */
static void gather(const sequence_call *c, const view *to, int64_t shared, int64_t offset, int64_t task) {
    const scan_problem *p = &c->problem.scan;
    int64_t chunks = scan_chunks(p), pairs = scan_pairs(p), row = scan_row(p), chunk = task % chunks;
    int64_t first = task / chunks * shared, left = scan_length(p) - chunk * CHUNK, count = left < CHUNK ? left : CHUNK;
    int64_t group = first % c->problem.groups / shared, image = first / c->problem.groups;
    for (int64_t n = 0; n < p->state; n++) {
        float sums[CHUNK] = {0};
        for (int64_t i = 0; i < shared * pairs; i++) {
            const float *from = p->partial + (((first * pairs + i) * chunks + chunk) * row + offset + n) * CHUNK;
            for (int t = 0; t < CHUNK; t++) sums[t] += from[t];
        }
        c->kernels->write_row(to, image * to->image + group * to->group + n * to->of + chunk * CHUNK, count, sums);
    }
}

static void gather_B(void *context, int64_t task, int thread) {
    const sequence_call *c = context;
    (void)thread;
    gather(c, &c->problem.grad_B, c->problem.shared_B, 0, task);
}

static void gather_C(void *context, int64_t task, int thread) {
    const sequence_call *c = context;
    (void)thread;
    gather(c, &c->problem.grad_C, c->problem.shared_C, c->problem.scan.state, task);
}

/* The gradient of a B or C that is constant, for a channel (each is a group): the sum over sequences and positions. */
static void gather_constant(const sequence_call *c, const view *to, int64_t offset, int64_t channel) {
    const scan_problem *p = &c->problem.scan;
    int64_t chunks = scan_chunks(p), row = scan_row(p);
    for (int64_t n = 0; n < p->state; n++) {
        double sum = 0;
        for (int64_t image = 0; image < c->sequences; image++)
            for (int64_t chunk = 0; chunk < chunks; chunk++) {
                int64_t of_channel = image * c->problem.groups + channel, left = scan_length(p) - chunk * CHUNK;
                const float *from = p->partial + ((of_channel * chunks + chunk) * row + offset + n) * CHUNK;
                for (int64_t t = 0; t < (left < CHUNK ? left : CHUNK); t++) sum += from[t];
            }
        float result = (float)sum;
        c->kernels->write_row(to, channel * to->group + n * to->of, 1, &result);
    }
}

/* The gradients of a channel's parameters, added up over sequences in order. */
static void gather_channel(void *context, int64_t task, int thread) {
    const sequence_call *c = context;
    const sequence_problem *s = &c->problem;
    const scan_problem *p = &s->scan;
    int64_t image = task / p->channels, channel = task % p->channels, params = scan_params(p);
    (void)thread;
    for (int64_t i = 0; i < params; i++) {
        double sum = 0;
        for (int64_t sequence = 0; sequence < c->sequences; sequence++) {
            int64_t group = (sequence * s->groups + image) * scan_groups(p) + channel / GROUP;
            sum += p->dparams[(group * params + i) * GROUP + channel % GROUP];
        }
        if (i >= 2)
            c->grad_A[task * p->state + i - 2] = (float)sum;
        else if (i == 0 && c->grad_bias)
            c->grad_bias[task] = (float)sum;
        else if (i == 1 && c->grad_D)
            c->grad_D[task] = (float)sum;
    }
    if (!s->grad_B.position) gather_constant(c, &s->grad_B, 0, task);
    if (!s->grad_C.position) gather_constant(c, &s->grad_C, p->state, task);
}

/* grads: those of A, D and bias, of which the last two may be NULL. The others are among the views. grad_last may be
 * NULL. */
EXPORT int serpent_scan_sequence_backward(int level, int threads, gomp_parallel *openmp, const int64_t sizes[SIZES],
                                          const int64_t views[VIEWS * VIEW], const float *const parameters[3],
                                          const float *grad_last, float *const grads[3]) {
    sequence_call c = call_of(level, sizes, views, parameters);
    if (!c.kernels) return NO_LEVEL;
    sequence_problem *s = &c.problem;
    scan_problem *p = &s->scan;
    s->grad_last = grad_last;
    c.grad_A = grads[0], c.grad_D = grads[1], c.grad_bias = grads[2];
    int64_t tasks = p->batch * scan_pairs(p), chunks = scan_chunks(p);
    int workers = clamp_threads(threads, tasks);
    c.scratch_floats = c.kernels->sequence_floats(p, 1);
    int64_t scratch = workers * c.scratch_floats, partial = tasks * chunks * scan_row(p) * CHUNK;
    int64_t params = 2 * p->batch * scan_groups(p) * scan_params(p) * GROUP; /* doubles */
    block *memory = borrow(scratch + partial + params);
    if (!memory) return NO_MEMORY;
    c.scratch = memory->from;
    p->partial = c.scratch + scratch;
    p->dparams = (double *)(p->partial + partial);
    run_tasks(backward_task, &c, tasks, workers, openmp);
    tasks = p->batch / s->shared_B * chunks;
    if (s->grad_B.position) run_tasks(gather_B, &c, tasks, clamp_threads(threads, tasks), openmp);
    tasks = p->batch / s->shared_C * chunks;
    if (s->grad_C.position) run_tasks(gather_C, &c, tasks, clamp_threads(threads, tasks), openmp);
    tasks = s->groups * p->channels;
    run_tasks(gather_channel, &c, tasks, clamp_threads(threads, tasks), openmp);
    give_back(memory);
    return OK;
}
