/*
 * arena: memory of one reply: many small pieces, freed together.
 *
 * Threads: belongs to the handler's thread.
 */
#ifndef RK_COORDINATOR_ARENA_H
#define RK_COORDINATOR_ARENA_H

#include <stddef.h>

struct arena_block;

struct arena { /* zero-initialised */
    struct arena_block *blocks;
    size_t used;
};

/* Zeroed, aligned for any object. NULL when memory is out. */
void *arena_alloc(struct arena *arena, size_t count, size_t bytes_each);
char *arena_string(struct arena *arena, const char *text);
void arena_free(struct arena *arena);

#endif
