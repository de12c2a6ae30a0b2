#include "common/base/health.h"

#include <pthread.h>
#include <stdio.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* Guards the list; see docs/locking.md. */
static struct rk_health_check *checks;

void rk_health_add(struct rk_health_check *check)
{
    pthread_mutex_lock(&lock);
    check->next = checks;
    checks = check;
    pthread_mutex_unlock(&lock);
}

void rk_health_remove(struct rk_health_check *check)
{
    pthread_mutex_lock(&lock);
    struct rk_health_check **at = &checks;
    while (*at && *at != check) {
        at = &(*at)->next;
    }
    if (*at) {
        *at = check->next;
    }
    pthread_mutex_unlock(&lock);
}

bool rk_health_ask(char *ret_text, size_t text_bytes)
{
    bool well = true;
    size_t used = 0;
    ret_text[0] = '\0';
    pthread_mutex_lock(&lock);
    for (struct rk_health_check *check = checks; check; check = check->next) {
        char reason[RK_HEALTH_REASON_BYTES] = "";
        if (check->well(check->context, reason)) {
            continue;
        }
        well = false;
        int wrote = snprintf(ret_text + used, text_bytes - used, "%s: %s\n", check->name, reason);
        used += wrote > 0 && (size_t)wrote < text_bytes - used ? (size_t)wrote : 0;
    }
    pthread_mutex_unlock(&lock);
    return well;
}
