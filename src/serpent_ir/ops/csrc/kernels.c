/* The scan of one channel group of one image; compiled once for each dispatch level (LEVEL names it).
 *
 * For every direction k, along its walk over the pixels, channel by channel:
 *
 *     dt = softplus(dt_weight . low + dt_bias)        low, B, C: the pixel's row of proj for this direction
 *     h  = exp(A dt) h + dt u B                       A = -exp(A_log); h has `state` numbers
 *     y += C . h + D u
 *
 * Arrays in the scratch are [...][GROUP], the channel innermost; vectors cut a group into GROUP / LANES parts. Lanes
 * past the last channel hold zeros, and dt = 0 there, so that they add nothing anywhere. */
#include <math.h>

#include "scan.h"
#include "vec.h"

#define JOIN(a, b) a##b
#define NAMED(level) JOIN(scan_kernels_, level)
#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)

enum { SUMS = 4 };

typedef struct {
    /* Of the direction and group: */
    float *A, *A_log2e, *weight; /* [state][], [state][], [rank][] */
    float *bias, *D;
    int64_t k, width; /* channels in the group, GROUP but for the last */
    /* The first pixel's values of the image, group and direction; `touched` are more maps to have at hand, or NULL: */
    const float *from_u, *from_rows, *touched[2];
    /* Of the chunk, [CHUNK][] each: */
    float *u, *dt, *dtu, *slope, *grad_y;
    float *grad_dt, *grad_dtu; /* [SUMS][CHUNK][]: several sums over the states, since rounding grows with a sum */
    float *rows; /* [CHUNK][rank + 2 state] */
    int64_t pixel[CHUNK], count;
    int64_t next[CHUNK], next_count; /* the chunk to come */
    /* States, [state][]: */
    float *h, *grad_h;
    /* Backward, for two states at a time, [2][CHUNK][]: */
    float *decay, *before, *products_B, *products_C;
    float *sums;   /* [scan_params][] parameter gradients of a chunk */
    float *starts; /* [chunks][state][] states at the starts of chunks */
} workspace;

static float *take(float *base, int64_t *used, int64_t floats) {
    float *here = base ? base + *used : 0;
    *used += (floats + GROUP - 1) / GROUP * GROUP;
    return here;
}

/* Lays the workspace out from `base` on and returns its size; with base = NULL it only measures. */
static int64_t lay_out(workspace *ws, const scan_problem *p, int backward, float *base) {
    int64_t used = 0, states = p->state * GROUP, chunk = CHUNK * GROUP;
    ws->A = take(base, &used, states);
    ws->A_log2e = take(base, &used, states);
    ws->weight = take(base, &used, p->rank * GROUP);
    ws->bias = take(base, &used, GROUP);
    ws->D = take(base, &used, GROUP);
    ws->u = take(base, &used, chunk);
    ws->dt = take(base, &used, chunk);
    ws->dtu = take(base, &used, chunk);
    ws->rows = take(base, &used, CHUNK * scan_row(p));
    ws->h = take(base, &used, states);
    if (backward) {
        ws->slope = take(base, &used, chunk);
        ws->grad_y = take(base, &used, chunk);
        ws->grad_dt = take(base, &used, SUMS * chunk);
        ws->grad_dtu = take(base, &used, SUMS * chunk);
        ws->grad_h = take(base, &used, states);
        ws->decay = take(base, &used, 2 * chunk);
        ws->before = take(base, &used, 2 * chunk);
        ws->products_B = take(base, &used, 2 * chunk);
        ws->products_C = take(base, &used, 2 * chunk);
        ws->sums = take(base, &used, scan_params(p) * GROUP);
        ws->starts = take(base, &used, scan_chunks(p) * states);
    }
    return used;
}

static int64_t scratch_floats(const scan_problem *p, int backward) {
    workspace ws;
    return lay_out(&ws, p, backward, 0);
}

/* Puts the pixels of a chunk into ws->next; none, where the walk ends. */
ALWAYS_INLINE void look_ahead(workspace *ws, const scan_problem *p, int64_t chunk) {
    int64_t left = chunk < 0 ? 0 : scan_length(p) - chunk * CHUNK;
    ws->next_count = left < 0 ? 0 : left < CHUNK ? left : CHUNK;
    scan_pixels(p, ws->k, chunk * CHUNK, ws->next_count, ws->next);
}

