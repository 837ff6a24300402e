/* What driver.c and parts.c, the two files of the interface, share. */
#ifndef SERPENT_DRIVER_H
#define SERPENT_DRIVER_H

#include <stddef.h>

#include "scan.h"

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

enum { OK = 0, NO_MEMORY = 1, NO_LEVEL = 2 };

/* The level with this number, counted from the plainest; NULL past the last one that this machine can run. */
const scan_kernels *kernels_at(int level);

/* The memory of a call: `floats` numbers from `from` on, aligned to cache lines. */
typedef struct {
    int64_t floats;
    float *from;
} block;

/* NULL if there is not enough memory. */
block *borrow(int64_t floats);
void give_back(block *memory);
void use_large_pages(void *from, int64_t bytes);

static inline int clamp_threads(int threads, int64_t tasks) {
    if (threads < 1) return 1;
    return threads > tasks ? (int)tasks : threads;
}

#endif
