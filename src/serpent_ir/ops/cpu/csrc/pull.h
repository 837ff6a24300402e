/* The backward pass of a task: PULLED channel groups of one image.
 *
 * First the recurrence is walked forward, to get the states at the starts of chunks; that is skipped if the forward
 * pass kept them. For the last chunks the decays are kept as well. Then come the chunks from the last to the first: in
 * each the states inside the chunk are computed again, then all gradients. */
#ifndef SERPENT_PULL_H
#define SERPENT_PULL_H

#include "walk.h"

/* Vectors that are processed together: their products are added up before they leave the registers. */
enum { ABREAST = GROUP / LANES < 2 ? 1 : 2 };

/* x[0] + x[1] for two, x[0] for one. */
ALWAYS_INLINE vf of_pair(const vf *x, const int count) { return count == 2 ? x[0] + x[1] : x[0]; }

/* Takes `states` states from n on, of the channels from v on, forward and then backward through a chunk. g is the
 * gradient of the loss for h[t], including everything after step t:
 *
 *     forward:   h[t] = a[t] h[t-1] + dtu[t] B[t]           dC[t] = sum over channels of grad_y[t] h[t]
 *     backward:  g += C[t] grad_y[t]                        dB[t] = sum over channels of g dtu[t]
 *                grad_dtu[t] += g B[t]                      e = g a[t] h[t-1]: the gradient for A dt
 *                grad_dt[t] += e A,  dA += e dt[t]          g = g a[t], handed to t - 1
 *
 * Two states at a time hide the latency of g's chain and halve the memory traffic of what they share. The products of
 * the first channels (`add` unset) are stored; those of the others are added to them. `decays` is [CHUNK][stride]. It
 * is an input if `known`, else it is written in the forward part. */
ALWAYS_INLINE void pull_states(const workspace *ws, const scan_problem *p, const lane_group *g, int64_t n, int v,
                               float *decays, int64_t stride, const int states, const int known, const int add,
                               const int grows) {
    const int64_t row = scan_row(p), count = ws->count, sum = n / PULLED_STATES % SUMS * CHUNK * GROUP + v;
    const float *B = ws->rows + p->rank + n, *C = B + p->state;
    const float *dts = g->dt + v, *dtus = g->dtu + v, *grad_ys = g->grad_y + v;
    float *befores = ws->before, *products_B = ws->products_B, *products_C = ws->products_C;
    float *grad_dts = g->grad_dt + sum, *grad_dtus = g->grad_dtu + sum;
    vf h[2][2], A_log2e[2][2], pulled[2][2], A[2][2], dA[2][2];
    for (int i = 0; i < states; i++)
        for (int w = 0; w < ABREAST; w++) {
            int64_t at = (n + i) * GROUP + v + w * LANES;
            h[i][w] = vload(g->h + at);
            A_log2e[i][w] = vload(g->A_log2e + at);
            pulled[i][w] = vload(g->grad_h + at);
            A[i][w] = vload(g->A + at);
            dA[i][w] = vset(0.0f);
        }
    for (int64_t t = 0; t < count; t++)
        for (int i = 0; i < states; i++) {
            float *product = products_C + (i * CHUNK + t) * LANES;
            vf products = add ? vload(product) : vset(0.0f);
            for (int w = 0; w < ABREAST; w++) {
                int64_t at = t * GROUP + w * LANES;
                float *decay = decays + t * stride + i * GROUP + w * LANES;
                vf exponent = vload(dts + at) * A_log2e[i][w];
                vf a = known ? vload(decay) : grows ? exp2_any(exponent) : exp2_decay(exponent);
                if (!known) vstore(decay, a);
                vstore(befores + (t * PULLED_STATES + i) * GROUP + w * LANES, h[i][w]);
                h[i][w] = a * h[i][w] + vload(dtus + at) * B[t * row + i];
                products = add || w > 0 ? products + vload(grad_ys + at) * h[i][w] : vload(grad_ys + at) * h[i][w];
            }
            vstore(product, products);
        }
    for (int64_t t = count - 1; t >= 0; t--) {
        vf products[2];
        for (int i = 0; i < states; i++) products[i] = add ? vload(products_B + (i * CHUNK + t) * LANES) : vset(0.0f);
        for (int w = 0; w < ABREAST; w++) {
            int64_t at = t * GROUP + w * LANES;
            vf dt = vload(dts + at), dtu = vload(dtus + at), grad_y = vload(grad_ys + at), to_dt[2], to_dtu[2];
            for (int i = 0; i < states; i++) {
                vf now = pulled[i][w] + grad_y * C[t * row + i];
                to_dtu[i] = now * B[t * row + i];
                products[i] = add || w > 0 ? products[i] + now * dtu : now * dtu;
                now = now * vload(decays + t * stride + i * GROUP + w * LANES);
                pulled[i][w] = now;
                vf e = now * vload(befores + (t * PULLED_STATES + i) * GROUP + w * LANES);
                to_dt[i] = e * A[i][w];
                dA[i][w] = dA[i][w] + e * dt;
            }
            vstore(grad_dts + at, vload(grad_dts + at) + of_pair(to_dt, states));
            vstore(grad_dtus + at, vload(grad_dtus + at) + of_pair(to_dtu, states));
        }
        for (int i = 0; i < states; i++) vstore(products_B + (i * CHUNK + t) * LANES, products[i]);
    }
    for (int i = 0; i < states; i++)
        for (int w = 0; w < ABREAST; w++) {
            int64_t at = (n + i) * GROUP + v + w * LANES;
            vstore(g->grad_h + at, pulled[i][w]);
            vstore(g->sums + (p->rank + 2) * GROUP + at, p->plain_A ? dA[i][w] : dA[i][w] * A[i][w]);
        }
}

