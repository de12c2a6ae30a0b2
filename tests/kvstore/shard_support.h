/* Shards for tests: small layouts, bytes that follow from (segment, page), whole puts. */
#ifndef RK_TESTS_KVSTORE_SHARD_SUPPORT_H
#define RK_TESTS_KVSTORE_SHARD_SUPPORT_H

#include "kvstore/kvstore.h"

/* Segment `number` of a layout with 4 KiB pages: 2 layers, 2 KV heads, bf16, head_dim 16. */
struct kvstore_header shard_header(uint32_t number, uint64_t generation, uint32_t num_tokens);
struct kvstore_name shard_name(const struct kvstore_header *header);
uint64_t shard_pages(const struct kvstore_header *header);
/* Fills one page and returns its checksum. */
uint64_t shard_page_fill(const struct kvstore_header *header, uint64_t page, void *ret_bytes);
/* begin, pages and seal, `step` pages a call. */
enum rk_status shard_write(struct kvstore *store, const struct kvstore_header *header, size_t step);
/* And commit. */
enum rk_status shard_put(struct kvstore *store, const struct kvstore_header *header);
/* Pins it, compares every byte, unpins; the status of the pin. Aborts on a difference. */
enum rk_status shard_read(struct kvstore *store, const struct kvstore_header *header);

#endif
