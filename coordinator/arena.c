#include "coordinator/arena.h"

#include "common/base/alloc.h"

#include <stdint.h>
#include <string.h>

#define ARENA_BLOCK_BYTES ((size_t)64 << 10)
#define ARENA_ALIGN       _Alignof(max_align_t)

struct arena_block {
    struct arena_block *next;
    size_t capacity;
    _Alignas(max_align_t) uint8_t data[];
};

void *arena_alloc(struct arena *arena, size_t count, size_t bytes_each)
{
    size_t bytes;
    void *piece;

    if (__builtin_mul_overflow(count, bytes_each, &bytes) || bytes > SIZE_MAX / 2) {
        return NULL;
    }
    bytes = (bytes + ARENA_ALIGN - 1) / ARENA_ALIGN * ARENA_ALIGN;
    if (arena->blocks == NULL || arena->blocks->capacity - arena->used < bytes) {
        size_t capacity = bytes > ARENA_BLOCK_BYTES ? bytes : ARENA_BLOCK_BYTES;
        struct arena_block *block = rk_alloc(sizeof(*block) + capacity);

        if (block == NULL) {
            return NULL;
        }
        block->next = arena->blocks;
        block->capacity = capacity;
        arena->blocks = block;
        arena->used = 0;
    }
    piece = arena->blocks->data + arena->used;
    arena->used += bytes;
    memset(piece, 0, bytes);
    return piece;
}

char *arena_string(struct arena *arena, const char *text)
{
    size_t bytes = strlen(text) + 1;
    char *copy = arena_alloc(arena, 1, bytes);

    if (copy != NULL) {
        memcpy(copy, text, bytes);
    }
    return copy;
}

void arena_free(struct arena *arena)
{
    while (arena->blocks != NULL) {
        struct arena_block *block = arena->blocks;

        arena->blocks = block->next;
        rk_free(block);
    }
    arena->used = 0;
}
