/*
 * table_internal: uthash with our allocator, and with a status instead of an exit when
 * memory is out: after HASH_ADD, hh.tbl is NULL for an element that did not fit.
 */
#ifndef RK_COORDINATOR_TABLE_INTERNAL_H
#define RK_COORDINATOR_TABLE_INTERNAL_H

#include "common/base/alloc.h"

#define HASH_NONFATAL_OOM         1
#define uthash_malloc(bytes)      rk_alloc(bytes)
#define uthash_free(block, bytes) rk_free(block)

#include <uthash.h>
#include <utlist.h>

#endif
