/*
 * amx_emulated: the tile instructions that attention_amx.c uses, in C.
 *
 * Read before attention_amx.c in the tests, for CPUs without AMX. All tiles are 16 rows of 64
 * bytes.
 */
#ifndef TESTS_KERNELS_AMX_EMULATED_H
#define TESTS_KERNELS_AMX_EMULATED_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps

struct kernels;
struct kernels_attention;
void attention_amx_emulated(struct kernels *kernels, const struct kernels_attention *attention);

static _Thread_local uint8_t emulated_tiles[8][16][64];

static void emulated_load(int tile, const void *from, size_t stride)
{
    for (int row = 0; row < 16; row++) {
        memcpy(emulated_tiles[tile][row], (const uint8_t *)from + row * stride, 64);
    }
}

static void emulated_store(int tile, void *to, size_t stride)
{
    for (int row = 0; row < 16; row++) {
        memcpy((uint8_t *)to + row * stride, emulated_tiles[tile][row], 64);
    }
}

static float emulated_element(int tile, int row, int index)
{
    uint16_t half;
    memcpy(&half, emulated_tiles[tile][row] + index * 2, 2);
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* c[m][n] += sum over pairs k: a[m][2k] b[k][2n] + a[m][2k + 1] b[k][2n + 1] */
static void emulated_product(int c, int a, int b)
{
    for (int m = 0; m < 16; m++) {
        for (int n = 0; n < 16; n++) {
            float even = 0;
            float odd = 0;
            float sum;
            for (int k = 0; k < 16; k++) {
                even += emulated_element(a, m, 2 * k) * emulated_element(b, k, 2 * n);
                odd += emulated_element(a, m, 2 * k + 1) * emulated_element(b, k, 2 * n + 1);
            }
            memcpy(&sum, emulated_tiles[c][m] + n * 4, 4);
            sum += even + odd;
            memcpy(emulated_tiles[c][m] + n * 4, &sum, 4);
        }
    }
}

#define _tile_loadconfig(config)        ((void)(config))
#define _tile_release()                 ((void)0)
#define _tile_zero(tile)                memset(emulated_tiles[tile], 0, sizeof(emulated_tiles[tile]))
#define _tile_loadd(tile, from, stride) emulated_load(tile, from, stride)
#define _tile_stored(tile, to, stride)  emulated_store(tile, to, stride)
#define _tile_dpbf16ps(c, a, b)         emulated_product(c, a, b)

#endif