/* Makes ready for a walk of direction k that begins with the given chunk. */
ALWAYS_INLINE void begin_walk(workspace *ws, const scan_problem *p, int64_t image, int64_t group, int64_t k, int64_t chunk,
                       const float *touched, const float *touched_too) {
    int64_t length = scan_length(p);
    ws->k = k;
    ws->from_u = p->u + image * length * p->channels + group * GROUP;
    ws->from_rows = p->proj + (image * length * DIRECTIONS + k) * scan_row(p);
    ws->touched[0] = touched, ws->touched[1] = touched_too;
    look_ahead(ws, p, chunk);
}

static void load_parameters(workspace *ws, const scan_problem *p, int64_t k, int64_t group) {
    int64_t first = group * GROUP;
    ws->width = p->channels - first < GROUP ? p->channels - first : GROUP;
    for (int64_t lane = 0; lane < GROUP; lane++) {
        int inside = lane < ws->width;
        int64_t channel = k * p->channels + (inside ? first + lane : 0);
        for (int64_t n = 0; n < p->state; n++) {
            float A = inside ? -expf(p->A_log[channel * p->state + n]) : 0.0f;
            ws->A[n * GROUP + lane] = A;
            ws->A_log2e[n * GROUP + lane] = (float)(A * 1.4426950408889634);
        }
        for (int64_t r = 0; r < p->rank; r++)
            ws->weight[r * GROUP + lane] = inside ? p->dt_weight[channel * p->rank + r] : 0.0f;
        ws->bias[lane] = inside ? p->dt_bias[channel] : 0.0f;
        ws->D[lane] = inside ? p->D[channel] : 0.0f;
    }
}

/* A pixel's channels of this group: to or from 16 lanes. The full group is a copy of constant size. */
ALWAYS_INLINE void load_lanes(float *lanes, const float *from, int64_t width) {
    if (width == GROUP) {
        memcpy(lanes, from, GROUP * sizeof(float));
        return;
    }
    for (int64_t i = 0; i < GROUP; i++) lanes[i] = i < width ? from[i] : 0.0f;
}

ALWAYS_INLINE void store_lanes(float *to, const float *lanes, int64_t width, int add) {
    if (width == GROUP) {
        for (int v = 0; v < GROUP; v += LANES)
            vstore(to + v, add ? vload(to + v) + vload(lanes + v) : vload(lanes + v));
        return;
    }
    for (int64_t i = 0; i < width; i++) to[i] = add ? to[i] + lanes[i] : lanes[i];
}

/* Packs the chunk that was ahead, the rows of proj and u at its pixels, from any distance apart to side by side; the
 * next one is `chunk`. */
ALWAYS_INLINE void load_chunk(workspace *ws, const scan_problem *p, int64_t chunk) {
    int64_t row = scan_row(p);
    ws->count = ws->next_count;
    memcpy(ws->pixel, ws->next, sizeof ws->pixel);
    look_ahead(ws, p, chunk);
    for (int64_t t = 0; t < ws->count; t++) {
        const float *from = ws->from_rows + ws->pixel[t] * DIRECTIONS * row;
        for (int64_t i = 0; i < row; i++) ws->rows[t * row + i] = from[i];
        load_lanes(ws->u + t * GROUP, ws->from_u + ws->pixel[t] * p->channels, ws->width);
    }
}

/* Asks for what step t of the chunk to come will read, while this one keeps the processor busy. A group's share of a
 * pixel is one cache line, the next pixel's lies d lines on, or a row of the map: no hardware foresees that, and with
 * maps beyond the second level cache waiting would double the time. */
ALWAYS_INLINE void fetch(const workspace *ws, const scan_problem *p, int64_t t) {
    int64_t pixel = ws->next[t], row = scan_row(p);
    const float *rows = ws->from_rows + pixel * DIRECTIONS * row;
    if (t >= ws->next_count) return;
    PREFETCH(ws->from_u + pixel * p->channels);
    for (int64_t i = 0; i < row; i += GROUP) PREFETCH(rows + i);
    PREFETCH(rows + row - 1);
    for (int i = 0; i < 2; i++)
        if (ws->touched[i]) PREFETCH(ws->touched[i] + pixel * p->channels);
}

