/*
 * The numeric path: a name can tell which code runs, but not all that its bits depend on (oneDNN
 * blocks a product by its shape and the number of threads). So the engine is also asked: a short
 * prefill over fixed tokens, which crosses a page, and two decoded tokens; all logits and all KV
 * that they leave are hashed.
 */
#include "worker/engine/engine_internal.h"

#include "common/base/alloc.h"
#include "common/base/hash.h"

#include <unistd.h>

#define PROBE_TOKENS 80u
#define PROBE_DECODE 2u

static void hash_field(struct rk_sha256 *sha, const void *data, uint64_t bytes)
{
    rk_sha256_update(sha, &bytes, sizeof(bytes));
    rk_sha256_update(sha, data, bytes);
}

static void hash_text(struct rk_sha256 *sha, const char *text)
{
    hash_field(sha, text, strlen(text));
}

/* What a small engine can hold. */
static uint32_t probe_tokens(const struct engine *engine)
{
    uint64_t room = engine->pool.num_pages / engine_num_heads(engine) * RK_PAGE_TOKENS;
    uint64_t count = PROBE_TOKENS;
    count = count < engine->context_tokens ? count : engine->context_tokens;
    return (uint32_t)(count < room ? count : room);
}

static enum rk_status check_logits(const struct engine *engine, const float *logits,
                                   struct rk_error *error)
{
    if (!engine_logits_finite(logits, engine->config.vocab_size)) {
        return rk_error_set(error, RK_ERR_CORRUPT,
                            "%s: a trial prompt gives no finite numbers: the weights are damaged, "
                            "or too large for this precision; try another file, or --mode f32",
                            engine->config.name);
    }
    return RK_OK;
}

static enum rk_status run_probe(struct engine *engine, struct engine_sequence *sequence,
                                uint32_t count, float *logits, struct rk_sha256 *sha,
                                struct rk_error *error)
{
    struct engine_row rows[PROBE_TOKENS];
    uint32_t decoded = count > 2 * PROBE_DECODE ? PROBE_DECODE : 0;
    uint32_t done = 0;

    for (uint32_t i = 0; i < count; i++) {
        rows[i] = (struct engine_row){
            .token_id = (int32_t)((i * 7919u + 1) % engine->config.vocab_size),
            .position = i,
            .want_logits = i + decoded + 1 >= count,
        };
    }
    while (done < count) {
        struct engine_item item = {.sequence = sequence, .rows = rows + done};
        item.num_rows = done == 0 ? count - decoded : 1;
        enum rk_status status = engine_forward(engine, &item, 1, done > 0, logits, error);
        if (status == RK_OK) {
            status = check_logits(engine, logits, error);
        }
        if (status != RK_OK) {
            return status;
        }
        hash_field(sha, logits, engine->config.vocab_size * sizeof(float));
        done += item.num_rows;
    }
    return RK_OK;
}

static enum rk_status hash_pages(const struct engine *engine,
                                 const struct engine_sequence *sequence, uint32_t run,
                                 uint32_t count, struct rk_sha256 *sha)
{
    uint64_t total = rk_kv_pages_total(&engine->layout, count);
    const void **pages = rk_alloc_zero(total, sizeof(*pages));
    if (!pages) {
        return RK_ERR_NO_MEMORY;
    }
    engine_sequence_run_pages(sequence, run, pages);
    for (uint64_t i = 0; i < total; i++) {
        hash_field(sha, pages[i], rk_kv_page_bytes(&engine->layout));
    }
    rk_free(pages);
    return RK_OK;
}

enum rk_status engine_numeric_path(struct engine *engine, struct rk_id *ret_id,
                                   struct rk_error *error)
{
    struct rk_sha256 *sha = rk_sha256_begin();
    struct engine_sequence *sequence = NULL;
    char libc[64] = "";
    struct rk_id id;
    uint32_t run = 0;
    uint32_t count = probe_tokens(engine);
    enum rk_status status = RK_ERR_NO_MEMORY;
    float *logits = rk_alloc_aligned(64, engine->config.vocab_size * sizeof(*logits));

    hash_text(sha, "redknot.numeric-path.v1");
    hash_text(sha, kernels_numeric_path(engine->kernels));
    hash_text(sha, __VERSION__); /* of the compiler: it chooses the order of sums */
    (void)confstr(_CS_GNU_LIBC_VERSION, libc, sizeof(libc));
    hash_text(sha, libc);
    if (logits) {
        status = engine_sequence_create(engine, &sequence);
    }
    if (status == RK_OK) {
        status = engine_sequence_add_own(sequence, count, &run);
    }
    if (status == RK_OK) {
        status = run_probe(engine, sequence, count, logits, sha, error);
    }
    if (status == RK_OK) {
        status = hash_pages(engine, sequence, run, count, sha);
    }
    rk_sha256_end(sha, id.bytes);
    engine_sequence_destroy(sequence);
    rk_free(logits);
    if (status == RK_OK) {
        *ret_id = id;
    } else if (status == RK_ERR_NO_MEMORY) {
        rk_error_set(error, status, "no memory to try the engine");
    }
    return status;
}
