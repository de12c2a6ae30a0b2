#include "client/values_internal.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/value.h"

#include <string.h>

/* ---- Life ---- */

static enum rk_status path_parse(const char *text, enum rk_path *ret_path, struct rk_error *error)
{
    static const enum rk_path paths[] = {RK_PATH_SHM, RK_PATH_UCX, RK_PATH_GRPC};
    *ret_path = RK_PATH_NONE;
    if (!text || strcmp(text, "auto") == 0) {
        return RK_OK;
    }
    for (size_t i = 0; i < sizeof(paths) / sizeof(paths[0]); i++) {
        if (strcmp(text, rk_path_name(paths[i])) == 0) {
            *ret_path = paths[i];
            return RK_OK;
        }
    }
    return rk_error_set(error, RK_ERR_INVALID,
                        "\"%s\" is no path; there are auto, shm, ucx and grpc", text);
}

enum rk_status rk_values_create(const struct rk_values_options *options,
                                struct rk_values **ret_values, struct rk_error *error)
{
    enum rk_path path = RK_PATH_NONE;
    uint32_t threads = options->threads > 0 ? options->threads : VALUES_THREADS;
    uint32_t operations_max =
        options->operations_max > 0 ? options->operations_max : VALUES_OPERATIONS_MAX;
    enum rk_status status = path_parse(options->path, &path, error);
    if (status != RK_OK) {
        return status;
    }
    if (threads > VALUES_THREADS_MAX) {
        return rk_error_set(error, RK_ERR_INVALID, "at most %d threads, not %u", VALUES_THREADS_MAX,
                            threads);
    }
    struct rk_values *values = rk_alloc_zero(1, sizeof(*values));
    if (!values) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "making a values client: out of memory");
    }
    values->maker = getpid();
    values->timeout_ms = options->timeout_ms > 0 ? options->timeout_ms : VALUES_TIMEOUT_MS;
    status = stores_create(options->coordinator, &values->stores, error);
    if (status == RK_OK) {
        const struct rk_kv_pool_options pool = {.path = path};
        status = rk_kv_pool_create(&pool, &values->pool);
    }
    if (status == RK_OK) {
        status = operations_create(values, threads, operations_max, &values->operations, error);
    }
    if (status != RK_OK) {
        rk_values_destroy(values);
        return status;
    }
    *ret_values = values;
    return RK_OK;
}

void rk_values_destroy(struct rk_values *values)
{
    if (!values || rk_is_copy(values->maker)) {
        return;
    }
    operations_destroy(values->operations);
    rk_kv_pool_destroy(values->pool);
    stores_destroy(&values->stores);
    rk_free(values);
}

/* ---- A call over the stores ---- */

/* What all calls share: whose each item is, and which are still to be done. */
struct call {
    struct rk_values *values;
    struct store_set *set;
    size_t count;
    struct rk_id *ids;
    uint32_t (*ranks)[VALUES_RANKS];
    uint8_t *num_ranks;
    bool *open;    /* items that the next store is to be asked for */
    size_t *items; /* of the batch under way */
    struct rk_until until;
    struct rk_error *error;
};

/* Carries out a batch at one store, and closes the items that need no other one. */
typedef void (*call_batch)(struct call *call, const struct store *store, const size_t *items,
                           size_t count, void *context);

static void call_end(struct call *call)
{
    store_set_give(call->set);
    rk_free(call->ids);
    rk_free(call->ranks);
    rk_free(call->num_ranks);
    rk_free(call->open);
    rk_free(call->items);
}

