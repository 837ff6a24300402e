/* The scan of sequences, with the walks of walk.h and pull.h: what differs is how a chunk is packed and unpacked.
 *
 * In memory neighbours are positions; the walks want channels side by side. So a chunk is transposed on its way, from
 * memory of any strides. */
#ifndef SERPENT_SEQUENCE_H
#define SERPENT_SEQUENCE_H

#include "pull.h"

static inline float from_half(uint16_t x) {
    uint32_t sign = (uint32_t)(x & 0x8000) << 16, bits = (uint32_t)(x & 0x7fff) << 13;
    float magnitude, result;
    memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude *= 0x1p112f; /* the exponents' biases differ by 112; this is exact for subnormal numbers too */
    memcpy(&bits, &magnitude, sizeof bits);
    if ((x & 0x7c00) == 0x7c00) bits |= 0x7f800000;
    bits |= sign;
    memcpy(&result, &bits, sizeof result);
    return result;
}

static inline float from_bfloat16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

static inline uint16_t to_bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (x != x) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline uint16_t to_half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x477ff000) return sign | 0x7c00; /* rounds to 65536 or more */
    if (bits < 0x38800000) { /* a subnormal number: the addition rounds, and leaves it in the low bits */
        float magnitude, shift = 0.5f;
        memcpy(&magnitude, &bits, sizeof magnitude);
        magnitude += shift;
        memcpy(&bits, &magnitude, sizeof bits);
        return (uint16_t)(sign | (bits - 0x3f000000));
    }
    bits += 0xfff + (bits >> 13 & 1) - (112u << 23);
    return (uint16_t)(sign | bits >> 13);
}

/* Copies `count` positions of a row into `to`, as float32. */
static void read_row(const view *v, int64_t first, int64_t count, float *to) {
    int64_t step = v->position;
    if (v->type == FLOAT32) {
        const float *from = (const float *)v->data + first;
        for (int64_t t = 0; t < count; t++) to[t] = from[t * step];
        return;
    }
    const uint16_t *from = (const uint16_t *)v->data + first;
    if (v->type == BFLOAT16)
        for (int64_t t = 0; t < count; t++) to[t] = from_bfloat16(from[t * step]);
    else
        for (int64_t t = 0; t < count; t++) to[t] = from_half(from[t * step]);
}

static void write_row(const view *v, int64_t first, int64_t count, const float *from) {
    if (v->type == FLOAT32) {
        memcpy((float *)v->data + first, from, (size_t)count * sizeof(float));
        return;
    }
    uint16_t *to = (uint16_t *)v->data + first;
    if (v->type == BFLOAT16)
        for (int64_t t = 0; t < count; t++) to[t] = to_bfloat16(from[t]);
    else
        for (int64_t t = 0; t < count; t++) to[t] = to_half(from[t]);
}

#if LANES > 1
typedef float v4 __attribute__((vector_size(16)));
typedef int32_t i4 __attribute__((vector_size(16)));
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE4(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#if !defined(SHUFFLE4)
#define SHUFFLE4(a, b, ...) __builtin_shuffle(a, b, (i4){__VA_ARGS__})
#endif
ALWAYS_INLINE v4 load4(const float *from) {
    v4 x;
    memcpy(&x, from, sizeof x);
    return x;
}

/* Transposes four by four numbers, between rows `from_step` and `to_step` apart. */
ALWAYS_INLINE void transpose4(const float *from, int64_t from_step, float *to, int64_t to_step) {
    v4 a = load4(from), b = load4(from + from_step), c = load4(from + 2 * from_step), d = load4(from + 3 * from_step);
    v4 ab = SHUFFLE4(a, b, 0, 4, 1, 5), cd = SHUFFLE4(c, d, 0, 4, 1, 5);
    v4 ab2 = SHUFFLE4(a, b, 2, 6, 3, 7), cd2 = SHUFFLE4(c, d, 2, 6, 3, 7);
    v4 rows[4] = {SHUFFLE4(ab, cd, 0, 1, 4, 5), SHUFFLE4(ab, cd, 2, 3, 6, 7), SHUFFLE4(ab2, cd2, 0, 1, 4, 5),
                  SHUFFLE4(ab2, cd2, 2, 3, 6, 7)};
    for (int i = 0; i < 4; i++) memcpy(to + i * to_step, &rows[i], sizeof rows[i]);
}
#else
static inline void transpose4(const float *from, int64_t from_step, float *to, int64_t to_step) {
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) to[i * to_step + j] = from[j * from_step + i];
}
#endif