/* pull_states for the states from n on, for all channels of the task, and the sums over the channels. */
ALWAYS_INLINE void pull_some(const workspace *ws, const scan_problem *p, float *partial, int64_t n, float *kept,
                             const int states, const int grows) {
    for (int64_t i = 0; i < ws->groups; i++) {
        const lane_group *g = &ws->group[i];
        float *decays = kept ? kept + i * kept_floats(p) + (2 * CHUNK + n) * GROUP : ws->decay;
        int64_t stride = kept ? p->state * GROUP : PULLED_STATES * GROUP;
        for (int v = 0; v < GROUP; v += ABREAST * LANES) {
            int add = i > 0 || v > 0;
            if (kept && add)
                pull_states(ws, p, g, n, v, decays + v, stride, states, 1, 1, grows);
            else if (kept)
                pull_states(ws, p, g, n, v, decays + v, stride, states, 1, 0, grows);
            else if (add)
                pull_states(ws, p, g, n, v, decays + v, stride, states, 0, 1, grows);
            else
                pull_states(ws, p, g, n, v, decays + v, stride, states, 0, 0, grows);
        }
    }
    for (int i = 0; i < states; i++) {
        float *dB = partial + (p->rank + n + i) * CHUNK;
        sum_lanes(ws->products_B + i * CHUNK * LANES, dB, ws->count);
        sum_lanes(ws->products_C + i * CHUNK * LANES, dB + p->state * CHUNK, ws->count);
    }
}

ALWAYS_INLINE vf total(const float *sums) { return vload(sums) + vload(sums + CHUNK * GROUP); }

/* From the gradients of dt and dt u, and grad_y: the gradients of u (left in grad_dtu), dt_bias and D. dt =
 * softplus(z); the gradient of z is left in grad_dt. */
