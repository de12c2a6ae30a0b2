#include "common/transport/ucx_internal.h"

#include "common/base/address.h"
#include "common/base/alloc.h"
#include "common/base/clock.h"

#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* A list, such as "rc,tcp", for networks with RDMA. */
#define TRANSPORTS_ENV "REDKNOT_UCX_TLS"

/* ---- The library ---- */

static struct ucx_api api;
static bool api_loaded;
static char api_missing[128];
static pthread_once_t api_once = PTHREAD_ONCE_INIT;

/* What only the environment can tell it: its constructors install handlers for signals, hook the
 * program's memory and speak on standard output unless they are told not to, and
 * ucp_config_modify() does not reach its listeners' settings. */
static const char *const load_settings[] = {
    "UCX_ERROR_SIGNALS=", "UCX_MEM_EVENTS=n", "UCX_LOG_LEVEL=fatal", "UCX_WARN_UNUSED_ENV_VARS=n",
    "UCX_TCP_CM_REUSEADDR=y" /* A store that restarts finds its port in the state TIME_WAIT. */
};
#define NUM_LOAD_SETTINGS (sizeof(load_settings) / sizeof(load_settings[0]))

static bool environment_has(char **all, const char *setting)
{
    size_t bytes = (size_t)(strchr(setting, '=') - setting) + 1;
    for (; *all; all++) {
        if (strncmp(*all, setting, bytes) == 0) {
            return true;
        }
    }
    return false;
}

/*
 * The environment with these settings behind it, a user's own untouched. setenv() would change the
 * one that other threads read meanwhile: getenv() takes no lock, and we are a library in somebody
 * else's program. This one is another list, whole before anybody sees it, and neither it nor the
 * one before is ever freed or changed by us, for somebody may be reading it. NULL: no memory.
 */
static char **environment_make(char **all)
{
    size_t count = 0;
    while (all[count]) {
        count++;
    }
    char **list = rk_alloc_zero(count + NUM_LOAD_SETTINGS + 1, sizeof(*list));
    if (!list) {
        return NULL;
    }
    memcpy(list, all, count * sizeof(*list));
    for (size_t i = 0; i < NUM_LOAD_SETTINGS; i++) {
        if (!environment_has(all, load_settings[i])) {
            list[count++] = (char *)(uintptr_t)load_settings[i];
        }
    }
    return list;
}