/* Packs `width` rows of `count` positions, from number `first` on, into to[position * step + row]; rows up to `padded` and
 * positions up to CHUNK are zeros. */
static void pack(const view *v, int64_t first, int64_t width, int64_t padded, int64_t count, float *to, int64_t step) {
    float rows[4][CHUNK];
    int direct = v->type == FLOAT32 && v->position == 1 && count == CHUNK;
    for (int64_t i = 0; i < padded; i += 4) {
        const float *from = (const float *)v->data + first + i * v->of;
        int64_t from_step = v->of, here = width - i < 4 ? width - i : 4, wanted = padded - i < 4 ? padded - i : 4;
        if (!direct || here < 4) {
            memset(rows, 0, sizeof rows);
            for (int64_t j = 0; j < here; j++) read_row(v, first + (i + j) * v->of, count, rows[j]);
            from = rows[0], from_step = CHUNK;
        }
        if (wanted == 4)
            for (int t = 0; t < CHUNK; t += 4) transpose4(from + t, from_step, to + t * step + i, step);
        else
            for (int64_t j = 0; j < wanted; j++)
                for (int t = 0; t < CHUNK; t++) to[t * step + i + j] = from[j * from_step + t];
    }
}

/* The way back, for a contiguous sequence: from lanes to rows. */
static void unpack(const view *v, int64_t first, int64_t width, int64_t count, const float *from) {
    float rows[4][CHUNK];
    for (int64_t i = 0; i < width; i += 4) {
        for (int t = 0; t < CHUNK; t += 4) transpose4(from + t * GROUP + i, GROUP, rows[0] + t, CHUNK);
        for (int64_t j = 0; j < 4 && i + j < width; j++) write_row(v, first + (i + j) * v->of, count, rows[j]);
    }
}

/* Where a view's numbers of an image, a group (of channels, or of B and C), a channel or state, and a chunk begin. */
ALWAYS_INLINE int64_t begins(const sequence_problem *s, const view *v, int64_t image, int64_t share, int64_t row,
                             int64_t chunk) {
    return image / s->groups * v->image + image % s->groups / share * v->group + row * v->of +
           chunk * CHUNK * v->position;
}

static void load_sequence_parameters(const sequence_problem *s, lane_group *g, int64_t image, int64_t group) {
    const scan_problem *p = &s->scan;
    int64_t first = group * GROUP, of_group = image % s->groups * p->channels;
    g->width = p->channels - first < GROUP ? p->channels - first : GROUP;
    for (int64_t lane = 0; lane < GROUP; lane++) {
        int inside = lane < g->width;
        int64_t channel = of_group + (inside ? first + lane : 0);
        for (int64_t n = 0; n < p->state; n++) g->A[n * GROUP + lane] = inside ? p->A_log[channel * p->state + n] : 0.0f;
        g->bias[lane] = inside && s->bias ? s->bias[channel] : 0.0f;
        g->D[lane] = inside && p->D ? p->D[channel] : 0.0f;
    }
    for (int64_t i = 0; i < p->state * GROUP; i += LANES) vstore(g->A_log2e + i, vload(g->A + i) * 1.44269504f);
}