static void pull_inputs(const workspace *ws, const scan_problem *p, const lane_group *g) {
    const int64_t count = ws->count;
    const float *us = g->u, *dts = g->dt, *slopes = g->slope, *grad_ys = g->grad_y;
    float *grad_dts = g->grad_dt, *grad_dtus = g->grad_dtu;
    for (int v = 0; v < GROUP; v += LANES) {
        vf D = vload(g->D + v), grad_D = vset(0.0f), grad_bias = vset(0.0f);
        for (int64_t t = 0; t < count; t++) {
            int64_t at = t * GROUP + v;
            vf u = vload(us + at), grad_y = vload(grad_ys + at), grad_dtu = total(grad_dtus + at);
            vf z = (total(grad_dts + at) + grad_dtu * u) * vload(slopes + at);
            vstore(grad_dts + at, z);
            vstore(grad_dtus + at, grad_dtu * vload(dts + at) + D * grad_y);
            grad_D = grad_D + grad_y * u;
            grad_bias = grad_bias + z;
        }
        vstore(g->sums + p->rank * GROUP + v, grad_bias);
        vstore(g->sums + (p->rank + 1) * GROUP + v, grad_D);
    }
}

/* From the gradient of z: the gradients of dt_weight and low. */
static void pull_low(const workspace *ws, const scan_problem *p, float *partial) {
    const int64_t row = scan_row(p), count = ws->count;
    float *products = ws->products_B;
    for (int64_t r = 0; r < p->rank; r++) {
        for (int64_t i = 0; i < ws->groups; i++) {
            const lane_group *g = &ws->group[i];
            for (int v = 0; v < GROUP; v += LANES) {
                const float *grad_z = g->grad_dt + v, *low = ws->rows + r;
                vf weight = vload(g->weight + r * GROUP + v), grad_weight = vset(0.0f);
                int add = i > 0 || v > 0;
                for (int64_t t = 0; t < count; t++) {
                    vf z = vload(grad_z + t * GROUP);
                    grad_weight = grad_weight + z * low[t * row];
                    vstore(products + t * LANES, add ? vload(products + t * LANES) + z * weight : z * weight);
                }
                vstore(g->sums + r * GROUP + v, grad_weight);
            }
        }
        sum_lanes(products, partial + r * CHUNK, count);
    }
}

/* One chunk backward. `partial`, (rank + 2 state, CHUNK), gets the chunk's gradient of proj from these groups alone. */
ALWAYS_INLINE void pull_chunk(const workspace *ws, const scan_problem *p, float *partial, float *kept, const int grows) {
    int64_t n = 0;
    for (int64_t i = 0; i < ws->groups; i++) {
        memset(ws->group[i].grad_dt, 0, SUMS * CHUNK * GROUP * sizeof(float));
        memset(ws->group[i].grad_dtu, 0, SUMS * CHUNK * GROUP * sizeof(float));
    }
    for (; n + 2 <= p->state; n += 2) pull_some(ws, p, partial, n, kept, 2, grows);
    if (n < p->state) pull_some(ws, p, partial, n, kept, 1, grows);
    for (int64_t i = 0; i < ws->groups; i++) pull_inputs(ws, p, &ws->group[i]);
    pull_low(ws, p, partial);
}

/* Where a chunk is kept, or NULL. If it is kept, dt and slope of the groups lie there too, else in their own place. */
static float *kept_place(workspace *ws, const scan_problem *p, int64_t chunk) {
    int64_t last = scan_chunks(p) - 1, number = last - 1 - chunk;
    int is_kept = number >= 0 && number < kept_chunks(p);
    float *kept = is_kept ? ws->kept + number * ws->groups * kept_floats(p) : 0;
    for (int64_t i = 0; i < ws->groups; i++) {
        lane_group *g = &ws->group[i];
        g->dt = kept ? kept + i * kept_floats(p) : g->own_dt;
        g->slope = kept ? g->dt + CHUNK * GROUP : g->own_slope;
    }
    return kept;
}

