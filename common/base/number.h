/*
 * number: whole numbers that a person wrote, the one reading of them.
 *
 * Threads: pure.
 */
#ifndef RK_COMMON_BASE_NUMBER_H
#define RK_COMMON_BASE_NUMBER_H

#include "common/base/status.h"

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Digits only: no sign, space, fraction or unit. RK_ERR_INVALID begins with `what` and says which
 * numbers are right. */
RK_MUST_CHECK enum rk_status rk_number_parse(const char *what, const char *text, uint64_t min,
                                             uint64_t max, uint64_t *ret_number,
                                             struct rk_error *error);

#ifdef __cplusplus
}
#endif

#endif