static enum rk_status call_begin(struct call *call, struct rk_values *values, size_t count,
                                 int timeout_ms, struct rk_error *error)
{
    *call = (struct call){.values = values, .count = count, .error = error};
    if (rk_is_copy(values->maker)) {
        return rk_copy_refuse(error);
    }
    if (count == 0 || count > VALUES_ITEMS_MAX) {
        return rk_error_set(error, RK_ERR_INVALID, "a call has 1 to %d items, not %zu",
                            VALUES_ITEMS_MAX, count);
    }
    if (error) {
        error->text[0] = '\0';
    }
    call->until.deadline_ns = rk_deadline_in_ms(timeout_ms > 0 ? timeout_ms : values->timeout_ms);
    call->ids = rk_alloc_zero(count, sizeof(*call->ids));
    call->ranks = rk_alloc_zero(count, sizeof(*call->ranks));
    call->num_ranks = rk_alloc_zero(count, sizeof(*call->num_ranks));
    call->open = rk_alloc_zero(count, sizeof(*call->open));
    call->items = rk_alloc_zero(RK_TRANSPORT_ITEMS_MAX, sizeof(*call->items));
    if (!call->ids || !call->ranks || !call->num_ranks || !call->open || !call->items) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for %zu items", count);
    }
    return stores_get(&values->stores, call->until.deadline_ns, &call->set, error);
}

static bool key_good(const struct rk_value_key *key)
{
    return key->data && key->bytes > 0 && key->bytes <= RK_VALUE_KEY_BYTES_MAX;
}

static enum rk_status key_wrong(struct rk_error *error, size_t item, const struct rk_value_key *key)
{
    return rk_error_set(error, RK_ERR_INVALID, "item %zu: a key has 1 to %u bytes, not %zu", item,
                        RK_VALUE_KEY_BYTES_MAX, key->bytes);
}

/* The item takes part. */
static void call_open(struct call *call, size_t item, const struct rk_value_key *key)
{
    call->ids[item] = rk_id_value(key->data, key->bytes);
    call->num_ranks[item] = (uint8_t)store_set_rank(call->set, &call->ids[item], call->ranks[item]);
    call->open[item] = true;
}

/* Asks each item's own store, then the next one for what is still open. */
static void call_run(struct call *call, call_batch batch, void *context)
{
    for (size_t rank = 0; rank < VALUES_RANKS; rank++) {
        for (uint32_t store = 0; store < call->set->count; store++) {
            size_t count = 0;
            for (size_t i = 0; i < call->count; i++) {
                if (!call->open[i] || rank >= call->num_ranks[i] || call->ranks[i][rank] != store) {
                    continue;
                }
                call->items[count++] = i;
                if (count == RK_TRANSPORT_ITEMS_MAX) {
                    batch(call, &call->set->stores[store], call->items, count, context);
                    count = 0;
                }
            }
            if (count > 0) {
                batch(call, &call->set->stores[store], call->items, count, context);
            }
        }
    }
}

/* The text of the first item that failed is the call's. */
static void error_keep(struct call *call, const struct store *store, const struct rk_error *why)
{
    if (call->error && call->error->text[0] == '\0' && why->text[0] != '\0') {
        (void)rk_error_set(call->error, why->status, "store %s at %s: %.400s",
                           store->endpoint.node_id, store->endpoint.address, why->text);
    }
}

/* ---- Questions beside the bytes ---- */

typedef enum rk_status (*flags_ask)(struct rk_rpc_channel *channel, ProtobufCBinaryData *ids,
                                    size_t count, const struct rk_until *until, bool *ret_flags,
                                    struct rk_error *error);

static enum rk_status exists_ask(struct rk_rpc_channel *channel, ProtobufCBinaryData *ids,
                                 size_t count, const struct rk_until *until, bool *ret_flags,
                                 struct rk_error *error)
{
    Redknot__V1__HasValuesRequest request = REDKNOT__V1__HAS_VALUES_REQUEST__INIT;
    struct ProtobufCMessage *message = NULL;
    request.n_ids = count;
    request.ids = ids;
    enum rk_status status =
        rk_rpc_unary_until(channel, "/redknot.v1.KvStore/HasValues", &request.base,
                           &redknot__v1__has_values_reply__descriptor, until, &message, error);
    if (status != RK_OK) {
        return status;
    }
    const Redknot__V1__HasValuesReply *reply = (const Redknot__V1__HasValuesReply *)message;
    for (size_t i = 0; i < count; i++) {
        ret_flags[i] = i < reply->n_found && reply->found[i];
    }
    rk_rpc_message_free(message);
    return RK_OK;
}