ALWAYS_INLINE void time_steps(workspace *ws, const scan_problem *p, int want_slope) {
    int64_t row = scan_row(p);
    for (int v = 0; v < GROUP; v += LANES) {
        for (int64_t t = 0; t < ws->count; t++) {
            vf z = vset(0.0f), slope;
            if (v == 0) fetch(ws, p, t);
            for (int64_t r = 0; r < p->rank; r++) z = z + vload(ws->weight + r * GROUP + v) * ws->rows[t * row + r];
            /* The bias last: it is the largest term, and would round every sum after it. */
            vf dt = softplus(z + vload(ws->bias + v), want_slope ? &slope : 0);
            vstore(ws->dt + t * GROUP + v, dt);
            vstore(ws->dtu + t * GROUP + v, dt * vload(ws->u + t * GROUP + v));
            if (want_slope) vstore(ws->slope + t * GROUP + v, slope);
        }
    }
    if (ws->width == GROUP) return;
    for (int64_t t = 0; t < ws->count; t++)
        for (int64_t i = ws->width; i < GROUP; i++) {
            ws->dt[t * GROUP + i] = ws->dtu[t * GROUP + i] = 0.0f;
            if (want_slope) ws->slope[t * GROUP + i] = 0.0f;
        }
}

/* One step of `states` states from n on, added to as many sums y. */
ALWAYS_INLINE void step_states(workspace *ws, const float *B, const float *C, vf dt, vf dtu, int64_t at, vf *y,
                               const int states) {
    for (int i = 0; i < states; i++) {
        float *state = ws->h + at + i * GROUP;
        vf h = exp2_decay(dt * vload(ws->A_log2e + at + i * GROUP)) * vload(state) + dtu * B[i];
        vstore(state, h);
        if (C) y[i] = y[i] + h * C[i];
    }
}

/* The recurrence over a chunk from ws->h on; y, where wanted, is written over ws->dt, which has served by then.
 * Four sums of y: shorter chains, and smaller rounding errors than one long sum. */
ALWAYS_INLINE void walk_chunk(workspace *ws, const scan_problem *p, const int want_y) {
    int64_t row = scan_row(p), state = p->state;
    for (int v = 0; v < GROUP; v += LANES) {
        vf D = vload(ws->D + v);
        for (int64_t t = 0; t < ws->count; t++) {
            const float *B = ws->rows + t * row + p->rank, *C = B + state;
            vf dt = vload(ws->dt + t * GROUP + v), dtu = vload(ws->dtu + t * GROUP + v);
            vf y[4] = {D * vload(ws->u + t * GROUP + v), vset(0.0f), vset(0.0f), vset(0.0f)};
            int64_t n = 0;
            for (; n + 4 <= state; n += 4)
                step_states(ws, B + n, want_y ? C + n : 0, dt, dtu, n * GROUP + v, y, 4);
            for (; n < state; n++)
                step_states(ws, B + n, want_y ? C + n : 0, dt, dtu, n * GROUP + v, y + 3, 1);
            if (want_y) vstore(ws->dt + t * GROUP + v, (y[0] + y[1]) + (y[2] + y[3]));
        }
    }
}

static void forward(const scan_problem *p, const scan_task *task, float *scratch) {
    workspace ws;
    int64_t image = task->image, group = task->group;
    float *y = task->out + image * scan_length(p) * p->channels + group * GROUP;
    lay_out(&ws, p, 0, scratch);
    for (int64_t k = task->k_begin; k < task->k_end; k++) {
        int add = task->add || k > task->k_begin;
        load_parameters(&ws, p, k, group);
        memset(ws.h, 0, p->state * GROUP * sizeof(float));
        begin_walk(&ws, p, image, group, k, 0, y, 0);
        for (int64_t chunk = 0; chunk < scan_chunks(p); chunk++) {
            load_chunk(&ws, p, chunk + 1);
            time_steps(&ws, p, 0);
            walk_chunk(&ws, p, 1);
            for (int64_t t = 0; t < ws.count; t++)
                store_lanes(y + ws.pixel[t] * p->channels, ws.dt + t * GROUP, ws.width, add);
        }
    }
}

/* `states` states from n on, through a chunk and back. With g the gradient of the loss for h[t], all that follows it
 * included:
 *
 *     forth:  h[t] = a[t] h[t-1] + dtu[t] B[t]              dC[t] = sum over channels of grad_y[t] h[t]
 *     back:   g += C[t] grad_y[t]                           dB[t] = sum over channels of g dtu[t]
 *             grad_dtu[t] += g B[t]                         e = g a[t] h[t-1]: the gradient for A dt
 *             grad_dt[t] += e A,  dA += e dt[t]             g = g a[t], handed to t - 1
 *
 * Two states at a time hide the latency of g's chain and halve the traffic of what they share. */