static void api_load(void)
{
    static char **list; /* Reachable, so that no tool takes it for lost. */
    list = environ ? environment_make(environ) : NULL;
    if (list) { /* For good: its listeners look at it each time. */
        __atomic_store_n(&environ, list, __ATOMIC_RELEASE);
    }
    void *library = dlopen("libucp.so.0", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        (void)snprintf(api_missing, sizeof(api_missing), "%s", dlerror());
        return;
    }
#define UCX_LOAD(name)                                                                             \
    do {                                                                                           \
        void *symbol = dlsym(library, #name);                                                      \
        if (!symbol) {                                                                             \
            (void)snprintf(api_missing, sizeof(api_missing), "libucp.so.0 has no %s", #name);      \
            return;                                                                                \
        }                                                                                          \
        memcpy(&api.name, &symbol, sizeof(symbol));                                                \
    } while (0);
    UCX_FUNCTIONS(UCX_LOAD)
#undef UCX_LOAD
    api_loaded = true;
}

enum rk_status ucx_api_get(const struct ucx_api **ret_api, struct rk_error *error)
{
    (void)pthread_once(&api_once, api_load);
    if (!api_loaded) {
        return rk_error_set(error, RK_ERR_UNSUPPORTED,
                            "the path \"ucx\" needs UCX (Debian: libucx0): %s", api_missing);
    }
    *ret_api = &api;
    return RK_OK;
}

static enum rk_status ucx_failed(ucs_status_t result, const char *what, struct rk_error *error)
{
    enum rk_status status = result == UCS_ERR_NO_MEMORY ? RK_ERR_NO_MEMORY : RK_ERR_UNAVAILABLE;
    return rk_error_set(error, status, "UCX: %s: %s", what, api.ucs_status_string(result));
}

/* ---- Addresses and devices ---- */

/* In digits, or a name that has no other address. */
static bool host_is_ipv6(const char *host)
{
    struct addrinfo hints = {.ai_family = AF_INET6, .ai_socktype = SOCK_STREAM};
    struct addrinfo *found = NULL;
    bool is = getaddrinfo(host, NULL, &hints, &found) == 0;
    if (is) {
        freeaddrinfo(found);
    }
    return is;
}

enum rk_status ucx_address_resolve(const char *text, struct ucx_address *ret_address,
                                   struct rk_error *error)
{
    struct rk_address address;
    /*
     * IPv4 alone: for an IPv6 peer UCX 1.13 writes past a block of its heap at each connection, in
     * the store and in its reader, which ends as an abort some time later.
     */
    struct addrinfo hints = {.ai_family = AF_INET, .ai_socktype = SOCK_STREAM};
    struct addrinfo *found = NULL;
    char port[16];
    enum rk_status status = rk_address_parse(text, RK_ADDRESS_LISTEN, &address, error);
    if (status != RK_OK) {
        return status;
    }
    (void)snprintf(port, sizeof(port), "%d", address.port);
    int result = getaddrinfo(address.host, port, &hints, &found);
    if (result != 0 && host_is_ipv6(address.host)) {
        return rk_error_set(error, RK_ERR_UNSUPPORTED,
                            "%s: UCX is served at IPv4 addresses only, for UCX 1.13 corrupts its "
                            "memory with IPv6",
                            text);
    }
    if (result != 0) {
        return rk_error_set(error, RK_ERR_UNAVAILABLE, "%s: %s", text, gai_strerror(result));
    }
    *ret_address = (struct ucx_address){.bytes = found->ai_addrlen};
    memcpy(&ret_address->storage, found->ai_addr, found->ai_addrlen);
    freeaddrinfo(found);
    return RK_OK;
}

static const void *address_bytes(const struct sockaddr *address, size_t *ret_bytes)
{
    if (address->sa_family == AF_INET6) {
        *ret_bytes = sizeof(struct in6_addr);
        return &((const struct sockaddr_in6 *)(const void *)address)->sin6_addr;
    }
    *ret_bytes = sizeof(struct in_addr);
    return &((const struct sockaddr_in *)(const void *)address)->sin_addr;
}

/* The device that has this address; false: none. */
static bool device_of(const struct sockaddr *address, char ret_name[IF_NAMESIZE])
{
    struct ifaddrs *all = NULL;
    size_t bytes = 0;
    const void *wanted = address_bytes(address, &bytes);
    bool found = false;
    if (getifaddrs(&all) != 0) {
        return false;
    }
    for (struct ifaddrs *at = all; at && !found; at = at->ifa_next) {
        if (at->ifa_addr && at->ifa_addr->sa_family == address->sa_family &&
            memcmp(address_bytes(at->ifa_addr, &bytes), wanted, bytes) == 0) {
            (void)snprintf(ret_name, IF_NAMESIZE, "%s", at->ifa_name);
            found = true;
        }
    }
    freeifaddrs(all);
    /* 127.0.0.2 is the loopback device's, though it has another address. */
    if (!found && address->sa_family == AF_INET && *(const uint8_t *)wanted == 127) {
        (void)snprintf(ret_name, IF_NAMESIZE, "lo");
        found = true;
    }
    return found;
}

/* The device that reaches this address; false: no single one (a listener on all addresses). */
static bool device_towards(const struct ucx_address *address, char ret_name[IF_NAMESIZE])
{
    const struct sockaddr *to = (const struct sockaddr *)&address->storage;
    struct sockaddr_storage local = {.ss_family = AF_UNSPEC};
    socklen_t bytes = sizeof(local);
    if (device_of(to, ret_name)) {
        return true;
    }
    int fd = socket(to->sa_family, SOCK_DGRAM | SOCK_CLOEXEC, 0); /* Sends nothing. */
    bool found = fd >= 0 && connect(fd, to, address->bytes) == 0 &&
                 getsockname(fd, (struct sockaddr *)&local, &bytes) == 0 &&
                 device_of((const struct sockaddr *)&local, ret_name);
    if (fd >= 0) {
        (void)close(fd);
    }
    return found;
}

static bool address_is_any(const struct ucx_address *address)
{
    static const uint8_t zeros[sizeof(struct in6_addr)];
    size_t bytes = 0;
    const void *data = address_bytes((const struct sockaddr *)&address->storage, &bytes);
    return memcmp(data, zeros, bytes) == 0;
}

/* ---- Worker ---- */

bool ucx_one_sided(void)
{
    const char *transports = getenv(TRANSPORTS_ENV);
    return transports && transports[0] != '\0' && strcmp(transports, "tcp") != 0;
}

static ucs_status_t context_create(const struct ucx_address *address, ucp_context_h *ret_context)
{
    char device[IF_NAMESIZE];
    ucp_config_t *config = NULL;
    ucp_params_t params = {.field_mask = UCP_PARAM_FIELD_FEATURES,
                           .features = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP};
    ucs_status_t result = api.ucp_config_read(NULL, NULL, &config);
    if (result != UCS_OK) {
        return result;
    }
    const char *transports = getenv(TRANSPORTS_ENV);
    bool tcp_only = !ucx_one_sided();
    result = api.ucp_config_modify(config, "TLS", tcp_only ? "tcp" : transports);
    /* An RDMA adapter is not the device that has the address. */
    if (result == UCS_OK && tcp_only && !address_is_any(address) &&
        device_towards(address, device)) {
        result = api.ucp_config_modify(config, "NET_DEVICES", device);
    }
    if (result == UCS_OK) {
        result = api.ucp_init_version(UCP_API_MAJOR, UCP_API_MINOR, &params, config, ret_context);
    }
    api.ucp_config_release(config);
    return result;
}

enum rk_status ucx_worker_handle(struct ucx_worker *worker, unsigned id,
                                 ucp_am_recv_callback_t handler, void *context,
                                 struct rk_error *error)
{
    ucp_am_handler_param_t params = {
        .field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_CB |
                      UCP_AM_HANDLER_PARAM_FIELD_ARG | UCP_AM_HANDLER_PARAM_FIELD_FLAGS,
        .id = id,
        .flags = UCP_AM_FLAG_WHOLE_MSG,
        .cb = handler,
        .arg = context};
    ucs_status_t result = api.ucp_worker_set_am_recv_handler(worker->worker, &params);
    return result == UCS_OK ? RK_OK : ucx_failed(result, "handler", error);
}

static ucs_status_t on_unknown(void *context, const void *header, size_t header_bytes, void *data,
                               size_t bytes, const ucp_am_recv_param_t *param)
{
    (void)context;
    (void)header;
    (void)header_bytes;
    (void)data;
    (void)bytes;
    (void)param;
    return UCS_OK;
}

/*
 * UCX 1.13 keeps handlers in an array up to the highest id, leaves the gaps
 * uninitialised, and does not look at an id before it uses it when a message
 * comes in fragments: a peer that sends a strange id would make us jump to
 * garbage. So every id has a handler; about 2 MB, and a millisecond.
 */
static enum rk_status handlers_fill(struct ucx_worker *worker, struct rk_error *error)
{
    enum rk_status status = RK_OK;
    for (unsigned id = 0; status == RK_OK && id <= UINT16_MAX; id++) {
        status = ucx_worker_handle(worker, id, on_unknown, NULL, error);
    }
    return status;
}

enum rk_status ucx_worker_create(const struct ucx_address *address, struct ucx_worker *ret_worker,
                                 struct rk_error *error)
{
    struct ucx_worker worker = {.efd = -1};
    ucp_worker_params_t params = {.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE,
                                  .thread_mode = UCS_THREAD_MODE_SERIALIZED};
    const char *what = "context";
    enum rk_status status = ucx_api_get(&worker.api, error);
    if (status != RK_OK) {
        return status;
    }
    ucs_status_t result = context_create(address, &worker.context);
    if (result == UCS_OK) {
        what = "worker";
        result = api.ucp_worker_create(worker.context, &params, &worker.worker);
    }
    if (result == UCS_OK) {
        what = "wake-up";
        result = api.ucp_worker_get_efd(worker.worker, &worker.efd);
    }
    if (result != UCS_OK) {
        ucx_worker_destroy(&worker);
        return ucx_failed(result, what, error);
    }
    status = handlers_fill(&worker, error);
    if (status != RK_OK) {
        ucx_worker_destroy(&worker);
        return status;
    }
    *ret_worker = worker;
    return RK_OK;
}

void ucx_worker_destroy(struct ucx_worker *worker)
{
    if (worker->worker) {
        api.ucp_worker_destroy(worker->worker);
    }
    if (worker->context) {
        api.ucp_cleanup(worker->context);
    }
    *worker = (struct ucx_worker){.efd = -1};
}

void ucx_worker_wait(struct ucx_worker *worker, int wake_fd, int64_t deadline_ns)
{
    if (api.ucp_worker_progress(worker->worker) != 0) {
        spin_begin(&worker->spin);
        return;
    }
    if (spin_again(&worker->spin) || api.ucp_worker_arm(worker->worker) != UCS_OK) {
        return;
    }
    struct pollfd polls[2] = {{.fd = worker->efd, .events = POLLIN},
                              {.fd = wake_fd, .events = POLLIN}};
    (void)poll(polls, wake_fd >= 0 ? 2 : 1, rk_deadline_left_ms(deadline_ns));
}

void ucx_endpoint_kill(struct ucx_worker *worker, ucp_ep_h endpoint, int64_t deadline_ns)
{
    ucp_request_param_t params = {.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS,
                                  .flags = UCP_EP_CLOSE_FLAG_FORCE};
    ucs_status_ptr_t request = api.ucp_ep_close_nbx(endpoint, &params);
    if (!UCS_PTR_IS_PTR(request)) {
        return;
    }
    while (api.ucp_request_check_status(request) == UCS_INPROGRESS &&
           rk_deadline_left_ms(deadline_ns) > 0) {
        ucx_worker_wait(worker, -1, deadline_ns);
    }
    api.ucp_request_free(request);
}