static enum rk_status drop_ask(struct rk_rpc_channel *channel, ProtobufCBinaryData *ids,
                               size_t count, const struct rk_until *until, bool *ret_flags,
                               struct rk_error *error)
{
    Redknot__V1__DropValuesRequest request = REDKNOT__V1__DROP_VALUES_REQUEST__INIT;
    struct ProtobufCMessage *message = NULL;
    request.n_ids = count;
    request.ids = ids;
    enum rk_status status =
        rk_rpc_unary_until(channel, "/redknot.v1.KvStore/DropValues", &request.base,
                           &redknot__v1__drop_values_reply__descriptor, until, &message, error);
    if (status != RK_OK) {
        return status;
    }
    const Redknot__V1__DropValuesReply *reply = (const Redknot__V1__DropValuesReply *)message;
    for (size_t i = 0; i < count; i++) {
        ret_flags[i] = i < reply->n_dropped && reply->dropped[i];
    }
    rk_rpc_message_free(message);
    return RK_OK;
}

/* One question to one store, over gRPC whatever the path of the bytes. */
static enum rk_status flags_at(struct call *call, const struct store *store, flags_ask ask,
                               const size_t *items, size_t count, bool *ret_flags)
{
    ProtobufCBinaryData ids[RK_TRANSPORT_ITEMS_MAX];
    struct rk_rpc_channel *channel = NULL;
    struct rk_error why = {.text = ""};
    for (size_t i = 0; i < count; i++) {
        ids[i] = (ProtobufCBinaryData){RK_ID_BYTES, call->ids[items[i]].bytes};
    }
    struct rk_kv_ask asked;
    enum rk_status status =
        stores_channel(&call->values->stores, store->endpoint.address, &channel, &why);
    if (status == RK_OK) {
        status = rk_kv_pool_ask_begin(call->values->pool, &store->endpoint, &asked, &why);
    }
    if (status == RK_OK) {
        status = ask(channel, ids, count, &call->until, ret_flags, &why);
        status = rk_kv_pool_ask_end(call->values->pool, &asked, status, &call->until, &why);
    }
    if (status != RK_OK) {
        why.status = status;
        error_keep(call, store, &why);
    }
    return status;
}

struct flags_call {
    bool *flags;
    struct rk_value_put *puts; /* told which store did not answer; NULL: nobody is */
};

static void exists_at(struct call *call, const struct store *store, const size_t *items,
                      size_t count, void *context)
{
    struct flags_call *all = context;
    bool flags[RK_TRANSPORT_ITEMS_MAX] = {false};
    enum rk_status status = flags_at(call, store, exists_ask, items, count, flags);
    for (size_t i = 0; i < count; i++) {
        bool found = status == RK_OK && flags[i];
        all->flags[items[i]] = all->flags[items[i]] || found;
        call->open[items[i]] = !found;
        if (all->puts && (found || status != RK_OK)) {
            all->puts[items[i]].status = status;
        }
    }
}

/* ---- Put ---- */

/* The arrays of one batch that is put. */
struct put_batch {
    struct rk_put puts[RK_TRANSPORT_ITEMS_MAX];
    uint8_t *heads;
    const void **pages;
};

static void put_batch_free(struct put_batch *batch)
{
    if (batch) {
        rk_free(batch->heads);
        rk_free(batch->pages);
        rk_free(batch);
    }
}

static size_t head_pack(const struct rk_value_put *put, uint8_t *out)
{
    Redknot__V1__PutItem item = REDKNOT__V1__PUT_ITEM__INIT;
    Redknot__V1__PutValue value = REDKNOT__V1__PUT_VALUE__INIT;
    value.key = (ProtobufCBinaryData){put->key.bytes, (uint8_t *)(uintptr_t)put->key.data};
    value.bytes = put->bytes;
    item.what_case = REDKNOT__V1__PUT_ITEM__WHAT_VALUE;
    item.value = &value;
    return out ? redknot__v1__put_item__pack(&item, out)
               : redknot__v1__put_item__get_packed_size(&item);
}

