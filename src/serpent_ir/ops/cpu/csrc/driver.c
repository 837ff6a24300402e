/* The library's interface: the choice of the dispatch level, memory, and the order in which tasks run.
 *
 * Every number is written by one task only, and sums over tasks are taken afterwards in a fixed order. So results do
 * not depend on the number of threads. */
#include <stdlib.h>
#include <string.h>

#include "driver.h"
#include "threads.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

enum { ABI = 5 };

extern const scan_kernels scan_kernels_generic;
#if defined(SERPENT_X86_LEVELS)
extern const scan_kernels scan_kernels_x86_64_v2, scan_kernels_x86_64_v3, scan_kernels_x86_64_v4;
#endif

#if defined(SERPENT_X86_LEVELS)
#include <cpuid.h>

/* The highest of the levels 0 to 3 that the processor supports and whose registers the operating system saves. The
 * features are those that CMakeLists.txt compiles each level for. They are read with cpuid, because
 * __builtin_cpu_supports needs a table of the compiler's runtime that zig's runtime lacks. */
static int x86_level(void) {
    enum { SSSE3 = 1 << 9, FMA = 1 << 12, SSE4 = 3 << 19, OSXSAVE = 1 << 27 };               /* leaf 1, ecx */
    enum { AVX2 = 1 << 5, AVX512 = 1 << 16 | 1 << 17 | 1 << 30, AVX512VL = (int)(1u << 31) }; /* leaf 7, ebx: F, DQ, BW */
    enum { YMM = 0x6, ZMM = 0xe6 };                                                           /* XCR0 */
    unsigned a, b, c, d, saved = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & (SSSE3 | SSE4)) != (SSSE3 | SSE4)) return 0;
    if (c & OSXSAVE) __asm__ volatile("xgetbv" : "=a"(saved), "=d"(d) : "c"(0));
    unsigned fma = c & FMA;
    if (!fma || (saved & YMM) != YMM || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & AVX2)) return 1;
    unsigned wide = (unsigned)AVX512 | (unsigned)AVX512VL;
    return (b & wide) == wide && (saved & ZMM) == ZMM ? 3 : 2;
}
#endif

const scan_kernels *kernels_at(int level) {
#if defined(SERPENT_X86_LEVELS)
    static int known; /* the highest level + 1 once it is known; in a virtual machine each cpuid takes microseconds */
    int highest = __atomic_load_n(&known, __ATOMIC_RELAXED) - 1;
    if (highest < 0) __atomic_store_n(&known, (highest = x86_level()) + 1, __ATOMIC_RELAXED);
    const scan_kernels *const found[] = {&scan_kernels_generic, &scan_kernels_x86_64_v2, &scan_kernels_x86_64_v3,
                                         &scan_kernels_x86_64_v4};
    return level >= 0 && level <= highest ? found[level] : NULL;
#else
    return level == 0 ? &scan_kernels_generic : NULL;
#endif
}

EXPORT int serpent_scan_abi(void) { return ABI; }

EXPORT const char *serpent_scan_level(int level) {
    const scan_kernels *kernels = kernels_at(level);
    return kernels ? kernels->name : NULL;
}

/* Asks the system to map large fresh memory in pages of 2 MB, where it can. With pages of 4 KB, page faults would take
 * a fifth of the time of a large scan. */
void use_large_pages(void *from, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = 1 << 21;
    uintptr_t begin = ((uintptr_t)from + page - 1) & ~(page - 1);
    uintptr_t end = ((uintptr_t)from + (uintptr_t)bytes) & ~(page - 1);
    if (end >= begin + 4 * page) madvise((void *)begin, end - begin, MADV_HUGEPAGE);
#else
    (void)from, (void)bytes;
#endif
}

EXPORT void serpent_scan_large_pages(void *fresh, int64_t bytes) { use_large_pages(fresh, bytes); }

typedef struct {
    scan_problem problem;
    const scan_kernels *kernels;
    float *scratch;
    int64_t scratch_floats;
    float *out;   /* y or du */
    float *parts; /* the outputs of directions 1 to 3 if directions are tasks of their own, else NULL */
    float *const *grads;
} call;

static int64_t map_floats(const scan_problem *p) { return p->batch * scan_length(p) * p->channels; }