/* Packs B and C of a chunk, for all groups of the workspace. */
static void pack_rows(workspace *ws, const sequence_problem *s, int64_t image, int64_t chunk) {
    const scan_problem *p = &s->scan;
    int64_t left = scan_length(p) - chunk * CHUNK, row = scan_row(p);
    ws->count = left < CHUNK ? left : CHUNK;
    pack(&s->B, begins(s, &s->B, image, s->shared_B, 0, chunk), p->state, p->state, ws->count, ws->rows, row);
    pack(&s->C, begins(s, &s->C, image, s->shared_C, 0, chunk), p->state, p->state, ws->count, ws->rows + p->state, row);
}

/* u, dt and dt u of a chunk, and the slope of softplus where it is wanted. */
static void sequence_steps(workspace *ws, const sequence_problem *s, lane_group *g, int64_t image, int64_t group,
                           int64_t chunk, const int want_slope, const int known) {
    int64_t at = begins(s, &s->u, image, 1, group * GROUP, chunk), count = ws->count;
    pack(&s->u, at, g->width, GROUP, count, g->u, GROUP);
    if (!known) {
        at = begins(s, &s->delta, image, 1, group * GROUP, chunk);
        pack(&s->delta, at, g->width, GROUP, count, g->dt, GROUP);
        for (int v = 0; v < GROUP; v += LANES) {
            vf bias = vload(g->bias + v), slope = vset(1.0f);
            for (int64_t i = v; i < count * GROUP; i += GROUP) {
                vf z = vload(g->dt + i) + bias;
                vstore(g->dt + i, s->softplus ? softplus(z, want_slope ? &slope : 0) : z);
                if (want_slope) vstore(g->slope + i, slope);
            }
        }
        for (int64_t lane = g->width; lane < GROUP; lane++)
            for (int64_t t = 0; t < count; t++) {
                g->dt[t * GROUP + lane] = 0.0f;
                if (want_slope) g->slope[t * GROUP + lane] = 0.0f;
            }
    }
    for (int64_t i = 0; i < count * GROUP; i += LANES) vstore(g->dtu + i, vload(g->dt + i) * vload(g->u + i));
}

ALWAYS_INLINE vf silu(vf z, vf *slope) {
    vf s = sigmoid(z, exp_minus_abs(z));
    if (slope) *slope = s * (z * (1.0f - s) + 1.0f);
    return z * s;
}

/* The memory that both passes have beyond the workspace: tiles of a chunk. */
typedef struct {
    float *z, *kept_dt;
} tiles;

static int64_t lay_out_sequence(workspace *ws, tiles *t, const scan_problem *p, int groups, int backward, float *base) {
    int64_t used = lay_out(ws, p, groups, backward, base);
    t->z = take(base, &used, CHUNK * GROUP);
    t->kept_dt = take(base, &used, CHUNK * GROUP);
    return used;
}

static int64_t sequence_floats(const scan_problem *p, int backward) {
    workspace ws;
    tiles t;
    return lay_out_sequence(&ws, &t, p, PULLED, backward, 0);
}

ALWAYS_INLINE void walk_sequence(const workspace *ws, const sequence_problem *s, const lane_group *g, const int want_y,
                                 float *kept, const int keep) {
    if (s->grows)
        walk_chunk(ws, &s->scan, g, want_y, kept, keep, 1);
    else
        walk_chunk(ws, &s->scan, g, want_y, kept, keep, 0);
}

static void begin_pair(workspace *ws, const sequence_problem *s, int64_t image, int64_t pair) {
    for (int64_t i = 0; i < ws->groups; i++) {
        load_sequence_parameters(s, &ws->group[i], image, pair * PULLED + i);
        memset(ws->group[i].h, 0, (size_t)(s->scan.state * GROUP) * sizeof(float));
    }
}

static int64_t groups_of_pair(const scan_problem *p, int64_t pair) {
    int64_t left = scan_groups(p) - pair * PULLED;
    return left < PULLED ? left : PULLED;
}

