/* The walk of a task along one direction: its memory, loading of chunks, time steps, and the recurrence.
 *
 * For every direction k, along its walk over the pixels, for each channel:
 *
 *     dt = softplus(dt_weight . low + dt_bias)        low, B, C: the pixel's row of proj for this direction
 *     h  = exp(A dt) h + dt u B                       A = -exp(A_log); h has `state` numbers
 *     y += C . h + D u
 *
 * Arrays in the scratch memory are [...][GROUP], with the channel innermost; a group is GROUP / LANES vectors. Lanes
 * past the last channel hold zeros, and dt = 0 there, so they never add anything. */
#ifndef SERPENT_WALK_H
#define SERPENT_WALK_H

#include "scan.h"
#include "vec.h"

enum { SUMS = 2, PULLED_STATES = 2 };

/* One group of channels. */
typedef struct {
    /* Per direction and group: */
    float *A, *A_log2e, *weight; /* [state][], [state][], [rank][] */
    float *bias, *D;
    int64_t width; /* channels in the group: GROUP, except in the last one */
    /* The first pixel's values of the image and group; `touched` are further maps to prefetch, or NULL: */
    const float *from_u, *touched[2];
    /* Per chunk, [CHUNK][] each: */
    float *u, *dt, *dtu, *slope, *grad_y;
    float *grad_dt, *grad_dtu; /* [SUMS][CHUNK][]: several partial sums over the states, to limit rounding errors */
    /* States, [state][]: */
    float *h, *grad_h;
    float *sums;            /* backward: [scan_params][] parameter gradients of a chunk */
    float *starts;          /* backward: [chunks][state][] states at the starts of chunks */
    float *own_dt, *own_slope; /* backward: where dt and slope lie unless the chunk is a kept one */
} lane_group;

typedef struct {
    int64_t k, groups;
    const float *from_rows; /* the image's and direction's first row of proj */
    float *rows;            /* [CHUNK][rank + 2 state] of the chunk */
    int64_t pixel[CHUNK], count;
    int64_t next[CHUNK], next_count; /* the next chunk */
    lane_group group[PULLED];
    /* Backward, for PULLED_STATES states: */
    float *decay, *before;           /* [CHUNK][PULLED_STATES][GROUP] */
    float *products_B, *products_C;  /* [PULLED_STATES][CHUNK][LANES] */
    float *kept;                     /* [kept_chunks][groups][kept_floats] */
} workspace;

static float *take(float *base, int64_t *used, int64_t floats) {
    float *here = base ? base + *used : 0;
    *used += (floats + GROUP - 1) / GROUP * GROUP;
    return here;
}

/* The floats that a kept chunk takes per group: dt, slope, and the decays of its states. */
static inline int64_t kept_floats(const scan_problem *p) { return CHUNK * GROUP * (2 + p->state); }

/* The number of chunks whose decays are kept from the forward walk for the backward walk. These are the last chunks,
 * which the backward walk meets first, and as many as fit into a second-level cache. */
static int64_t kept_chunks(const scan_problem *p) {
    if (p->states) return 0;
    int64_t most = KEPT_FLOATS / (PULLED * kept_floats(p)), chunks = scan_chunks(p) - 1;
    return most < chunks ? most : chunks;
}

/* Lays out the workspace from `base` on and returns its size; with base = NULL it only measures. */
static int64_t lay_out(workspace *ws, const scan_problem *p, int groups, int backward, float *base) {
    int64_t used = 0, states = p->state * GROUP, chunk = CHUNK * GROUP;
    ws->rows = take(base, &used, CHUNK * scan_row(p));
    for (int i = 0; i < groups; i++) {
        lane_group *g = &ws->group[i];
        g->A = take(base, &used, states);
        g->A_log2e = take(base, &used, states);
        g->weight = take(base, &used, p->rank * GROUP);
        g->bias = take(base, &used, GROUP);
        g->D = take(base, &used, GROUP);
        g->u = take(base, &used, chunk);
        g->dt = g->own_dt = take(base, &used, chunk);
        g->dtu = take(base, &used, chunk);
        g->h = take(base, &used, states);
        if (!backward) continue;
        g->slope = g->own_slope = take(base, &used, chunk);
        g->grad_y = take(base, &used, chunk);
        g->grad_dt = take(base, &used, SUMS * chunk);
        g->grad_dtu = take(base, &used, SUMS * chunk);
        g->grad_h = take(base, &used, states);
        g->sums = take(base, &used, scan_params(p) * GROUP);
        if (!p->states) g->starts = take(base, &used, scan_states(p));
    }
    if (backward) {
        ws->decay = take(base, &used, PULLED_STATES * chunk);
        ws->before = take(base, &used, PULLED_STATES * chunk);
        ws->products_B = take(base, &used, PULLED_STATES * CHUNK * LANES);
        ws->products_C = take(base, &used, PULLED_STATES * CHUNK * LANES);
        ws->kept = take(base, &used, kept_chunks(p) * groups * kept_floats(p));
    }
    return used;
}

