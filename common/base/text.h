/*
 * text: the one rule for text from outside, and how it is shown.
 *
 * Two sorts enter. A *name* (label, node id, key, model) is shown in tables, logs and metrics:
 * valid UTF-8 without control characters, line separators and marks that turn the direction of
 * writing. A *text* (prompt, document) is read as it is: valid UTF-8 without NUL, for it travels
 * through C strings and what follows a NUL would be lost without a word. Both are refused where
 * they enter. What was not checked, for it is a peer's or an old file's, is escaped where it is
 * shown.
 *
 * Threads: everything here is pure or writes only to the caller's object.
 */
#ifndef RK_COMMON_BASE_TEXT_H
#define RK_COMMON_BASE_TEXT_H

#include "common/base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- UTF-8 (RFC 3629: no overlong forms, no surrogates, at most U+10FFFF) ---- */

/* Bytes of the character at text, 1 to 4; 0 when it is none, or not whole within `bytes`. Looks no
 * further than at the first byte that does not fit: of a NUL-terminated text 4 bytes may be asked.
 */
size_t rk_utf8_character(const void *text, size_t bytes);
bool rk_utf8_valid(const void *text, size_t bytes);

#define RK_UTF8_CARRY_BYTES 4

/* Cuts a stream of bytes between characters. Zeroed is the start. */
struct rk_utf8_carry {
    uint8_t bytes[RK_UTF8_CARRY_BYTES];
    size_t count;
};

/* How many of the bytes end with a whole character; the at most 3 behind them begin one that is
 * still open. Bytes that are no UTF-8 count as whole: they are not ours to drop. */
size_t rk_utf8_whole(const uint8_t *bytes, size_t count);

/* ---- What may enter ---- */

/* RK_ERR_INVALID, or RK_ERR_TOO_LONG over bytes_max; the error begins with `what` and says where
 * and why, without repeating the text. An empty name passes: whether there must be one is the
 * caller's to say. */
RK_MUST_CHECK enum rk_status rk_text_check_name(const char *what, const void *text, size_t bytes,
                                                size_t bytes_max, struct rk_error *error);
/* RK_ERR_INVALID alike. */
RK_MUST_CHECK enum rk_status rk_text_check(const char *what, const void *text, size_t bytes,
                                           struct rk_error *error);

/* Bytes of the character at text if a name may hold it, else 0; as rk_utf8_character. */
size_t rk_text_name_character(const void *text, size_t bytes);

/* ---- How it is shown ---- */

/* For terminals and logs: what no name may have becomes \n, \t, \r or \xNN, a backslash two, so
 * that different texts look different. As snprintf: writes at most room - 1 bytes and a NUL, never
 * half a character or escape; returns the bytes of the whole without the NUL. */
size_t rk_text_escape(const void *text, size_t bytes, char *ret_text, size_t room);
/* The same in memory of its own, for the caller to rk_free. NULL: out of memory. */
char *rk_text_escaped(const void *text, size_t bytes);
/* For JSON: a NUL-terminated copy that is valid UTF-8, for the caller to rk_free. A byte that is no
 * part of a character, and NUL, become U+FFFD; control characters stay, JSON writers escape them.
 * NULL: out of memory. */
char *rk_text_json(const void *text, size_t bytes);
/* In place: a byte that no name may have becomes '?'. */
void rk_text_clean(char *text);

#ifdef __cplusplus
}
#endif

#endif