static void forward_sequence(const sequence_problem *s, int64_t image, int64_t pair, float *scratch) {
    const scan_problem *p = &s->scan;
    workspace ws;
    tiles tile;
    ws.groups = groups_of_pair(p, pair);
    lay_out_sequence(&ws, &tile, p, (int)ws.groups, 0, scratch);
    begin_pair(&ws, s, image, pair);
    for (int64_t chunk = 0; chunk < scan_chunks(p); chunk++) {
        pack_rows(&ws, s, image, chunk);
        for (int64_t i = 0; i < ws.groups; i++) {
            lane_group *g = &ws.group[i];
            int64_t group = pair * PULLED + i, first = group * GROUP;
            sequence_steps(&ws, s, g, image, group, chunk, 0, 0);
            walk_sequence(&ws, s, g, 1, 0, 0);
            if (s->z.data) {
                pack(&s->z, begins(s, &s->z, image, 1, first, chunk), g->width, GROUP, ws.count, tile.z, GROUP);
                for (int64_t j = 0; j < ws.count * GROUP; j += LANES)
                    vstore(g->dt + j, vload(g->dt + j) * silu(vload(tile.z + j), 0));
            }
            unpack(&s->out, begins(s, &s->out, image, 1, first, chunk), g->width, ws.count, g->dt);
        }
    }
    for (int64_t i = 0; i < ws.groups; i++)
        for (int64_t lane = 0; lane < ws.group[i].width; lane++)
            for (int64_t n = 0; n < p->state; n++)
                s->last[(image * p->channels + (pair * PULLED + i) * GROUP + lane) * p->state + n] =
                    ws.group[i].h[n * GROUP + lane];
}

/* The gradient of y before its gate, in g->grad_y; and if `y` is there, the gradient of z is written. */
static void pull_gate_of(const workspace *ws, const sequence_problem *s, const tiles *tile, lane_group *g, int64_t image,
                         int64_t group, int64_t chunk, const float *y) {
    int64_t at = begins(s, &s->grad_out, image, 1, group * GROUP, chunk), size = ws->count * GROUP;
    if (!s->grad_out.data)
        memset(g->grad_y, 0, CHUNK * GROUP * sizeof(float));
    else
        pack(&s->grad_out, at, g->width, GROUP, ws->count, g->grad_y, GROUP);
    if (!s->z.data) return;
    at = begins(s, &s->z, image, 1, group * GROUP, chunk);
    pack(&s->z, at, g->width, GROUP, ws->count, tile->z, GROUP);
    for (int64_t j = 0; j < size; j += LANES) {
        vf slope, grad = vload(g->grad_y + j), gate = silu(vload(tile->z + j), &slope);
        if (y) vstore(tile->z + j, grad * vload(y + j) * slope);
        vstore(g->grad_y + j, grad * gate);
    }
    if (y) unpack(&s->grad_z, begins(s, &s->grad_z, image, 1, group * GROUP, chunk), g->width, ws->count, tile->z);
}

/* Walks forward to fill g->starts and what is kept for the last chunks, and writes the gradient of z. */
static void go_along(workspace *ws, const sequence_problem *s, const tiles *tile, int64_t image, int64_t pair) {
    const scan_problem *p = &s->scan;
    int64_t chunks = scan_chunks(p), states = p->state * GROUP;
    size_t bytes = CHUNK * GROUP * sizeof(float);
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        for (int64_t i = 0; i < ws->groups; i++)
            memcpy(ws->group[i].starts + chunk * states, ws->group[i].h, (size_t)states * sizeof(float));
        if (chunk + 1 == chunks && !s->z.data) break;
        pack_rows(ws, s, image, chunk);
        float *kept = kept_place(ws, p, chunk);
        for (int64_t i = 0; i < ws->groups; i++) {
            lane_group *g = &ws->group[i];
            int64_t group = pair * PULLED + i;
            if (kept)
                sequence_steps(ws, s, g, image, group, chunk, 1, 0);
            else
                sequence_steps(ws, s, g, image, group, chunk, 0, 0);
            float *decays = kept ? g->slope + CHUNK * GROUP : 0;
            if (s->z.data) {
                memcpy(tile->kept_dt, g->dt, bytes);
                if (kept)
                    walk_sequence(ws, s, g, 1, decays, 1);
                else
                    walk_sequence(ws, s, g, 1, 0, 0);
                pull_gate_of(ws, s, tile, g, image, group, chunk, g->dt);
                memcpy(g->dt, tile->kept_dt, bytes);
            } else if (kept) {
                walk_sequence(ws, s, g, 0, decays, 1);
            } else {
                walk_sequence(ws, s, g, 0, 0, 0);
            }
        }
    }
}