ALWAYS_INLINE void pull_states(workspace *ws, const scan_problem *p, int64_t n, int v, const int states) {
    int64_t row = scan_row(p);
    const float *B = ws->rows + p->rank + n, *C = B + p->state;
    float *decay = ws->decay + v, *before = ws->before + v;
    int64_t sum = n / 2 % SUMS * CHUNK * GROUP + v;
    vf h[2], A_log2e[2], A[2], g[2], dA[2];
    for (int i = 0; i < states; i++) {
        h[i] = vload(ws->h + (n + i) * GROUP + v);
        A_log2e[i] = vload(ws->A_log2e + (n + i) * GROUP + v);
    }
    for (int64_t t = 0; t < ws->count; t++) {
        vf dt = vload(ws->dt + t * GROUP + v), dtu = vload(ws->dtu + t * GROUP + v);
        vf grad_y = vload(ws->grad_y + t * GROUP + v);
        for (int i = 0; i < states; i++) {
            int64_t at = (i * CHUNK + t) * GROUP;
            vf a = exp2_decay(dt * A_log2e[i]);
            vstore(decay + at, a);
            vstore(before + at, h[i]);
            h[i] = a * h[i] + dtu * B[t * row + i];
            vstore(ws->products_C + at + v, grad_y * h[i]);
        }
    }
    for (int i = 0; i < states; i++) {
        g[i] = vload(ws->grad_h + (n + i) * GROUP + v);
        A[i] = vload(ws->A + (n + i) * GROUP + v);
        dA[i] = vset(0.0f);
    }
    for (int64_t t = ws->count - 1; t >= 0; t--) {
        vf dt = vload(ws->dt + t * GROUP + v), dtu = vload(ws->dtu + t * GROUP + v);
        vf grad_y = vload(ws->grad_y + t * GROUP + v);
        vf grad_dt = vload(ws->grad_dt + sum + t * GROUP), grad_dtu = vload(ws->grad_dtu + sum + t * GROUP);
        for (int i = 0; i < states; i++) {
            int64_t at = (i * CHUNK + t) * GROUP;
            g[i] = g[i] + grad_y * C[t * row + i];
            grad_dtu = grad_dtu + g[i] * B[t * row + i];
            vstore(ws->products_B + at + v, g[i] * dtu);
            g[i] = g[i] * vload(decay + at);
            vf e = g[i] * vload(before + at);
            grad_dt = grad_dt + e * A[i];
            dA[i] = dA[i] + e * dt;
        }
        vstore(ws->grad_dt + sum + t * GROUP, grad_dt);
        vstore(ws->grad_dtu + sum + t * GROUP, grad_dtu);
    }
    for (int i = 0; i < states; i++) {
        vstore(ws->grad_h + (n + i) * GROUP + v, g[i]);
        vstore(ws->sums + (p->rank + 2 + n + i) * GROUP + v, dA[i] * A[i]);
    }
}

/* sums[t] = the sum of products[t] over the group; steps past the chunk's end give sums that nobody reads. */
ALWAYS_INLINE void sum_lanes(const float *products, float *sums, int64_t count) {
    for (int64_t t = 0; t < count; t += LANES) sum_rows(products + t * GROUP, sums + t);
}

ALWAYS_INLINE vf total(const float *sums) {
    const int64_t next = CHUNK * GROUP;
    return (vload(sums) + vload(sums + next)) + (vload(sums + 2 * next) + vload(sums + 3 * next));
}

/* The gradients of dt and dt u, and grad_y, to those of u (left in grad_dtu), dt_weight, dt_bias, D and low. */
ALWAYS_INLINE void pull_inputs(workspace *ws, const scan_problem *p, float *grad_low) {
    int64_t row = scan_row(p), rank = p->rank;
    float *grad_z = ws->grad_dt;
    for (int v = 0; v < GROUP; v += LANES) {
        vf D = vload(ws->D + v), grad_D = vset(0.0f), grad_bias = vset(0.0f);
        for (int64_t t = 0; t < ws->count; t++) {
            int64_t at = t * GROUP + v;
            vf u = vload(ws->u + at), grad_y = vload(ws->grad_y + at);
            vf grad_dtu = total(ws->grad_dtu + at);
            vf z = (total(ws->grad_dt + at) + grad_dtu * u) * vload(ws->slope + at);
            vstore(grad_z + at, z);
            vstore(ws->grad_dtu + at, grad_dtu * vload(ws->dt + at) + D * grad_y);
            grad_D = grad_D + grad_y * u;
            grad_bias = grad_bias + z;
        }
        vstore(ws->sums + rank * GROUP + v, grad_bias);
        vstore(ws->sums + (rank + 1) * GROUP + v, grad_D);
    }
    for (int64_t r = 0; r < rank; r++) {
        for (int v = 0; v < GROUP; v += LANES) {
            vf weight = vload(ws->weight + r * GROUP + v), grad_weight = vset(0.0f);
            for (int64_t t = 0; t < ws->count; t++) {
                vf z = vload(grad_z + t * GROUP + v);
                grad_weight = grad_weight + z * ws->rows[t * row + r];
                vstore(ws->products_B + t * GROUP + v, z * weight);
            }
            vstore(ws->sums + r * GROUP + v, grad_weight);
        }
        sum_lanes(ws->products_B, grad_low + r * CHUNK, ws->count);
    }
}

