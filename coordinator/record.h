/*
 * record: between messages and the coordinator's own structs, both ways.
 *
 * Everything that comes from a peer or from disk passes here, and is checked
 * here: lengths of ids, limits of layouts, counts, states. Messages that these
 * functions return are allocated through rk_alloc; free them with record_free.
 *
 * Threads: pure.
 */
#ifndef RK_COORDINATOR_RECORD_H
#define RK_COORDINATOR_RECORD_H

#include "common/base/id.h"
#include "common/base/kv_layout.h"
#include "common/base/status.h"
#include "coordinator/index.h"
#include "coordinator/record.pb-c.h"
#include "redknot/v1/common.pb-c.h"

#define RECORD_KEY_BYTES    (2 + RK_ID_BYTES)
#define RECORD_NODE_ID_MAX  255u
#define RECORD_LABEL_MAX    4096u
#define RECORD_ADDRESS_MAX  1024u
#define RECORD_CAPACITY_MAX (UINT64_C(1) << 50) /* bytes of one store; sums stay in 64 bits */
#define RECORD_FORMAT_MAGIC "redknot-coordinator"
#define RECORD_FORMAT       1u
/* Far over what any counter reaches, and far under where it would wrap. */
#define RECORD_GENERATION_MAX (UINT64_C(1) << 62)

/* Kinds: 's' segment, 't' tokens, 'd' tombstone. */
void record_key(char kind, const struct rk_id *id, uint8_t ret_key[RECORD_KEY_BYTES]);

/* NULL: damaged, or memory is out. */
ProtobufCMessage *record_unpack(const ProtobufCMessageDescriptor *type, const void *data,
                                size_t bytes);
ProtobufCMessage *record_copy(const ProtobufCMessage *message,
                              const ProtobufCMessageDescriptor *type);
/* Free with rk_free. NULL when memory is out. */
void *record_pack(const ProtobufCMessage *message, size_t *ret_bytes);
void record_free(ProtobufCMessage *message); /* accepts NULL */

/* ---- Checked conversions; false or RK_ERR_INVALID for what must not be believed ---- */

bool record_id(const ProtobufCBinaryData *bytes, struct rk_id *ret_id);
bool record_layout(const Redknot__V1__KvLayout *message, struct rk_kv_layout *ret_layout);
bool record_heads(const Redknot__V1__HeadRange *message, const struct rk_kv_layout *layout,
                  struct rk_head_range *ret_heads);
RK_MUST_CHECK enum rk_status record_check_node(const Redknot__V1__NodeInfo *info,
                                               struct rk_error *error);
/* Its texts are names, its addresses can be called. Asked of who registers; what an older version
 * wrote to the database is kept. */
RK_MUST_CHECK enum rk_status record_check_node_text(const Redknot__V1__NodeInfo *info,
                                                    struct rk_error *error);
/* All but the label, which is only checked. */
RK_MUST_CHECK enum rk_status record_check_announced(
    const Redknot__V1__AnnounceRequest__Entry *entry, struct index_announced *ret_announced,
    struct rk_error *error);

void record_put_layout(const struct rk_kv_layout *layout, Redknot__V1__KvLayout *ret_message);
void record_put_heads(const struct rk_head_range *heads, Redknot__V1__HeadRange *ret_message);
/* Borrowed: the message points to id. */
ProtobufCBinaryData record_put_id(const struct rk_id *id);

/* ---- Segments in the database ---- */

/* As spec says; free with rk_free. */
RK_MUST_CHECK enum rk_status record_encode_spec(const struct segment_spec *spec, void **ret_data,
                                                size_t *ret_bytes);
RK_MUST_CHECK enum rk_status record_encode_segment(const struct index_segment *segment,
                                                   void **ret_data, size_t *ret_bytes);

/* spec borrows from message; free both with record_segment_free. */
struct record_segment {
    Redknot__Coordinator__V1__SegmentRecord *message;
    struct segment_location_spec *locations;
    struct segment_spec spec;
};
/* RK_ERR_CORRUPT when anything in it is out of bounds. */
RK_MUST_CHECK enum rk_status record_decode_segment(const void *data, size_t bytes,
                                                   struct record_segment *ret_segment);
void record_segment_free(struct record_segment *segment);

#endif