/* Walks forward to fill g->starts and what is kept for the last chunks. */
static void go_there(workspace *ws, const scan_problem *p) {
    int64_t chunks = scan_chunks(p), states = p->state * GROUP;
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        for (int64_t i = 0; i < ws->groups; i++)
            memcpy(ws->group[i].starts + chunk * states, ws->group[i].h, states * sizeof(float));
        if (chunk + 1 == chunks) break;
        load_chunk(ws, p, chunk + 1);
        float *kept = kept_place(ws, p, chunk);
        for (int64_t i = 0; i < ws->groups; i++) {
            lane_group *g = &ws->group[i];
            if (kept) {
                time_steps(ws, p, g, 1, 0);
                walk_chunk(ws, p, g, 0, g->slope + CHUNK * GROUP, 1, 0);
            } else {
                time_steps(ws, p, g, 0, 0);
                walk_chunk(ws, p, g, 0, 0, 0, 0);
            }
        }
    }
}

static void backward(const scan_problem *p, const scan_task *task, float *scratch) {
    workspace ws;
    int64_t image = task->image, group = task->group, chunks = scan_chunks(p), states = p->state * GROUP;
    int64_t offset = image * scan_length(p) * p->channels;
    ws.groups = scan_groups(p) - group < PULLED ? scan_groups(p) - group : PULLED;
    lay_out(&ws, p, (int)ws.groups, 1, scratch);
    /* The missing rows of a short last chunk are summed too, though nobody reads those sums. */
    memset(ws.products_B, 0, PULLED_STATES * CHUNK * LANES * sizeof(float));
    memset(ws.products_C, 0, PULLED_STATES * CHUNK * LANES * sizeof(float));
    for (int64_t k = task->k_begin; k < task->k_end; k++) {
        int add = task->add || k > task->k_begin;
        double *dparams = p->dparams + ((image * DIRECTIONS + k) * scan_groups(p) + group) * scan_params(p) * GROUP;
        float *partial = p->partial + (((k - p->k_begin) * p->batch + image) * (p->pair_end - p->pair_begin) +
                                       group / PULLED - p->pair_begin) * chunks * scan_row(p) * CHUNK;
        memset(dparams, 0, ws.groups * scan_params(p) * GROUP * sizeof(double));
        for (int64_t i = 0; i < ws.groups; i++) {
            load_parameters(&ws.group[i], p, k, group + i);
            memset(ws.group[i].h, 0, states * sizeof(float));
            memset(ws.group[i].grad_h, 0, states * sizeof(float));
        }
        if (p->states) {
            for (int64_t i = 0; i < ws.groups; i++) ws.group[i].starts = kept_states(p, image, k, group + i);
        } else {
            begin_walk(&ws, p, image, group, k, 0, 0, 0);
            go_there(&ws, p);
        }
        begin_walk(&ws, p, image, group, k, chunks - 1, p->grad_y, task->out);
        for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
            load_chunk(&ws, p, chunk - 1);
            float *kept = kept_place(&ws, p, chunk);
            for (int64_t i = 0; i < ws.groups; i++) {
                lane_group *g = &ws.group[i];
                const float *grad_y = p->grad_y + offset + (group + i) * GROUP;
                for (int64_t t = 0; t < ws.count; t++)
                    load_lanes(g->grad_y + t * GROUP, grad_y + ws.pixel[t] * p->channels, g->width);
                if (kept)
                    time_steps(&ws, p, g, 1, 1);
                else
                    time_steps(&ws, p, g, 1, 0);
                memcpy(g->h, g->starts + chunk * states, states * sizeof(float));
            }
            pull_chunk(&ws, p, partial + chunk * scan_row(p) * CHUNK, kept, 0);
            for (int64_t i = 0; i < ws.groups; i++) {
                lane_group *g = &ws.group[i];
                float *du = task->out + offset + (group + i) * GROUP;
                for (int64_t t = 0; t < ws.count; t++)
                    store_lanes(du + ws.pixel[t] * p->channels, g->grad_dtu + t * GROUP, g->width, add);
                /* In double, since a large image adds up a hundred thousand chunks. */
                double *to = dparams + i * scan_params(p) * GROUP;
                for (int64_t j = 0; j < scan_params(p) * GROUP; j++) to[j] += g->sums[j];
            }
        }
    }
}

#endif
