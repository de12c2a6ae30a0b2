/*
 * A text that grows, and the escapes of the Prometheus text format 0.0.4.
 *
 * A text that ran out of memory stays failed and ignores what follows, so that
 * the writer checks once, at the end. A text belongs to one thread.
 */
#ifndef RK_COMMON_METRICS_TEXT_INTERNAL_H
#define RK_COMMON_METRICS_TEXT_INTERNAL_H

#include <stdbool.h>
#include <stddef.h>

struct text {
    char *data; /* NUL-terminated once something was put */
    size_t used;
    size_t size;
    bool failed;
};

void text_put(struct text *text, const char *more);
/* A backslash and a newline are escaped. */
void text_put_help(struct text *text, const char *help);
/* The shortest of 15 and 17 digits that reads back as the same value; +Inf, -Inf, NaN. */
void text_put_number(struct text *text, double value);
/* The text, to be freed with rk_free; NULL when it failed. Either way text is empty again. */
char *text_take(struct text *text);

/* [a-zA-Z_][a-zA-Z0-9_]*, and ':' too in a metric's name. */
bool text_is_name(const char *name, size_t length, bool colon);
/* name="value",name="value" with all values escaped. */
bool text_is_labels(const char *labels);

#endif