static struct put_batch *put_batch_make(const struct rk_value_put *all, const size_t *items,
                                        size_t count)
{
    struct put_batch *batch = rk_alloc_zero(1, sizeof(*batch));
    size_t heads_bytes = 0;
    uint64_t num_pages = 0;
    if (!batch) {
        return NULL;
    }
    for (size_t i = 0; i < count; i++) {
        heads_bytes += head_pack(&all[items[i]], NULL);
        num_pages += rk_value_pages(all[items[i]].bytes);
    }
    batch->heads = rk_alloc(heads_bytes);
    batch->pages = rk_alloc_zero(num_pages, sizeof(*batch->pages));
    if (!batch->heads || !batch->pages) {
        put_batch_free(batch);
        return NULL;
    }
    uint8_t *head = batch->heads;
    const void **pages = batch->pages;
    for (size_t i = 0; i < count; i++) {
        const struct rk_value_put *put = &all[items[i]];
        struct rk_put *wire = &batch->puts[i];
        *wire = (struct rk_put){.head = head,
                                .head_bytes = head_pack(put, head),
                                .pages = pages,
                                .num_pages = rk_value_pages(put->bytes),
                                .page_bytes = rk_value_page_bytes(put->bytes),
                                .bytes = put->bytes};
        for (uint64_t page = 0; page < wire->num_pages; page++) {
            pages[page] = (const uint8_t *)put->data + page * RK_VALUE_PAGE_BYTES;
        }
        head += wire->head_bytes;
        pages += wire->num_pages;
    }
    return batch;
}

/* A key has one value, so nothing is put where another store may hold it already. Of items that a
 * store holds which get asks too, that is the answer. What lies where no get looks, since stores
 * have come, goes: it would be found again when they leave. */
static void look_at(struct call *call, uint32_t store, size_t count, struct rk_value_put *puts)
{
    const struct store *where = &call->set->stores[store];
    size_t hidden[RK_TRANSPORT_ITEMS_MAX];
    bool flags[RK_TRANSPORT_ITEMS_MAX] = {false};
    size_t num_hidden = 0;
    enum rk_status status = flags_at(call, where, exists_ask, call->items, count, flags);
    for (size_t i = 0; i < count; i++) {
        size_t item = call->items[i];
        bool visible = false;
        for (size_t rank = 0; rank < call->num_ranks[item]; rank++) {
            visible = visible || call->ranks[item][rank] == store;
        }
        if (status == RK_OK && flags[i] && !visible) {
            hidden[num_hidden++] = item;
        } else if (status != RK_OK || flags[i]) {
            puts[item].status = status;
            puts[item].existed = status == RK_OK;
            call->open[item] = false;
        }
    }
    if (num_hidden > 0) {
        status = flags_at(call, where, drop_ask, hidden, num_hidden, flags);
    }
    for (size_t i = 0; i < num_hidden && status != RK_OK; i++) {
        puts[hidden[i]].status = status;
        call->open[hidden[i]] = false;
    }
}

/* At all stores but each key's own, which sees for itself. */
static void look_around(struct call *call, struct rk_value_put *puts)
{
    for (uint32_t store = 0; store < call->set->count && call->set->count > 1; store++) {
        size_t count = 0;
        for (size_t i = 0; i < call->count; i++) {
            if (call->open[i] && call->ranks[i][0] != store) {
                call->items[count++] = i;
            }
            if (count == RK_TRANSPORT_ITEMS_MAX || (i + 1 == call->count && count > 0)) {
                look_at(call, store, count, puts);
                count = 0;
            }
        }
    }
}

