/* Two ways to run the shares of a call. The caller works in both.
 *
 * First way: PyTorch's own OpenMP threads, if Python found their entry GOMP_parallel. They spin for a while after every
 * operation of PyTorch's, so threads of our own would wait for the cores that those hold (on 2 cores right after a
 * matrix product: 1.8 ms instead of 0.8). On a machine busy with other work they stall as PyTorch's operations do.
 *
 * Second way: threads that are started for the call and joined before it returns. Nothing outlives the call, so this is
 * safe in a forked child, where the OpenMP threads do not exist and waiting for them would never end.
 *
 * The shares are the same in both, and calls from several Python threads share nothing. */
#include "threads.h"

#include <stdlib.h>

#if defined(_WIN32)
#include <windows.h>
typedef HANDLE thread_handle;
#else
#include <pthread.h>
typedef pthread_t thread_handle;
#endif

typedef struct {
    task_function function;
    void *context;
    int64_t begin, end;
    int thread;
} share;

typedef struct {
    share share;
    int started;
    thread_handle handle;
} own_thread;

static void work(share *s) {
    for (int64_t task = s->begin; task < s->end; task++) s->function(s->context, task, s->thread);
}

#if defined(_WIN32)
static DWORD WINAPI thread_main(LPVOID own) {
    work(&((own_thread *)own)->share);
    return 0;
}

static int start(own_thread *own) {
    own->handle = CreateThread(NULL, 0, thread_main, own, 0, NULL);
    return own->handle != NULL;
}

static void join(own_thread *own) {
    WaitForSingleObject(own->handle, INFINITE);
    CloseHandle(own->handle);
}
#else
static void *thread_main(void *own) {
    work(&((own_thread *)own)->share);
    return NULL;
}

static int start(own_thread *own) { return pthread_create(&own->handle, NULL, thread_main, own) == 0; }

static void join(own_thread *own) { pthread_join(own->handle, NULL); }
#endif

static int64_t bound(int64_t count, int i, int threads) { return count * i / threads; }

#if defined(__GNUC__)
typedef struct {
    task_function function;
    void *context;
    int64_t count;
    int threads, next;
} team;

/* Run by every thread of the team, which may have fewer threads than were asked for. */
static void team_main(void *context) {
    team *t = context;
    int i;
    while ((i = __atomic_fetch_add(&t->next, 1, __ATOMIC_RELAXED)) < t->threads) {
        share s = {t->function, t->context, bound(t->count, i, t->threads), bound(t->count, i + 1, t->threads), i};
        work(&s);
    }
}
#endif

void run_tasks(task_function function, void *context, int64_t count, int threads, gomp_parallel *openmp) {
    share alone = {function, context, 0, count, 0};
#if defined(__GNUC__)
    if (openmp && threads > 1) {
        team t = {function, context, count, threads, 0};
        openmp(team_main, &t, (unsigned)threads, 0);
        return;
    }
#endif
    (void)openmp;
    own_thread *own = threads > 1 ? malloc((size_t)threads * sizeof(own_thread)) : NULL;
    if (!own) {
        work(&alone);
        return;
    }
    for (int i = threads - 1; i >= 0; i--) {
        share s = {function, context, bound(count, i, threads), bound(count, i + 1, threads), i};
        own[i].share = s;
        own[i].started = i > 0 && start(&own[i]);
    }
    work(&own[0].share);
    for (int i = 1; i < threads; i++) {
        if (own[i].started)
            join(&own[i]);
        else
            work(&own[i].share); /* the system could not start a thread: slower, but correct */
    }
    free(own);
}
