/*
 * documents: token ids for requests, cut from the golden texts, so that tests
 * ask about language and not about noise. Everything is deterministic by seed.
 */
#ifndef TESTS_E2E_DOCUMENTS_H
#define TESTS_E2E_DOCUMENTS_H

#include <stddef.h>
#include <stdint.h>

/* A pool of some thousand ids; borrowed for the life of the process. */
const int32_t *documents_pool(size_t *ret_count);
/* splitmix64 */
uint64_t documents_random(uint64_t *state);
/* num_tokens ids from a random place of the pool (it wraps around). */
void documents_cut(uint64_t *state, size_t num_tokens, int32_t *ret_ids);

#endif
