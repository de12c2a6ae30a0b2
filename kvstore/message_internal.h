/* message: a shard's header as the protobuf message, for replies and announcements. */
#ifndef RK_KVSTORE_MESSAGE_INTERNAL_H
#define RK_KVSTORE_MESSAGE_INTERNAL_H

#include "kvstore/kvstore.h"
#include "redknot/v1/common.pb-c.h"

/* The message and what it points to. */
struct shard_message {
    Redknot__V1__Shard shard;
    Redknot__V1__HeadRange heads;
    Redknot__V1__KvLayout layout;
};

/* Borrows the header's ids and node_id. */
void shard_message_fill(struct shard_message *message, const struct kvstore_header *header,
                        const char *node_id);

#endif