enum { LINE = 64, SPARE_FLOATS = 1 << 23 };

#if defined(__GNUC__)
static block *spare;
static block *swap_spare(block *with) { return __atomic_exchange_n(&spare, with, __ATOMIC_ACQ_REL); }
#else
static block *swap_spare(block *with) {
    free(with);
    return NULL;
}
#endif

/* The memory of one call. Up to 32 MB are kept for the next call, since fresh memory costs a page fault every 4 KB: a
 * fifth of a small map's backward pass. Of concurrent calls one gets it. After a fork each process has its own. */
block *borrow(int64_t floats) {
    block *found = swap_spare(NULL);
    if (found && found->floats >= floats) return found;
    free(found);
    if (floats < 0 || (uint64_t)floats > (SIZE_MAX - LINE - sizeof(block)) / sizeof(float)) return NULL;
    found = malloc(sizeof(block) + LINE + (size_t)floats * sizeof(float));
    if (!found) return NULL;
    found->floats = floats;
    found->from = (float *)(((uintptr_t)(found + 1) + LINE - 1) & ~(uintptr_t)(LINE - 1));
    use_large_pages(found->from, floats * (int64_t)sizeof(float));
    return found;
}

void give_back(block *memory) { free(memory && memory->floats > SPARE_FLOATS ? memory : swap_spare(memory)); }

/* Whether directions should be tasks of their own. They should if tasks of (image, group or pair) alone would leave
 * threads idle for a fifth of the time or more. Sums are taken in the same order either way, so the bits are the
 * same. */
static int split_directions(int64_t tasks, int threads) {
    int64_t whole = (tasks + threads - 1) / threads, split = (DIRECTIONS * tasks + threads - 1) / threads;
    return 5 * split <= 4 * DIRECTIONS * whole;
}

/* The task with this number, for the directions of the current phase: forward over all groups, backward over some
 * pairs. */
static scan_task find_task(const call *c, int64_t number, int backward) {
    const scan_problem *p = &c->problem;
    int64_t k = c->parts ? number % DIRECTIONS : 0, first = backward ? p->pair_begin : 0;
    int64_t cells = backward ? p->pair_end - first : scan_groups(p), groups = backward ? PULLED : 1;
    if (c->parts) number /= DIRECTIONS;
    scan_task task = {number / cells, (first + number % cells) * groups, p->k_begin, p->k_end, c->out, p->k_begin > 0};
    if (c->parts) task.k_begin = k, task.k_end = k + 1;
    if (k > 0) task.out = c->parts + (k - 1) * map_floats(p);
    return task;
}

enum { MERGED = 1 << 14 }; /* floats of a merging task */

static void merge_task(void *context, int64_t task, int thread) {
    const call *c = context;
    int64_t floats = map_floats(&c->problem), end = (task + 1) * MERGED < floats ? (task + 1) * MERGED : floats;
    const float *one = c->parts, *two = one + floats, *three = two + floats;
    (void)thread;
    for (int64_t i = task * MERGED; i < end; i++) c->out[i] = ((c->out[i] + one[i]) + two[i]) + three[i];
}

static scan_problem problem_of(const int64_t sizes[6], const float *const inputs[6]) {
    scan_problem p = {0};
    p.batch = sizes[0], p.height = sizes[1], p.width = sizes[2];
    p.channels = sizes[3], p.state = sizes[4], p.rank = sizes[5];
    p.u = inputs[0], p.proj = inputs[1], p.dt_weight = inputs[2];
    p.dt_bias = inputs[3], p.A_log = inputs[4], p.D = inputs[5];
    return p;
}

static void run_merge(call *c, int threads, gomp_parallel *openmp) {
    int64_t tasks = (map_floats(&c->problem) + MERGED - 1) / MERGED;
    run_tasks(merge_task, c, tasks, clamp_threads(threads, tasks), openmp);
}

/* The number of floats that the states of a call take. */
EXPORT int64_t serpent_scan_states(const int64_t sizes[6]) {
    const float *none[6] = {0};
    scan_problem p = problem_of(sizes, none);
    return p.batch * DIRECTIONS * scan_groups(&p) * scan_states(&p);
}