/* What is large may have pushed out what the same call put before it. */
static void look_back(struct call *call, struct rk_value_put *puts, bool *kept)
{
    struct flags_call found = {.flags = kept, .puts = puts};
    uint64_t bytes = 0;
    for (size_t i = 0; i < call->count; i++) {
        call->open[i] = puts[i].status == RK_OK && !puts[i].existed;
        bytes += call->open[i] ? puts[i].bytes : 0;
    }
    if (bytes < VALUES_LOOK_BACK_BYTES) {
        return;
    }
    memset(kept, 0, call->count * sizeof(*kept));
    call_run(call, exists_at, &found);
    for (size_t i = 0; i < call->count; i++) {
        if (puts[i].status == RK_OK && !puts[i].existed && !kept[i]) {
            puts[i].status = RK_ERR_FULL;
            if (call->error && call->error->text[0] == '\0') {
                (void)rk_error_set(call->error, RK_ERR_FULL,
                                   "item %zu was evicted by those behind it: the stores hold less "
                                   "than what is put in one call",
                                   i);
            }
        }
    }
}

static void put_at(struct call *call, const struct store *store, const size_t *items, size_t count,
                   void *context)
{
    struct rk_value_put *puts = context;
    struct rk_error why = {.text = ""};
    struct put_batch *batch = put_batch_make(puts, items, count);
    enum rk_status status = batch ? RK_OK : RK_ERR_NO_MEMORY;
    if (status == RK_OK) {
        status = rk_kv_pool_put(call->values->pool, &store->endpoint, batch->puts, count,
                                &call->until, &why);
    }
    for (size_t i = 0; i < count; i++) {
        struct rk_value_put *put = &puts[items[i]];
        put->status = status == RK_OK ? batch->puts[i].status : status;
        if (put->status == RK_ERR_EXISTS) {
            put->existed = true;
            put->status = RK_OK;
        }
        /* A store that is full takes nothing, so the next one may. One that does not answer may
         * hold an older value: nobody takes its place before the coordinator does not list it. */
        call->open[items[i]] = put->status == RK_ERR_FULL;
        if (put->status != RK_OK) {
            why.status = put->status;
            error_keep(call, store, &why);
        }
    }
    put_batch_free(batch);
}

enum rk_status rk_values_put(struct rk_values *values, struct rk_value_put *puts, size_t num_puts,
                             int timeout_ms, struct rk_error *error)
{
    struct call call;
    enum rk_status status = call_begin(&call, values, num_puts, timeout_ms, error);
    for (size_t i = 0; status == RK_OK && i < num_puts; i++) {
        struct rk_value_put *put = &puts[i];
        put->existed = false;
        put->status = RK_ERR_UNAVAILABLE;
        if (!key_good(&put->key)) {
            put->status = key_wrong(error, i, &put->key);
        } else if (!put->data || put->bytes == 0 || put->bytes > RK_VALUE_BYTES_MAX) {
            put->status = rk_error_set(
                error, RK_ERR_INVALID, "item %zu: a value has 1 to %llu bytes, not %llu", i,
                (unsigned long long)RK_VALUE_BYTES_MAX, (unsigned long long)put->bytes);
        } else {
            call_open(&call, i, &put->key);
        }
    }
    bool *kept = status == RK_OK ? rk_alloc_zero(num_puts, sizeof(*kept)) : NULL;
    if (status == RK_OK && !kept) {
        status = rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for %zu items", num_puts);
    }
    if (status == RK_OK) {
        look_around(&call, puts);
        call_run(&call, put_at, puts);
        look_back(&call, puts, kept);
    }
    rk_free(kept);
    call_end(&call);
    return status;
}

/* ---- Get ---- */

/* The next store may have what this one has not. */
static bool perhaps_elsewhere(enum rk_status status)
{
    return status == RK_MISS_ABSENT || status == RK_MISS_EVICTED || status == RK_MISS_NODE_DOWN;
}

