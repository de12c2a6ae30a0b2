#include "common/metrics/text_internal.h"

#include "common/base/alloc.h"
#include "common/base/text.h"

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void put_bytes(struct text *text, const char *bytes, size_t count)
{
    if (text->failed) {
        return;
    }
    if (text->size - text->used <= count) {
        size_t size = text->size * 2 + count + 4096;
        char *data = rk_alloc_resize(text->data, size, 1);
        if (!data) {
            text->failed = true;
            return;
        }
        text->data = data;
        text->size = size;
    }
    memcpy(text->data + text->used, bytes, count);
    text->used += count;
    text->data[text->used] = '\0';
}

void text_put(struct text *text, const char *more)
{
    put_bytes(text, more, strlen(more));
}

void text_put_help(struct text *text, const char *help)
{
    for (const char *p = help; *p; p++) {
        if (*p == '\\') {
            put_bytes(text, "\\\\", 2);
        } else if (*p == '\n') {
            put_bytes(text, "\\n", 2);
        } else {
            put_bytes(text, p, 1);
        }
    }
}

void text_put_number(struct text *text, double value)
{
    char digits[40];
    if (isnan(value)) {
        text_put(text, "NaN");
        return;
    }
    if (isinf(value)) {
        text_put(text, value > 0 ? "+Inf" : "-Inf");
        return;
    }
    (void)snprintf(digits, sizeof(digits), "%.15g", value);
    if (strtod(digits, NULL) != value) {
        (void)snprintf(digits, sizeof(digits), "%.17g", value);
    }
    text_put(text, digits);
}

char *text_take(struct text *text)
{
    char *data = text->data;
    if (text->failed) {
        rk_free(data);
        data = NULL;
    }
    *text = (struct text){0};
    return data;
}

bool text_is_name(const char *name, size_t length, bool colon)
{
    for (size_t i = 0; i < length; i++) {
        char c = name[i];
        bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_';
        bool digit = c >= '0' && c <= '9';
        if (!letter && !(digit && i > 0) && !(c == ':' && colon)) {
            return false;
        }
    }
    return length > 0;
}

/* The end of a quoted, escaped value that begins at p; NULL when it is malformed. */
static const char *skip_value(const char *p)
{
    if (*p++ != '"') {
        return NULL;
    }
    while (*p != '"') {
        size_t bytes = rk_utf8_character(p, 4);
        if (*p == '\0' || *p == '\n' || bytes == 0) {
            return NULL;
        }
        if (*p == '\\') {
            p++;
            if (*p != '\\' && *p != '"' && *p != 'n') {
                return NULL;
            }
        }
        p += bytes;
    }
    return p + 1;
}

bool text_is_labels(const char *labels)
{
    const char *p = labels;
    for (;;) {
        size_t length = strcspn(p, "=");
        if (!text_is_name(p, length, false) || p[length] != '=') {
            return false;
        }
        p = skip_value(p + length + 1);
        if (!p || *p == '\0') {
            return p != NULL;
        }
        if (*p++ != ',') {
            return false;
        }
    }
}