static void forward_task(void *context, int64_t task, int thread) {
    call *c = context;
    scan_task t = find_task(c, task, 0);
    c->kernels->forward(&c->problem, &t, c->scratch + thread * c->scratch_floats);
}

/* sizes: batch, height, width, channels, state, rank, each at least 1. inputs: u, proj, dt_weight, dt_bias, A_log, D.
 * openmp: see threads.h. Writes y and, unless `states` is NULL, serpent_scan_states floats of states. */
EXPORT int serpent_scan_forward(int level, int threads, gomp_parallel *openmp, const int64_t sizes[6],
                                const float *const inputs[6], float *y, float *states) {
    call c = {problem_of(sizes, inputs), kernels_at(level), NULL, 0, y, NULL, NULL};
    if (!c.kernels) return NO_LEVEL;
    scan_problem *p = &c.problem;
    p->k_end = DIRECTIONS;
    p->states = states;
    threads = threads < 1 ? 1 : threads;
    int64_t cells = p->batch * scan_groups(p);
    int split = split_directions(cells, threads);
    int64_t tasks = split ? DIRECTIONS * cells : cells, parts = split ? (DIRECTIONS - 1) * map_floats(p) : 0;
    int workers = clamp_threads(threads, tasks);
    c.scratch_floats = c.kernels->scratch_floats(p, 0);
    block *memory = borrow(workers * c.scratch_floats + parts);
    if (!memory) return NO_MEMORY;
    c.scratch = memory->from;
    c.parts = split ? c.scratch + workers * c.scratch_floats : NULL;
    use_large_pages(y, map_floats(p) * (int64_t)sizeof(float));
    run_tasks(forward_task, &c, tasks, workers, openmp);
    if (split) run_merge(&c, threads, openmp);
    give_back(memory);
    return OK;
}

static void backward_task(void *context, int64_t task, int thread) {
    call *c = context;
    scan_task t = find_task(c, task, 1);
    c->kernels->backward(&c->problem, &t, c->scratch + thread * c->scratch_floats);
}

/* Adds up the pairs' gradients for one chunk of proj and writes them to the chunk's pixels. */
static void gather_task(void *context, int64_t task, int thread) {
    const scan_problem *p = &((call *)context)->problem;
    int64_t chunks = scan_chunks(p), row = scan_row(p), pairs = p->pair_end - p->pair_begin;
    int64_t chunk = task % chunks, image = task / chunks % p->batch, k = task / chunks / p->batch + p->k_begin;
    const float *first = p->partial + ((task / chunks * pairs) * chunks + chunk) * row * CHUNK;
    float *to[CHUNK];
    int64_t pixel[CHUNK], left = scan_length(p) - chunk * CHUNK, count = left < CHUNK ? left : CHUNK;
    (void)thread;
    scan_pixels(p, k, chunk * CHUNK, count, pixel);
    for (int64_t t = 0; t < count; t++) {
        to[t] = p->dproj + ((image * scan_length(p) + pixel[t]) * DIRECTIONS + k) * row;
        for (int64_t i = 0; i < row; i += GROUP) PREFETCH(to[t] + i);
        PREFETCH(to[t] + row - 1);
    }
    for (int64_t i = 0; i < row; i++) {
        float sums[CHUNK] = {0};
        if (p->pair_begin > 0)
            for (int64_t t = 0; t < count; t++) sums[t] = to[t][i];
        const float *of_pair = first + i * CHUNK;
        for (int64_t pair = 0; pair < pairs; pair++, of_pair += chunks * row * CHUNK)
            for (int t = 0; t < CHUNK; t++) sums[t] += of_pair[t];
        for (int64_t t = 0; t < count; t++) to[t][i] = sums[t];
    }
}

/* The parameter gradients of a direction and group: added up over images in order, laid out like the parameters. */
static void gather_parameters(void *context, int64_t task, int thread) {
    const call *c = context;
    const scan_problem *p = &c->problem;
    int64_t rows = scan_params(p), groups = scan_groups(p), rank = p->rank, state = p->state;
    int64_t k = task / groups, group = task % groups, left = p->channels - group * GROUP;
    const double *from = p->dparams + task * rows * GROUP;
    (void)thread;
    for (int64_t i = 0; i < rows; i++)
        for (int64_t lane = 0; lane < (left < GROUP ? left : GROUP); lane++) {
            int64_t at = k * p->channels + group * GROUP + lane;
            double sum = 0;
            for (int64_t image = 0; image < p->batch; image++)
                sum += from[(image * DIRECTIONS * groups * rows + i) * GROUP + lane];
            if (i < rank)
                c->grads[2][at * rank + i] = (float)sum;
            else if (i == rank)
                c->grads[3][at] = (float)sum;
            else if (i == rank + 1)
                c->grads[5][at] = (float)sum;
            else
                c->grads[4][at * state + i - rank - 2] = (float)sum;
        }
}