static void backward_sequence(const sequence_problem *s, int64_t image, int64_t pair, float *scratch) {
    const scan_problem *p = &s->scan;
    workspace ws;
    tiles tile;
    int64_t chunks = scan_chunks(p), states = p->state, row = scan_row(p), params = scan_params(p);
    ws.groups = groups_of_pair(p, pair);
    lay_out_sequence(&ws, &tile, p, (int)ws.groups, 1, scratch);
    memset(ws.products_B, 0, PULLED_STATES * CHUNK * LANES * sizeof(float));
    memset(ws.products_C, 0, PULLED_STATES * CHUNK * LANES * sizeof(float));
    begin_pair(&ws, s, image, pair);
    double *dparams = p->dparams + (image * scan_groups(p) + pair * PULLED) * params * GROUP;
    float *partial = p->partial + (image * scan_pairs(p) + pair) * chunks * row * CHUNK;
    memset(dparams, 0, (size_t)(ws.groups * params * GROUP) * sizeof(double));
    go_along(&ws, s, &tile, image, pair);
    for (int64_t i = 0; i < ws.groups; i++) {
        lane_group *g = &ws.group[i];
        memset(g->grad_h, 0, (size_t)(states * GROUP) * sizeof(float));
        int64_t first = image * p->channels + (pair * PULLED + i) * GROUP;
        for (int64_t lane = 0; s->grad_last && lane < g->width; lane++)
            for (int64_t n = 0; n < states; n++)
                g->grad_h[n * GROUP + lane] = s->grad_last[(first + lane) * states + n];
    }
    for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
        pack_rows(&ws, s, image, chunk);
        float *kept = kept_place(&ws, p, chunk);
        for (int64_t i = 0; i < ws.groups; i++) {
            lane_group *g = &ws.group[i];
            if (kept)
                sequence_steps(&ws, s, g, image, pair * PULLED + i, chunk, 1, 1);
            else
                sequence_steps(&ws, s, g, image, pair * PULLED + i, chunk, 1, 0);
            pull_gate_of(&ws, s, &tile, g, image, pair * PULLED + i, chunk, 0);
            memcpy(g->h, g->starts + chunk * states * GROUP, (size_t)(states * GROUP) * sizeof(float));
        }
        if (s->grows)
            pull_chunk(&ws, p, partial + chunk * row * CHUNK, kept, 1);
        else
            pull_chunk(&ws, p, partial + chunk * row * CHUNK, kept, 0);
        for (int64_t i = 0; i < ws.groups; i++) {
            lane_group *g = &ws.group[i];
            int64_t first = (pair * PULLED + i) * GROUP;
            unpack(&s->grad_u, begins(s, &s->grad_u, image, 1, first, chunk), g->width, ws.count, g->grad_dtu);
            unpack(&s->grad_delta, begins(s, &s->grad_delta, image, 1, first, chunk), g->width, ws.count, g->grad_dt);
            double *to = dparams + i * params * GROUP; /* in double, as in pull.h */
            for (int64_t j = 0; j < params * GROUP; j++) to[j] += g->sums[j];
        }
    }
}

#endif
