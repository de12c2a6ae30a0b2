#include "common/transport/transport.h"

#include "common/base/alloc.h"

struct item {
    void *put; /* NULL: failed, its bytes are passed over */
    uint64_t bytes;
    uint64_t done;
    uint32_t page_bytes;
    enum rk_status status;
    char *text; /* NULL: none, or no memory for it */
};

struct rk_intake {
    const struct rk_transport_store_ops *ops;
    void *context;
    size_t items_max;
    size_t num_items;
    size_t item; /* whose bytes are next */
    bool failed; /* as a whole */
    struct item items[];
};

enum rk_status rk_intake_create(const struct rk_transport_store_ops *ops, void *context,
                                size_t items_max, struct rk_intake **ret_intake)
{
    struct rk_intake *intake = rk_alloc_zero(1, sizeof(*intake) + items_max * sizeof(struct item));
    if (!intake) {
        return RK_ERR_NO_MEMORY;
    }
    intake->ops = ops;
    intake->context = context;
    intake->items_max = items_max;
    *ret_intake = intake;
    return RK_OK;
}

static void item_fail(struct rk_intake *intake, struct item *item, enum rk_status status,
                      const char *text)
{
    item->status = status;
    item->text = rk_alloc_string(text);
    if (item->put) {
        intake->ops->put_destroy(intake->context, item->put);
        item->put = NULL;
    }
}

void rk_intake_add(struct rk_intake *intake, enum rk_status status, const char *text, void *put,
                   uint64_t bytes, uint32_t page_bytes)
{
    RK_ASSERT(intake->num_items < intake->items_max);
    struct item *item = &intake->items[intake->num_items++];
    *item = (struct item){.put = put, .bytes = bytes, .page_bytes = page_bytes};
    if (status != RK_OK) {
        item_fail(intake, item, status, text);
    }
    if (bytes == 0) {
        intake->failed = true;
    }
}

/* Pages of the item that are whole when so many of its bytes have come. */
static uint64_t pages_within(const struct item *item, uint64_t bytes)
{
    uint64_t whole = bytes / item->page_bytes;
    return bytes == item->bytes ? whole + (bytes % item->page_bytes != 0) : whole;
}

enum rk_status rk_intake_write(struct rk_intake *intake, const void *data, size_t bytes,
                               const uint64_t *checksums, size_t num_checksums)
{
    const uint8_t *at = data;
    while (bytes > 0) {
        if (intake->failed || intake->item == intake->num_items) {
            return RK_ERR_INVALID;
        }
        struct item *item = &intake->items[intake->item];
        uint64_t left = item->bytes - item->done;
        size_t count = bytes < left ? bytes : (size_t)left;
        uint64_t pages = pages_within(item, item->done + count) - pages_within(item, item->done);
        if (pages > num_checksums) {
            return RK_ERR_INVALID;
        }
        if (item->put) {
            struct rk_error error = {.text = ""};
            enum rk_status status = intake->ops->put_write(intake->context, item->put, at, count,
                                                           checksums, pages, &error);
            if (status != RK_OK) {
                item_fail(intake, item, status, error.text);
            }
        }
        item->done += count;
        at += count;
        bytes -= count;
        checksums += pages;
        num_checksums -= pages;
        intake->item += item->done == item->bytes;
    }
    return num_checksums == 0 ? RK_OK : RK_ERR_INVALID;
}

bool rk_intake_whole(const struct rk_intake *intake)
{
    return intake->failed || intake->item == intake->num_items;
}

void rk_intake_end(struct rk_intake *intake)
{
    for (size_t i = 0; i < intake->num_items; i++) {
        struct item *item = &intake->items[i];
        struct rk_error error = {.text = ""};
        if (intake->failed && item->put) {
            item_fail(intake, item, RK_ERR_INVALID, "another item of the same put makes no sense");
        }
        if (!item->put) {
            continue;
        }
        enum rk_status status = intake->ops->put_end(intake->context, item->put, &error);
        if (status != RK_OK) {
            item_fail(intake, item, status, error.text);
        }
    }
}

size_t rk_intake_items(const struct rk_intake *intake)
{
    return intake->num_items;
}

enum rk_status rk_intake_result(const struct rk_intake *intake, size_t item, const char **ret_text)
{
    const char *text = intake->items[item].text;
    *ret_text = text ? text : "";
    return intake->items[item].status;
}

void rk_intake_destroy(struct rk_intake *intake)
{
    if (!intake) {
        return;
    }
    for (size_t i = 0; i < intake->num_items; i++) {
        if (intake->items[i].put) {
            intake->ops->put_destroy(intake->context, intake->items[i].put);
        }
        rk_free(intake->items[i].text);
    }
    rk_free(intake);
}
