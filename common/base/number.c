#include "common/base/number.h"

#include <ctype.h>
#include <stdbool.h>

enum rk_status rk_number_parse(const char *what, const char *text, uint64_t min, uint64_t max,
                               uint64_t *ret_number, struct rk_error *error)
{
    uint64_t number = 0;
    bool sound = text[0] != '\0';
    for (const char *p = text; *p != '\0' && sound; p++) {
        sound = isdigit((unsigned char)*p) &&
                !__builtin_mul_overflow(number, UINT64_C(10), &number) &&
                !__builtin_add_overflow(number, (uint64_t)(*p - '0'), &number);
    }
    if (!sound || number < min || number > max) {
        return rk_error_set(error, RK_ERR_INVALID,
                            "%s: \"%s\" is no whole number from %llu to %llu", what, text,
                            (unsigned long long)min, (unsigned long long)max);
    }
    *ret_number = number;
    return RK_OK;
}