/* Writes the gradients of the six inputs, in their order. `states` are those that serpent_scan_forward wrote, or NULL
 * to compute them again. The gradients of proj before their sum over channels take at most partial_floats floats, or as
 * many as the sum takes if that is more. */
EXPORT int serpent_scan_backward(int level, int threads, gomp_parallel *openmp, const int64_t sizes[6],
                                 const float *const inputs[6], float *states, const float *grad_y,
                                 float *const grads[6], int64_t partial_floats) {
    call c = {problem_of(sizes, inputs), kernels_at(level), NULL, 0, grads[0], NULL, grads};
    scan_problem *p = &c.problem;
    if (!c.kernels) return NO_LEVEL;
    p->states = states;
    int64_t pairs = scan_pairs(p), chunks = scan_chunks(p);
    int64_t per_pair = p->batch * chunks * scan_row(p) * CHUNK, whole = DIRECTIONS * per_pair;
    int64_t limit = whole > partial_floats ? whole : partial_floats;
    threads = threads < 1 ? 1 : threads;
    /* Run as much side by side as the limit allows: all directions of all pairs, or some pairs of one direction. */
    int64_t directions = whole * pairs <= limit ? DIRECTIONS : 1;
    int64_t pairs_at_once = directions == DIRECTIONS ? pairs : limit / per_pair;
    if (pairs_at_once > pairs) pairs_at_once = pairs;
    if (pairs_at_once < pairs && pairs_at_once > threads) pairs_at_once -= pairs_at_once % threads;

    int split = directions == DIRECTIONS && split_directions(p->batch * pairs, threads);
    int64_t per_cell = split ? DIRECTIONS : 1; /* tasks per image and pair */
    int workers = clamp_threads(threads, p->batch * pairs_at_once * per_cell);
    c.scratch_floats = c.kernels->scratch_floats(p, 1);
    int64_t scratch = workers * c.scratch_floats, partial = directions * pairs_at_once * per_pair;
    int64_t params = 2 * p->batch * DIRECTIONS * scan_groups(p) * scan_params(p) * GROUP; /* doubles */
    block *memory = borrow(scratch + partial + params + (split ? (DIRECTIONS - 1) * map_floats(p) : 0));
    if (!memory) return NO_MEMORY;
    c.scratch = memory->from;
    p->partial = c.scratch + scratch;
    p->dparams = (double *)(p->partial + partial);
    c.parts = split ? p->partial + partial + params : NULL;
    p->grad_y = grad_y, p->dproj = grads[1];
    int64_t pixels = p->batch * scan_length(p), number = sizeof(float);
    use_large_pages(c.out, pixels * p->channels * number);
    use_large_pages(p->dproj, pixels * DIRECTIONS * scan_row(p) * number);
    for (int64_t k = 0; k < DIRECTIONS; k += directions)
        for (int64_t pair = 0; pair < pairs; pair += pairs_at_once) {
            p->k_begin = k, p->k_end = k + directions;
            p->pair_begin = pair, p->pair_end = pairs - pair < pairs_at_once ? pairs : pair + pairs_at_once;
            int64_t tasks = p->batch * (p->pair_end - p->pair_begin) * per_cell;
            run_tasks(backward_task, &c, tasks, clamp_threads(workers, tasks), openmp);
            tasks = directions * p->batch * chunks;
            run_tasks(gather_task, &c, tasks, clamp_threads(threads, tasks), openmp);
        }
    if (split) run_merge(&c, threads, openmp);
    int64_t tasks = DIRECTIONS * scan_groups(p);
    run_tasks(gather_parameters, &c, tasks, clamp_threads(threads, tasks), openmp);
    give_back(memory);
    return OK;
}
