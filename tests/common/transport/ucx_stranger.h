/* A peer of a UCX server that is made by hand, and may say anything. */
#ifndef TESTS_COMMON_TRANSPORT_UCX_STRANGER_H
#define TESTS_COMMON_TRANSPORT_UCX_STRANGER_H

#include "common/transport/ucx_internal.h"

#include "common/base/clock.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#define STRANGER_WAIT_MS 20000

struct stranger {
    struct ucx_worker ucx;
    ucp_ep_h endpoint;
    bool cut;
    uint32_t replies;   /* FOUND and RESULTS */
    uint8_t reply[512]; /* the last one's body, its beginning */
    size_t reply_bytes;
};

static inline void stranger_on_cut(void *context, ucp_ep_h endpoint, ucs_status_t status)
{
    (void)endpoint;
    (void)status;
    ((struct stranger *)context)->cut = true;
}

static inline ucs_status_t stranger_on_reply(void *context, const void *header, size_t header_bytes,
                                             void *data, size_t bytes,
                                             const ucp_am_recv_param_t *param)
{
    struct stranger *stranger = context;
    (void)header;
    (void)header_bytes;
    (void)param;
    stranger->reply_bytes = bytes < sizeof(stranger->reply) ? bytes : sizeof(stranger->reply);
    memcpy(stranger->reply, data, stranger->reply_bytes);
    stranger->replies++;
    return UCS_OK;
}

/* In place, for its handlers point to it. */
static inline void stranger_start(struct stranger *stranger, const char *server)
{
    struct ucx_address address;
    *stranger = (struct stranger){.endpoint = NULL};
    assert_int_equal(ucx_address_resolve(server, &address, NULL), RK_OK);
    assert_int_equal(ucx_worker_create(&address, &stranger->ucx, NULL), RK_OK);
    assert_int_equal(
        ucx_worker_handle(&stranger->ucx, UCX_FOUND, stranger_on_reply, stranger, NULL), RK_OK);
    assert_int_equal(
        ucx_worker_handle(&stranger->ucx, UCX_RESULTS, stranger_on_reply, stranger, NULL), RK_OK);
    const ucp_ep_params_t params = {
        .field_mask = UCP_EP_PARAM_FIELD_FLAGS | UCP_EP_PARAM_FIELD_SOCK_ADDR |
                      UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE | UCP_EP_PARAM_FIELD_ERR_HANDLER,
        .flags = UCP_EP_PARAMS_FLAGS_CLIENT_SERVER,
        .err_mode = UCP_ERR_HANDLING_MODE_PEER,
        .err_handler = {.cb = stranger_on_cut, .arg = stranger},
        .sockaddr = {.addr = (const struct sockaddr *)&address.storage, .addrlen = address.bytes}};
    assert_int_equal(
        stranger->ucx.api->ucp_ep_create(stranger->ucx.worker, &params, &stranger->endpoint),
        UCS_OK);
}

static inline void stranger_send(struct stranger *stranger, unsigned id, const void *header,
                                 size_t header_bytes, const void *data, size_t bytes)
{
    const ucp_request_param_t params = {.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS,
                                        .flags = UCP_AM_SEND_FLAG_REPLY | UCP_AM_SEND_FLAG_EAGER};
    ucs_status_ptr_t request = stranger->ucx.api->ucp_am_send_nbx(
        stranger->endpoint, id, header, header_bytes, data, bytes, &params);
    int64_t deadline_ns = rk_deadline_in_ms(STRANGER_WAIT_MS);
    if (UCS_PTR_IS_PTR(request)) {
        while (stranger->ucx.api->ucp_request_check_status(request) == UCS_INPROGRESS) {
            assert_true(rk_deadline_left_ms(deadline_ns) > 0);
            ucx_worker_wait(&stranger->ucx, -1, deadline_ns);
        }
        stranger->ucx.api->ucp_request_free(request);
    }
}

static inline void stranger_end(struct stranger *stranger)
{
    ucx_endpoint_kill(&stranger->ucx, stranger->endpoint, rk_deadline_in_ms(STRANGER_WAIT_MS));
    ucx_worker_destroy(&stranger->ucx);
}

/* Until it is cut off, or has so many replies; false: neither in timeout_ms. */
static inline bool stranger_wait(struct stranger *stranger, uint32_t replies, int timeout_ms)
{
    int64_t deadline_ns = rk_deadline_in_ms(timeout_ms);
    while (!stranger->cut && stranger->replies < replies && rk_deadline_left_ms(deadline_ns) > 0) {
        ucx_worker_wait(&stranger->ucx, -1, deadline_ns);
    }
    return stranger->cut || stranger->replies >= replies;
}

static inline void stranger_is_cut(struct stranger *stranger)
{
    (void)stranger_wait(stranger, UINT32_MAX, STRANGER_WAIT_MS);
    assert_true(stranger->cut);
    stranger_end(stranger);
}

#endif
