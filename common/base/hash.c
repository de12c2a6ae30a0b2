#include "common/base/hash.h"

#include "common/base/status.h"

#include <openssl/evp.h>
#include <pthread.h>
#include <xxhash.h>

#include <xxh_x86dispatch.h> /* after xxhash.h: its functions for the instructions of this CPU */

/* struct rk_sha256 is libcrypto's EVP_MD_CTX under our name. */
static EVP_MD_CTX *context_of(struct rk_sha256 *sha)
{
    return (EVP_MD_CTX *)sha;
}

/* Found once: EVP_sha256() alone would have libcrypto look for it, under a lock, every time. */
static EVP_MD *sha256;
static pthread_once_t sha256_once = PTHREAD_ONCE_INIT;

static void sha256_find(void)
{
    sha256 = EVP_MD_fetch(NULL, "SHA256", NULL);
    RK_ASSERT(sha256 != NULL);
}

struct rk_sha256 *rk_sha256_begin(void)
{
    (void)pthread_once(&sha256_once, sha256_find);
    EVP_MD_CTX *context = EVP_MD_CTX_new();
    RK_ASSERT(context != NULL);
    RK_ASSERT(EVP_DigestInit_ex2(context, sha256, NULL) == 1);
    return (struct rk_sha256 *)context;
}

void rk_sha256_update(struct rk_sha256 *sha, const void *data, size_t bytes)
{
    RK_ASSERT(EVP_DigestUpdate(context_of(sha), data, bytes) == 1);
}

void rk_sha256_end(struct rk_sha256 *sha, uint8_t ret_digest[RK_SHA256_BYTES])
{
    RK_ASSERT(EVP_DigestFinal_ex(context_of(sha), ret_digest, NULL) == 1);
    EVP_MD_CTX_free(context_of(sha));
}

/* One for each thread, kept: to make one costs as much as to hash a key. */
static pthread_key_t once_context;
static pthread_once_t once_context_made = PTHREAD_ONCE_INIT;

static void context_free(void *context)
{
    EVP_MD_CTX_free(context);
}

static void once_context_make(void)
{
    RK_ASSERT(pthread_key_create(&once_context, context_free) == 0);
}

void rk_sha256_once(const void *data, size_t bytes, uint8_t ret_digest[RK_SHA256_BYTES])
{
    (void)pthread_once(&sha256_once, sha256_find);
    (void)pthread_once(&once_context_made, once_context_make);
    EVP_MD_CTX *context = pthread_getspecific(once_context);
    if (!context) {
        context = EVP_MD_CTX_new();
        RK_ASSERT(context != NULL && pthread_setspecific(once_context, context) == 0);
    }
    RK_ASSERT(EVP_DigestInit_ex2(context, sha256, NULL) == 1);
    RK_ASSERT(EVP_DigestUpdate(context, data, bytes) == 1);
    RK_ASSERT(EVP_DigestFinal_ex(context, ret_digest, NULL) == 1);
}

uint64_t rk_hash_xxh3(const void *data, size_t bytes)
{
    return XXH3_64bits(data, bytes);
}