static int64_t scratch_floats(const scan_problem *p, int backward) {
    workspace ws;
    return lay_out(&ws, p, backward ? PULLED : 1, backward, 0);
}

/* Where the forward pass keeps, for the backward pass, the states before each chunk of a group's walk. */
ALWAYS_INLINE float *kept_states(const scan_problem *p, int64_t image, int64_t k, int64_t group) {
    return p->states + ((image * DIRECTIONS + k) * scan_groups(p) + group) * scan_states(p);
}

/* Puts the pixels of a chunk into ws->next, or none if the walk has ended. */
ALWAYS_INLINE void look_ahead(workspace *ws, const scan_problem *p, int64_t chunk) {
    int64_t left = chunk < 0 ? 0 : scan_length(p) - chunk * CHUNK;
    ws->next_count = left < 0 ? 0 : left < CHUNK ? left : CHUNK;
    scan_pixels(p, ws->k, chunk * CHUNK, ws->next_count, ws->next);
}

/* Prepares a walk of direction k, over the groups from `group` on, that begins with the given chunk. `touched` are maps
 * of all channels. */
ALWAYS_INLINE void begin_walk(workspace *ws, const scan_problem *p, int64_t image, int64_t group, int64_t k,
                              int64_t chunk, const float *touched, const float *touched_too) {
    int64_t first = image * scan_length(p);
    ws->k = k;
    ws->from_rows = p->proj + (first * DIRECTIONS + k) * scan_row(p);
    for (int64_t i = 0; i < ws->groups; i++) {
        lane_group *g = &ws->group[i];
        int64_t offset = first * p->channels + (group + i) * GROUP;
        g->from_u = p->u + offset;
        g->touched[0] = touched ? touched + offset : 0;
        g->touched[1] = touched_too ? touched_too + offset : 0;
    }
    look_ahead(ws, p, chunk);
}

static void load_parameters(lane_group *g, const scan_problem *p, int64_t k, int64_t group) {
    int64_t first = group * GROUP;
    g->width = p->channels - first < GROUP ? p->channels - first : GROUP;
    for (int64_t lane = 0; lane < GROUP; lane++) {
        int inside = lane < g->width;
        int64_t channel = k * p->channels + (inside ? first + lane : 0);
        for (int64_t n = 0; n < p->state; n++)
            g->A[n * GROUP + lane] = inside ? p->A_log[channel * p->state + n] : 0.0f;
        for (int64_t r = 0; r < p->rank; r++)
            g->weight[r * GROUP + lane] = inside ? p->dt_weight[channel * p->rank + r] : 0.0f;
        g->bias[lane] = inside ? p->dt_bias[channel] : 0.0f;
        g->D[lane] = inside ? p->D[channel] : 0.0f;
    }
    for (int64_t i = 0; i < p->state * GROUP; i += LANES) {
        vf A = -exp_clamped(vload(g->A + i));
        vstore(g->A + i, A);
        vstore(g->A_log2e + i, A * 1.44269504f);
    }
}

/* Copies a pixel's channels of this group to or from 16 lanes. A full group is a copy of constant size. */
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

/* Packs the next chunk, that is the rows of proj and u at its pixels, which lie far apart, into contiguous memory. Then
 * `chunk` becomes the next one. */
ALWAYS_INLINE void load_chunk(workspace *ws, const scan_problem *p, int64_t chunk) {
    int64_t row = scan_row(p), count = ws->count = ws->next_count;
    float *rows = ws->rows;
    memcpy(ws->pixel, ws->next, sizeof ws->pixel);
    look_ahead(ws, p, chunk);
    for (int64_t t = 0; t < count; t++, rows += row) {
        const float *from = ws->from_rows + ws->pixel[t] * DIRECTIONS * row;
        int64_t i = 0;
        for (; i + 4 <= row; i += 4) memcpy(rows + i, from + i, 4 * sizeof(float));
        for (; i < row; i++) rows[i] = from[i];
    }
    for (int64_t i = 0; i < ws->groups; i++) {
        const lane_group *g = &ws->group[i];
        for (int64_t t = 0; t < ws->count; t++)
            load_lanes(g->u + t * GROUP, g->from_u + ws->pixel[t] * p->channels, g->width);
    }
}

/* Prefetches what step t of the next chunk will read, while this chunk keeps the processor busy. A group's share of a
 * pixel is one cache line, and that of the next pixel lies d lines on, or a row of the map away. No hardware prefetcher
 * foresees that, and with maps larger than the second-level cache waiting would double the time. */
