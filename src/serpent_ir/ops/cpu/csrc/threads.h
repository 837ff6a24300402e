/* Runs tasks 0 to count - 1, split over threads into fixed ranges. */
#ifndef SERPENT_THREADS_H
#define SERPENT_THREADS_H

#include <stdint.h>

typedef void (*task_function)(void *context, int64_t task, int thread);

/* The function of OpenMP libraries that compilers call for a parallel region: runs function(data) in every thread. */
typedef void gomp_parallel(void (*function)(void *), void *data, unsigned threads, unsigned flags);

/* Runs every task once and returns when all are done. Thread numbers are below `threads`. `openmp` may be NULL. */
void run_tasks(task_function function, void *context, int64_t count, int threads, gomp_parallel *openmp);

#endif