/* At the second store "never stored" is not why: the first one's reason stands. */
static enum rk_status reason(enum rk_status first, enum rk_status next)
{
    return next == RK_MISS_ABSENT && rk_status_is_miss(first) ? first : next;
}

static void get_at(struct call *call, const struct store *store, const size_t *items, size_t count,
                   void *context)
{
    struct rk_value_get *all = context;
    struct rk_get gets[RK_TRANSPORT_ITEMS_MAX];
    struct rk_pages pages[RK_TRANSPORT_ITEMS_MAX];
    struct rk_kv_connection *connection = NULL;
    struct rk_error why = {.text = ""};
    enum rk_path path = RK_PATH_NONE;
    RK_ASSERT(count > 0 && count <= RK_TRANSPORT_ITEMS_MAX);
    for (size_t i = 0; i < count; i++) {
        const struct rk_value_get *get = &all[items[i]];
        gets[i] = (struct rk_get){.id = call->ids[items[i]],
                                  .buffer = get->buffer,
                                  .bytes_max = get->buffer_bytes,
                                  .verify = true};
    }
    enum rk_status status = rk_kv_pool_get(call->values->pool, &store->endpoint, gets, count,
                                           &call->until, pages, &path, &connection, &why);
    for (size_t i = 0; i < count; i++) {
        struct rk_value_get *get = &all[items[i]];
        enum rk_status item = rk_kv_as_miss(status == RK_OK ? pages[i].status : status);
        get->status = reason(get->status, item);
        get->bytes = item == RK_OK ? pages[i].bytes : 0;
        call->open[items[i]] = perhaps_elsewhere(item);
        if (item != RK_OK) {
            why.status = item;
            error_keep(call, store, &why);
        }
    }
    if (status == RK_OK) {
        rk_kv_pool_release(call->values->pool, connection, pages, count);
    }
}

enum rk_status rk_values_get(struct rk_values *values, struct rk_value_get *gets, size_t num_gets,
                             int timeout_ms, struct rk_error *error)
{
    struct call call;
    enum rk_status status = call_begin(&call, values, num_gets, timeout_ms, error);
    for (size_t i = 0; status == RK_OK && i < num_gets; i++) {
        gets[i].bytes = 0;
        gets[i].status = RK_ERR_INTERNAL;
        if (!key_good(&gets[i].key)) {
            gets[i].status = key_wrong(error, i, &gets[i].key);
        } else if (!gets[i].buffer || gets[i].buffer_bytes == 0) {
            gets[i].status = rk_error_set(error, RK_ERR_INVALID, "item %zu has no buffer", i);
        } else {
            call_open(&call, i, &gets[i].key);
        }
    }
    if (status == RK_OK) {
        call_run(&call, get_at, gets);
    }
    call_end(&call);
    return status;
}

/* ---- Views ---- */

/* What one batch brought, until its views are released. */
struct held_batch {
    struct rk_kv_connection *connection;
    size_t count;
    struct held_batch *next;
    struct rk_pages pages[];
};

struct view_call {
    struct rk_value_view *views;
    struct rk_value_part *firsts; /* behind the views: most values are one part */
    struct held_batch *held;
    enum rk_path path;
};

static void held_release(struct rk_values *values, struct held_batch *held)
{
    bool copy = rk_is_copy(values->maker);
    while (held && !copy) {
        struct held_batch *next = held->next;
        rk_kv_pool_release(values->pool, held->connection, held->pages, held->count);
        rk_free(held);
        held = next;
    }
}

static void views_free(struct rk_value_view *views, size_t num_views)
{
    for (size_t i = 0; views && i < num_views; i++) {
        if (views[i].num_parts > 1) {
            rk_free((void *)(uintptr_t)views[i].parts);
        }
    }
    rk_free(views);
}

static size_t parts_count(const struct rk_pages *pages)
{
    size_t count = 0;
    for (uint64_t i = 0; i < pages->num_pages; i++) {
        const uint8_t *page = pages->pages[i].data;
        count += i == 0 || page != (const uint8_t *)pages->pages[i - 1].data + pages->page_bytes;
    }
    return count;
}

