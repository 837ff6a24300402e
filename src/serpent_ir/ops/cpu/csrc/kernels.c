/* The scan of channel groups of one image, compiled once for each dispatch level (named by LEVEL). */
#include "conv.h"
#include "gate.h"
#include "pull.h"
#include "sequence.h"
#include "walk.h"

#define JOIN(a, b) a##b
#define NAMED(level) JOIN(scan_kernels_, level)
#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)

static void forward(const scan_problem *p, const scan_task *task, float *scratch) {
    workspace ws;
    lane_group *g = ws.group;
    int64_t image = task->image, group = task->group, states = p->state * GROUP;
    float *y = task->out + image * scan_length(p) * p->channels + group * GROUP;
    ws.groups = 1;
    lay_out(&ws, p, 1, 0, scratch);
    for (int64_t k = task->k_begin; k < task->k_end; k++) {
        int add = task->add || k > task->k_begin;
        load_parameters(g, p, k, group);
        memset(g->h, 0, states * sizeof(float));
        begin_walk(&ws, p, image, group, k, 0, task->out, 0);
        for (int64_t chunk = 0; chunk < scan_chunks(p); chunk++) {
            load_chunk(&ws, p, chunk + 1);
            if (p->states) memcpy(kept_states(p, image, k, group) + chunk * states, g->h, states * sizeof(float));
            time_steps(&ws, p, g, 0, 0);
            walk_chunk(&ws, p, g, 1, 0, 0, 0);
            for (int64_t t = 0; t < ws.count; t++)
                store_lanes(y + ws.pixel[t] * p->channels, g->dt + t * GROUP, g->width, add);
        }
    }
}

extern const scan_kernels NAMED(LEVEL);
const scan_kernels NAMED(LEVEL) = {TEXT(LEVEL), scratch_floats, forward, backward, gate, pull_gate,
                                    conv, pull_conv, sequence_floats, forward_sequence, backward_sequence, write_row};
