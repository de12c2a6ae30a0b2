/*
 * board: what the processes of test_wrong_bytes.c know of each other, in memory that they share.
 *
 * What a value must be follows from its key and version. A writer says on the board which version
 * it put last; whoever began to read after that may see no older one. Each key has one writer.
 */
#ifndef TESTS_E2E_BYTES_BOARD_H
#define TESTS_E2E_BYTES_BOARD_H

#include "common/base/status.h"

#include <stdatomic.h>
#include <stdint.h>

#define BOARD_KEYS      96
#define BOARD_PEERS_MAX 16

struct board_key {
    _Atomic uint64_t next;  /* version to write */
    _Atomic uint64_t floor; /* the newest whose drop and put both went well */
};

struct board_peer {
    _Atomic uint64_t statuses[RK_STATUS_COUNT];
    _Atomic uint64_t bytes;   /* compared with what was written */
    _Atomic uint64_t lost;    /* held pages that the guard gave up, rightly or to be safe */
    _Atomic uint64_t flipped; /* held pages in which the fault injection changed one byte */
    _Atomic uint64_t refused; /* calls of a forked child */
    char wrong[600];          /* the first thing that must not be */
};

struct board {
    _Atomic uint32_t stopping;
    struct board_key keys[BOARD_KEYS];
    struct board_peer peers[BOARD_PEERS_MAX];
};

#endif
