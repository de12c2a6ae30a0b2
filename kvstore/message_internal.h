/*
 * message: what redknot.v1.KvStore's messages mean: a shard's header into one, and names, headers
 * and extents out of them. What comes from a peer is checked here or by the store.
 */
#ifndef RK_KVSTORE_MESSAGE_INTERNAL_H
#define RK_KVSTORE_MESSAGE_INTERNAL_H

#include "kvstore/kvstore.h"
#include "redknot/v1/kvstore.pb-c.h"

/* The message and what it points to. */
struct shard_message {
    Redknot__V1__Shard shard;
    Redknot__V1__HeadRange heads;
    Redknot__V1__KvLayout layout;
};

/* Borrows the header's ids and node_id. */
void shard_message_fill(struct shard_message *message, const struct kvstore_header *header,
                        const char *node_id);

bool message_id_read(const ProtobufCBinaryData *bytes, struct rk_id *ret_id);
RK_MUST_CHECK enum rk_status message_name_read(const ProtobufCBinaryData *segment_id,
                                               uint64_t generation, uint32_t shard_index,
                                               struct kvstore_name *ret_name,
                                               struct rk_error *error);
/* Of a shard or a value. Text, tokens and key stay the message's. */
RK_MUST_CHECK enum rk_status message_header_read(const Redknot__V1__PutItem *wire,
                                                 struct kvstore_header *ret_header,
                                                 struct rk_error *error);

/* What one item of a get asks for. */
struct message_get {
    bool value; /* then only id and bytes_max count */
    struct rk_id id;
    struct rk_id fingerprint;
    uint64_t generation;
    uint32_t shard_index;
    uint32_t page_bytes;       /* 0: any */
    uint64_t bytes_max;        /* 0: any */
    struct rk_extent *extents; /* NULL: all pages */
    size_t num_extents;
    uint64_t num_pages; /* sum over the extents */
};
/* What a whole get may still ask for: items share it, so that many of them cost no more than one.
 */
struct message_budget {
    size_t extents;
    uint64_t pages;
};
struct message_budget message_budget_new(void);
/* The caller frees the extents, also after an error. */
RK_MUST_CHECK enum rk_status message_get_read(const Redknot__V1__GetItem *wire,
                                              struct message_budget *budget,
                                              struct message_get *ret_get, struct rk_error *error);

#endif