ALWAYS_INLINE void fetch(const workspace *ws, const scan_problem *p, const lane_group *g, int64_t t) {
    int64_t pixel = ws->next[t], row = scan_row(p);
    const float *rows = ws->from_rows + pixel * DIRECTIONS * row;
    if (t >= ws->next_count) return;
    PREFETCH(g->from_u + pixel * p->channels);
    for (int i = 0; i < 2; i++)
        if (g->touched[i]) PREFETCH(g->touched[i] + pixel * p->channels);
    if (g != ws->group) return; /* the groups share the rows */
    for (int64_t i = 0; i < row; i += GROUP) PREFETCH(rows + i);
    PREFETCH(rows + row - 1);
}

/* dt and dt u of the chunk, and dt's derivative if `want_slope`. If `known`, dt and slope are already there. */
ALWAYS_INLINE void time_steps(workspace *ws, const scan_problem *p, lane_group *g, int want_slope, int known) {
    const int64_t row = scan_row(p), rank = p->rank, count = ws->count;
    const float *rows = ws->rows, *us = g->u, *weight = g->weight;
    float *dts = g->dt, *dtus = g->dtu, *slopes = g->slope;
    for (int v = 0; v < GROUP; v += LANES) {
        vf bias = vload(g->bias + v);
        for (int64_t t = 0; t < count; t++) {
            int64_t at = t * GROUP + v;
            vf z = vset(0.0f), slope;
            if (v == 0) fetch(ws, p, g, t);
            if (known) {
                vstore(dtus + at, vload(dts + at) * vload(us + at));
                continue;
            }
            for (int64_t r = 0; r < rank; r++) z = z + vload(weight + r * GROUP + v) * rows[t * row + r];
            /* The bias is added last: it is the largest term, and would make every later addition round more. */
            vf dt = softplus(z + bias, want_slope ? &slope : 0);
            vstore(dts + at, dt);
            vstore(dtus + at, dt * vload(us + at));
            if (want_slope) vstore(slopes + at, slope);
        }
    }
    if (g->width == GROUP) return;
    for (int64_t t = 0; t < ws->count; t++)
        for (int64_t i = g->width; i < GROUP; i++) {
            g->dt[t * GROUP + i] = g->dtu[t * GROUP + i] = 0.0f;
            if (want_slope) g->slope[t * GROUP + i] = 0.0f;
        }
}

/* One step of `states` states. h, A_log2e and kept point to the first of them; each state adds to a sum of its own in
 * y. `grows`: decays may be above 1. */
ALWAYS_INLINE void step_states(float *h, const float *A_log2e, const float *B, const float *C, float *kept, vf dt,
                               vf dtu, vf *y, const int states, const int grows) {
    for (int i = 0; i < states; i++) {
        vf exponent = dt * vload(A_log2e + i * GROUP), a = grows ? exp2_any(exponent) : exp2_decay(exponent);
        vf next = a * vload(h + i * GROUP) + dtu * B[i];
        vstore(h + i * GROUP, next);
        if (kept) vstore(kept + i * GROUP, a);
        if (C) y[i] = y[i] + next * C[i];
    }
}

/* The recurrence over a chunk, from g->h on. y, if wanted, overwrites g->dt, which is no longer needed then. y is taken
 * in four sums: shorter dependency chains, and smaller rounding errors than in one long sum. `keep`: store the decays
 * in `kept`. */
ALWAYS_INLINE void walk_chunk(const workspace *ws, const scan_problem *p, const lane_group *g, const int want_y,
                              float *kept, const int keep, const int grows) {
    const int64_t row = scan_row(p), state = p->state, rank = p->rank, count = ws->count;
    const float *rows = ws->rows, *us = g->u, *dtus = g->dtu, *A_log2e = g->A_log2e;
    float *states = g->h, *dts = g->dt;
    for (int v = 0; v < GROUP; v += LANES) {
        vf D = vload(g->D + v);
        for (int64_t t = 0; t < count; t++) {
            const float *B = rows + t * row + rank, *C = B + state;
            vf dt = vload(dts + t * GROUP + v), dtu = vload(dtus + t * GROUP + v);
            vf y[4] = {D * vload(us + t * GROUP + v), vset(0.0f), vset(0.0f), vset(0.0f)};
            float *h = states + v, *to = kept + t * state * GROUP + v;
            const float *A = A_log2e + v;
            int64_t n = 0;
            for (; n + 4 <= state; n += 4, h += 4 * GROUP, A += 4 * GROUP, to += 4 * GROUP)
                step_states(h, A, B + n, want_y ? C + n : 0, keep ? to : 0, dt, dtu, y, 4, grows);
            for (; n < state; n++, h += GROUP, A += GROUP, to += GROUP)
                step_states(h, A, B + n, want_y ? C + n : 0, keep ? to : 0, dt, dtu, y + 3, 1, grows);
            if (want_y) vstore(dts + t * GROUP + v, (y[0] + y[1]) + (y[2] + y[3]));
        }
    }
}

#endif