/* One chunk backwards; `partial` is (rank + 2 state, CHUNK), the chunk's gradient of proj from this group alone. */
static void pull_chunk(workspace *ws, const scan_problem *p, float *partial) {
    int64_t rank = p->rank, state = p->state;
    memset(ws->grad_dt, 0, SUMS * CHUNK * GROUP * sizeof(float));
    memset(ws->grad_dtu, 0, SUMS * CHUNK * GROUP * sizeof(float));
    for (int64_t n = 0; n < state; n += 2) {
        int states = state - n < 2 ? 1 : 2;
        for (int v = 0; v < GROUP; v += LANES) {
            if (states == 2)
                pull_states(ws, p, n, v, 2);
            else
                pull_states(ws, p, n, v, 1);
        }
        for (int i = 0; i < states; i++) {
            sum_lanes(ws->products_B + i * CHUNK * GROUP, partial + (rank + n + i) * CHUNK, ws->count);
            sum_lanes(ws->products_C + i * CHUNK * GROUP, partial + (rank + state + n + i) * CHUNK, ws->count);
        }
    }
    pull_inputs(ws, p, partial);
}

static void backward(const scan_problem *p, const scan_task *task, float *scratch) {
    workspace ws;
    int64_t groups = p->group_end - p->group_begin, image = task->image, group = task->group;
    int64_t chunks = scan_chunks(p), states = p->state * GROUP;
    int64_t offset = image * scan_length(p) * p->channels + group * GROUP;
    const float *grad_y = p->grad_y + offset;
    float *du = task->out + offset;
    lay_out(&ws, p, 1, scratch);
    /* A short last chunk's missing rows are summed too, though nobody reads those sums. */
    memset(ws.products_B, 0, 2 * CHUNK * GROUP * sizeof(float));
    memset(ws.products_C, 0, 2 * CHUNK * GROUP * sizeof(float));
    for (int64_t k = task->k_begin; k < task->k_end; k++) {
        int add = task->add || k > task->k_begin;
        double *dparams = p->dparams + ((image * DIRECTIONS + k) * scan_groups(p) + group) * scan_params(p) * GROUP;
        float *partial = p->partial + (((k - p->k_begin) * p->batch + image) * groups + group - p->group_begin) *
                                          chunks * scan_row(p) * CHUNK;
        load_parameters(&ws, p, k, group);
        memset(dparams, 0, scan_params(p) * GROUP * sizeof(double));
        memset(ws.h, 0, states * sizeof(float));
        begin_walk(&ws, p, image, group, k, 0, 0, 0);
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            memcpy(ws.starts + chunk * states, ws.h, states * sizeof(float));
            if (chunk + 1 == chunks) break;
            load_chunk(&ws, p, chunk + 1);
            time_steps(&ws, p, 0);
            walk_chunk(&ws, p, 0);
        }
        memset(ws.grad_h, 0, states * sizeof(float));
        begin_walk(&ws, p, image, group, k, chunks - 1, grad_y, du);
        for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
            load_chunk(&ws, p, chunk - 1);
            for (int64_t t = 0; t < ws.count; t++)
                load_lanes(ws.grad_y + t * GROUP, grad_y + ws.pixel[t] * p->channels, ws.width);
            time_steps(&ws, p, 1);
            memcpy(ws.h, ws.starts + chunk * states, states * sizeof(float));
            pull_chunk(&ws, p, partial + chunk * scan_row(p) * CHUNK);
            for (int64_t t = 0; t < ws.count; t++)
                store_lanes(du + ws.pixel[t] * p->channels, ws.grad_dtu + t * GROUP, ws.width, add);
            /* Double: a large image adds up a hundred thousand chunks. */
            for (int64_t i = 0; i < scan_params(p) * GROUP; i++) dparams[i] += ws.sums[i];
        }
    }
}

extern const scan_kernels NAMED(LEVEL);
const scan_kernels NAMED(LEVEL) = {TEXT(LEVEL), scratch_floats, forward, backward};