/* Pages that lie side by side are one part. */
static enum rk_status view_fill(const struct rk_pages *pages, struct rk_value_part *first,
                                struct rk_value_view *view)
{
    size_t count = parts_count(pages);
    struct rk_value_part *parts = count == 1 ? first : rk_alloc_zero(count, sizeof(*parts));
    if (!parts) {
        return RK_ERR_NO_MEMORY;
    }
    struct rk_value_part *part = parts;
    for (uint64_t i = 0; i < pages->num_pages; i++) {
        const uint8_t *page = pages->pages[i].data;
        uint64_t left = pages->bytes - i * pages->page_bytes;
        size_t length = left < pages->page_bytes ? (size_t)left : pages->page_bytes;
        if (i > 0 && (const uint8_t *)part->data + part->bytes == page) {
            part->bytes += length;
            continue;
        }
        part += i > 0;
        *part = (struct rk_value_part){page, length};
    }
    view->parts = parts;
    view->num_parts = count;
    view->bytes = pages->bytes;
    return RK_OK;
}

static void view_at(struct call *call, const struct store *store, const size_t *items, size_t count,
                    void *context)
{
    struct view_call *all = context;
    struct rk_get gets[RK_TRANSPORT_ITEMS_MAX];
    struct rk_error why = {.text = ""};
    enum rk_path path = RK_PATH_NONE;
    struct held_batch *held = rk_alloc_zero(1, sizeof(*held) + count * sizeof(held->pages[0]));
    enum rk_status status = held ? RK_OK : RK_ERR_NO_MEMORY;
    for (size_t i = 0; i < count; i++) {
        gets[i] = (struct rk_get){
            .id = call->ids[items[i]], .bytes_max = RK_VALUE_BYTES_MAX, .verify = true};
    }
    if (status == RK_OK) {
        status = rk_kv_pool_get(call->values->pool, &store->endpoint, gets, count, &call->until,
                                held->pages, &path, &held->connection, &why);
    }
    for (size_t i = 0; i < count; i++) {
        struct rk_value_view *view = &all->views[items[i]];
        enum rk_status item = rk_kv_as_miss(status == RK_OK ? held->pages[i].status : status);
        if (item == RK_OK) {
            item = view_fill(&held->pages[i], &all->firsts[items[i]], view);
        }
        view->status = reason(view->status, item);
        call->open[items[i]] = perhaps_elsewhere(item);
        if (item != RK_OK) {
            why.status = item;
            error_keep(call, store, &why);
        }
    }
    if (status != RK_OK) {
        rk_free(held);
        return;
    }
    held->count = count;
    held->next = all->held;
    all->held = held;
    all->path = path > all->path ? path : all->path;
}

enum rk_status rk_values_view(struct rk_values *values, const struct rk_value_key *keys,
                              size_t num_keys, int timeout_ms, struct rk_value_views *ret_views,
                              struct rk_error *error)
{
    struct call call;
    struct view_call all = {.path = RK_PATH_NONE};
    enum rk_status status = call_begin(&call, values, num_keys, timeout_ms, error);
    if (status == RK_OK) {
        all.views = rk_alloc_zero(num_keys, sizeof(*all.views) + sizeof(*all.firsts));
        all.firsts = (struct rk_value_part *)(void *)(all.views + num_keys);
        status = all.views ? RK_OK : rk_error_set(error, RK_ERR_NO_MEMORY, "no memory for views");
    }
    for (size_t i = 0; status == RK_OK && i < num_keys; i++) {
        all.views[i].status = RK_ERR_INTERNAL;
        if (key_good(&keys[i])) {
            call_open(&call, i, &keys[i]);
        } else {
            all.views[i].status = key_wrong(error, i, &keys[i]);
        }
    }
    if (status == RK_OK) {
        call_run(&call, view_at, &all);
        *ret_views = (struct rk_value_views){.views = all.views,
                                             .num_views = num_keys,
                                             .path = rk_path_name(all.path),
                                             .hold = all.held};
    }
    call_end(&call);
    return status;
}

