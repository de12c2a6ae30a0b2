/*
 * origin_message: struct rk_origin as redknot.v1.Origin, both ways. Threads: pure.
 */
#ifndef RK_COMMON_RPC_ORIGIN_MESSAGE_H
#define RK_COMMON_RPC_ORIGIN_MESSAGE_H

#include "common/base/origin.h"
#include "redknot/v1/common.pb-c.h"

/* The message borrows from origin. Leave it out where the origin is not known. */
void rk_origin_message_fill(const struct rk_origin *origin, Redknot__V1__Origin *ret_message);
/* NULL and an empty message: not known. False: a field has another length than it must have. */
bool rk_origin_message_read(const Redknot__V1__Origin *message, struct rk_origin *ret_origin);

#endif
