#include "common/base/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct {
    const char *name;
    const char *text;
    enum rk_remedy remedy;
} statuses[RK_STATUS_COUNT] = {
#define RK_STATUS_ROW(name, wire, text, remedy) {wire, text, RK_REMEDY_##remedy},
    RK_STATUS_LIST(RK_STATUS_ROW)
#undef RK_STATUS_ROW
};

const char *rk_status_name(enum rk_status status)
{
    return (unsigned)status < RK_STATUS_COUNT ? statuses[status].name : "INTERNAL";
}

const char *rk_status_text(enum rk_status status)
{
    return (unsigned)status < RK_STATUS_COUNT ? statuses[status].text : "unknown status";
}

enum rk_remedy rk_status_remedy(enum rk_status status)
{
    return (unsigned)status < RK_STATUS_COUNT ? statuses[status].remedy : RK_REMEDY_GIVE_UP;
}

bool rk_status_is_miss(enum rk_status status)
{
    return rk_status_remedy(status) == RK_REMEDY_COMPUTE;
}

enum rk_status rk_status_from_name(const char *name)
{
    for (int i = 0; i < RK_STATUS_COUNT; i++) {
        if (strcmp(statuses[i].name, name) == 0) {
            return (enum rk_status)i;
        }
    }
    return RK_ERR_INTERNAL;
}

enum rk_status rk_error_set(struct rk_error *error, enum rk_status status, const char *format, ...)
{
    if (error) {
        va_list args;
        va_start(args, format);
        error->status = status;
        error->answered = false;
        (void)vsnprintf(error->text, sizeof(error->text), format, args);
        va_end(args);
    }
    return status;
}

void rk_error_prefix(struct rk_error *error, const char *format, ...)
{
    if (!error) {
        return;
    }
    char text[sizeof(error->text)];
    va_list args;
    va_start(args, format);
    int used = vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    if (used < 0 || (size_t)used >= sizeof(text)) {
        return;
    }
    size_t room = sizeof(text) - (size_t)used;
    (void)snprintf(text + used, room, ": %.*s", (int)room, error->text);
    memcpy(error->text, text, sizeof(text));
}

void rk_assert_failed(const char *expression, const char *file, int line)
{
    (void)fprintf(stderr, "redknot: assertion failed: %s at %s:%d\n", expression, file, line);
    abort();
}
