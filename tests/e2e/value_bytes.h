/* The bytes of a value, made from a number: any thread can say what it must read. */
#ifndef TESTS_E2E_VALUE_BYTES_H
#define TESTS_E2E_VALUE_BYTES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* splitmix64 */
static inline uint64_t value_word(uint64_t name, uint64_t index)
{
    uint64_t z = name * UINT64_C(0xd1342543de82ef95) + (index + 1) * UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

static inline void value_fill(uint64_t name, void *data, uint64_t bytes)
{
    uint8_t *at = data;
    for (uint64_t done = 0; done < bytes; done += sizeof(uint64_t)) {
        uint64_t word = value_word(name, done / sizeof(word));
        uint64_t left = bytes - done;
        memcpy(at + done, &word, left < sizeof(word) ? left : sizeof(word));
    }
}

/* The first wrong byte of a part that begins at `offset`, in it; `bytes`: all are right. */
static inline uint64_t value_compare_at(uint64_t name, uint64_t offset, const void *data,
                                        uint64_t bytes)
{
    const uint8_t *at = data;
    for (uint64_t done = 0; done < bytes;) {
        uint64_t word = value_word(name, (offset + done) / sizeof(word));
        uint64_t skip = (offset + done) % sizeof(word);
        uint64_t count = sizeof(word) - skip < bytes - done ? sizeof(word) - skip : bytes - done;
        if (memcmp(at + done, (const uint8_t *)&word + skip, count) != 0) {
            return done;
        }
        done += count;
    }
    return bytes;
}

static inline uint64_t value_compare(uint64_t name, const void *data, uint64_t bytes)
{
    return value_compare_at(name, 0, data, bytes);
}

/* The next number, from 0 to limit - 1. */
static inline uint64_t value_random(uint64_t *state, uint64_t limit)
{
    *state += 1;
    return value_word(*state, 0) % limit;
}

#endif
