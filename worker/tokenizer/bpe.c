#include "worker/tokenizer/tokenizer_internal.h"

#include "common/base/alloc.h"

#include <string.h>

void bpe_clear(struct bpe *bpe)
{
    rk_free(bpe->symbols);
    rk_free(bpe->heap);
    *bpe = (struct bpe){0};
}

/* Grows *block to hold count elements; doubles, so that appending costs O(1). */
static bool reserve(void **block, size_t *max, size_t count, size_t bytes_each)
{
    if (count <= *max) {
        return true;
    }
    size_t wanted = *max * 2 > count ? *max * 2 : count + 64;
    void *grown = rk_alloc_resize(*block, wanted, bytes_each);
    if (!grown) {
        return false;
    }
    *block = grown;
    *max = wanted;
    return true;
}

enum rk_status id_list_append(struct id_list *list, int32_t id)
{
    if (list->count >= TOKENIZER_IDS_MAX) {
        return RK_ERR_TOO_LONG;
    }
    void *data = list->data;
    if (!reserve(&data, &list->max, list->count + 1, sizeof(*list->data))) {
        return RK_ERR_NO_MEMORY;
    }
    list->data = data;
    list->data[list->count++] = id;
    return RK_OK;
}

/* The order of merging: lowest rank first, then from the left. */
static bool before(const struct bpe_pair *a, const struct bpe_pair *b)
{
    return a->rank != b->rank ? a->rank < b->rank : a->position < b->position;
}

static bool heap_push(struct bpe *bpe, struct bpe_pair pair)
{
    void *heap = bpe->heap;
    if (!reserve(&heap, &bpe->heap_max, bpe->heap_count + 1, sizeof(*bpe->heap))) {
        return false;
    }
    bpe->heap = heap;
    size_t at = bpe->heap_count++;
    while (at > 0 && before(&pair, &bpe->heap[(at - 1) / 2])) {
        bpe->heap[at] = bpe->heap[(at - 1) / 2];
        at = (at - 1) / 2;
    }
    bpe->heap[at] = pair;
    return true;
}

static struct bpe_pair heap_pop(struct bpe *bpe)
{
    struct bpe_pair top = bpe->heap[0];
    struct bpe_pair last = bpe->heap[--bpe->heap_count];
    size_t at = 0;
    for (;;) {
        size_t child = 2 * at + 1;
        if (child >= bpe->heap_count) {
            break;
        }
        if (child + 1 < bpe->heap_count && before(&bpe->heap[child + 1], &bpe->heap[child])) {
            child++;
        }
        if (!before(&bpe->heap[child], &last)) {
            break;
        }
        bpe->heap[at] = bpe->heap[child];
        at = child;
    }
    bpe->heap[at] = last;
    return top;
}

/* Queues the pair of a symbol and its right neighbour, if they merge. */
static bool queue_pair(const struct tokenizer *tokenizer, struct bpe *bpe, int32_t position)
{
    const struct bpe_symbol *symbol = &bpe->symbols[position];
    if (symbol->next < 0) {
        return true;
    }
    int32_t right = bpe->symbols[symbol->next].id;
    const struct merge *merge = tokenizer_find_merge(tokenizer, symbol->id, right);
    return !merge || heap_push(bpe, (struct bpe_pair){merge->rank, position, symbol->id, right});
}

static bool merge_pair(const struct tokenizer *tokenizer, struct bpe *bpe, struct bpe_pair pair)
{
    struct bpe_symbol *symbol = &bpe->symbols[pair.position];
    if (symbol->id != pair.left || symbol->next < 0 ||
        bpe->symbols[symbol->next].id != pair.right) {
        return true; /* One of the two was merged meanwhile. */
    }
    struct bpe_symbol *gone = &bpe->symbols[symbol->next];
    symbol->id = tokenizer_find_merge(tokenizer, pair.left, pair.right)->result;
    symbol->next = gone->next;
    gone->id = -1;
    if (symbol->next >= 0) {
        bpe->symbols[symbol->next].previous = pair.position;
    }
    return queue_pair(tokenizer, bpe, pair.position) &&
           (symbol->previous < 0 || queue_pair(tokenizer, bpe, symbol->previous));
}

enum rk_status bpe_encode(const struct tokenizer *tokenizer, struct bpe *bpe, const char *text,
                          size_t bytes, struct id_list *list)
{
    void *symbols = bpe->symbols;
    int32_t count = 0;
    if (!reserve(&symbols, &bpe->symbols_max, bytes, sizeof(*bpe->symbols))) {
        return RK_ERR_NO_MEMORY;
    }
    bpe->symbols = symbols;
    for (size_t i = 0; i < bytes; i++) {
        int32_t id = tokenizer->byte_ids[(uint8_t)text[i]];
        if (id >= 0) {
            bpe->symbols[count] = (struct bpe_symbol){id, count - 1, count + 1};
            count++;
        }
    }
    if (count == 0) {
        return RK_OK;
    }
    bpe->symbols[count - 1].next = -1;
    bpe->heap_count = 0;
    for (int32_t i = 0; i + 1 < count; i++) {
        if (!queue_pair(tokenizer, bpe, i)) {
            return RK_ERR_NO_MEMORY;
        }
    }
    while (bpe->heap_count > 0) {
        if (!merge_pair(tokenizer, bpe, heap_pop(bpe))) {
            return RK_ERR_NO_MEMORY;
        }
    }
    for (int32_t i = 0; i >= 0; i = bpe->symbols[i].next) {
        enum rk_status status = id_list_append(list, bpe->symbols[i].id);
        if (status != RK_OK) {
            return status;
        }
    }
    return RK_OK;
}