void rk_values_release(struct rk_values *values, struct rk_value_views *views)
{
    held_release(values, views->hold);
    views_free(views->views, views->num_views);
    *views = (struct rk_value_views){.views = NULL};
}

enum rk_status rk_values_view_check(const struct rk_values *values,
                                    const struct rk_value_views *views)
{
    enum rk_status status = rk_is_copy(values->maker) ? RK_MISS_NODE_DOWN : RK_OK;
    for (const struct held_batch *held = views->hold; held && status == RK_OK; held = held->next) {
        for (size_t i = 0; i < held->count && status == RK_OK; i++) {
            if (held->pages[i].status == RK_OK && held->pages[i].pages) {
                status = rk_kv_pool_check(values->pool, held->connection, &held->pages[i]);
            }
        }
    }
    return status;
}

/* ---- Exists, drop ---- */

/* Keys that are none take no part; *ret_wrong: RK_ERR_INVALID if there are any. */
static void keys_open(struct call *call, const struct rk_value_key *keys, enum rk_status *ret_wrong)
{
    *ret_wrong = RK_OK;
    for (size_t i = 0; i < call->count; i++) {
        if (key_good(&keys[i])) {
            call_open(call, i, &keys[i]);
        } else {
            *ret_wrong = key_wrong(*ret_wrong == RK_OK ? call->error : NULL, i, &keys[i]);
        }
    }
}

enum rk_status rk_values_exists(struct rk_values *values, const struct rk_value_key *keys,
                                size_t num_keys, int timeout_ms, bool *ret_exists,
                                struct rk_error *error)
{
    struct call call;
    struct flags_call all = {.flags = ret_exists};
    enum rk_status status = call_begin(&call, values, num_keys, timeout_ms, error);
    if (status == RK_OK) {
        memset(ret_exists, 0, num_keys * sizeof(*ret_exists));
        keys_open(&call, keys, &status);
        call_run(&call, exists_at, &all);
    }
    call_end(&call);
    return status;
}

static size_t drop_batch(struct call *call, uint32_t store, size_t count, bool *dropped)
{
    bool flags[RK_TRANSPORT_ITEMS_MAX] = {false};
    if (flags_at(call, &call->set->stores[store], drop_ask, call->items, count, flags) != RK_OK) {
        return 1;
    }
    for (size_t i = 0; i < count; i++) {
        size_t item = call->items[i];
        dropped[item] = dropped[item] || flags[i];
    }
    return 0;
}

/* At every store, whosever the keys are: one may hold what it took in for another. Returns how many
 * questions were not answered. */
static size_t drop_everywhere(struct call *call, bool *dropped)
{
    size_t silent = 0;
    for (uint32_t store = 0; store < call->set->count; store++) {
        size_t count = 0;
        for (size_t i = 0; i < call->count; i++) {
            if (call->open[i]) {
                call->items[count++] = i;
            }
            if (count == RK_TRANSPORT_ITEMS_MAX || (i + 1 == call->count && count > 0)) {
                silent += drop_batch(call, store, count, dropped);
                count = 0;
            }
        }
    }
    return silent;
}

enum rk_status rk_values_drop(struct rk_values *values, const struct rk_value_key *keys,
                              size_t num_keys, int timeout_ms, bool *ret_dropped,
                              struct rk_error *error)
{
    struct call call;
    enum rk_status status = call_begin(&call, values, num_keys, timeout_ms, error);
    if (status == RK_OK) {
        memset(ret_dropped, 0, num_keys * sizeof(*ret_dropped));
        keys_open(&call, keys, &status);
        if (drop_everywhere(&call, ret_dropped) > 0) {
            status = RK_ERR_UNAVAILABLE;
        }
    }
    call_end(&call);
    return status;
}
