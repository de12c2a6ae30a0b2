#include "common/base/text.h"

#include "common/base/alloc.h"

#include <stdio.h>
#include <string.h>

/* ---- UTF-8 ---- */

size_t rk_utf8_character(const void *text, size_t bytes)
{
    const unsigned char *b = text;
    if (bytes == 0) {
        return 0;
    }
    size_t wanted = b[0] < 0x80                    ? 1
                    : b[0] >= 0xc2 && b[0] <= 0xdf ? 2
                    : b[0] >= 0xe0 && b[0] <= 0xef ? 3
                    : b[0] >= 0xf0 && b[0] <= 0xf4 ? 4
                                                   : 0;
    if (wanted > bytes) {
        return 0;
    }
    for (size_t i = 1; i < wanted; i++) {
        if ((b[i] & 0xc0) != 0x80) { /* also ends at the NUL */
            return 0;
        }
    }
    bool overlong = (b[0] == 0xe0 && b[1] < 0xa0) || (b[0] == 0xf0 && b[1] < 0x90);
    bool outside = (b[0] == 0xed && b[1] > 0x9f) || (b[0] == 0xf4 && b[1] > 0x8f);
    return overlong || outside ? 0 : wanted;
}

bool rk_utf8_valid(const void *text, size_t bytes)
{
    const unsigned char *b = text;
    for (size_t i = 0; i < bytes;) {
        size_t character = rk_utf8_character(b + i, bytes - i);
        if (character == 0) {
            return false;
        }
        i += character;
    }
    return true;
}

static size_t sequence_bytes(uint8_t lead)
{
    if ((lead & 0xE0) == 0xC0) {
        return 2;
    }
    if ((lead & 0xF0) == 0xE0) {
        return 3;
    }
    return (lead & 0xF8) == 0xF0 ? 4 : 1;
}

size_t rk_utf8_whole(const uint8_t *bytes, size_t count)
{
    for (size_t back = 1; back < RK_UTF8_CARRY_BYTES && back <= count; back++) {
        uint8_t byte = bytes[count - back];
        if ((byte & 0xC0) != 0x80) { /* A lead byte or ASCII: is its sequence complete? */
            return sequence_bytes(byte) > back ? count - back : count;
        }
    }
    return count;
}

/* ---- What may enter ---- */

/* A character that a terminal obeys, or that changes how the text around it looks. */
static bool is_control(const unsigned char *b, size_t bytes)
{
    if (bytes == 1) {
        return b[0] < 0x20 || b[0] == 0x7f;
    }
    if (bytes == 2) {
        return b[0] == 0xc2 && b[1] < 0xa0; /* U+0080 to U+009F */
    }
    if (bytes != 3 || b[0] != 0xe2) {
        return false;
    }
    /* U+2028 to U+202E: separators of lines, and directions; U+2066 to U+2069: directions. */
    return (b[1] == 0x80 && b[2] >= 0xa8 && b[2] <= 0xae) ||
           (b[1] == 0x81 && b[2] >= 0xa6 && b[2] <= 0xa9);
}

size_t rk_text_name_character(const void *text, size_t bytes)
{
    size_t character = rk_utf8_character(text, bytes);
    return character > 0 && !is_control(text, character) ? character : 0;
}

enum rk_status rk_text_check_name(const char *what, const void *text, size_t bytes,
                                  size_t bytes_max, struct rk_error *error)
{
    const unsigned char *b = text;
    if (bytes > bytes_max) {
        return rk_error_set(error, RK_ERR_TOO_LONG, "%s: %zu bytes, at most %zu are allowed", what,
                            bytes, bytes_max);
    }
    for (size_t i = 0; i < bytes;) {
        size_t character = rk_text_name_character(b + i, bytes - i);
        if (character == 0) {
            bool control = rk_utf8_character(b + i, bytes - i) > 0;
            return rk_error_set(error, RK_ERR_INVALID,
                                "%s: byte %zu (0x%02x) is %s; use printable UTF-8", what, i, b[i],
                                control ? "a control character" : "not UTF-8");
        }
        i += character;
    }
    return RK_OK;
}

enum rk_status rk_text_check(const char *what, const void *text, size_t bytes,
                             struct rk_error *error)
{
    const unsigned char *b = text;
    for (size_t i = 0; i < bytes;) {
        size_t character = rk_utf8_character(b + i, bytes - i);
        if (character == 0 || b[i] == '\0') {
            return rk_error_set(error, RK_ERR_INVALID,
                                "%s: byte %zu (0x%02x) is %s; only UTF-8 text is taken", what, i,
                                b[i], character == 0 ? "not UTF-8" : "a NUL");
        }
        i += character;
    }
    return RK_OK;
}

/* ---- How it is shown ---- */

/* Writes one character or escape to ret_unit (5 bytes with the NUL), takes *ret_taken bytes. */
static size_t escape_unit(const unsigned char *b, size_t bytes, char *ret_unit, size_t *ret_taken)
{
    size_t character = rk_text_name_character(b, bytes);
    *ret_taken = character > 0 ? character : 1;
    if (character > 0 && b[0] != '\\') {
        memcpy(ret_unit, b, character);
        return character;
    }
    const char *letters = "\n\t\r\\";
    const char *found = b[0] != '\0' ? strchr(letters, b[0]) : NULL;
    if (found) {
        ret_unit[0] = '\\';
        ret_unit[1] = "ntr\\"[found - letters];
        return 2;
    }
    (void)snprintf(ret_unit, 5, "\\x%02x", b[0]);
    return 4;
}

size_t rk_text_escape(const void *text, size_t bytes, char *ret_text, size_t room)
{
    const unsigned char *b = text;
    size_t used = 0;
    size_t written = 0;
    bool fits = true;
    for (size_t i = 0; i < bytes;) {
        char unit[5];
        size_t taken = 0;
        size_t length = escape_unit(b + i, bytes - i, unit, &taken);
        fits = fits && used + length < room;
        if (fits) {
            memcpy(ret_text + used, unit, length);
            written = used + length;
        }
        used += length;
        i += taken;
    }
    if (room > 0) {
        ret_text[written] = '\0';
    }
    return used;
}

char *rk_text_escaped(const void *text, size_t bytes)
{
    size_t length = rk_text_escape(text, bytes, NULL, 0);
    char *copy = rk_alloc(length + 1);
    if (copy) {
        (void)rk_text_escape(text, bytes, copy, length + 1);
    }
    return copy;
}

char *rk_text_json(const void *text, size_t bytes)
{
    static const char replacement[] = "\xef\xbf\xbd"; /* U+FFFD */
    const unsigned char *b = text;
    char *copy = rk_alloc_zero(bytes + 1, sizeof(replacement) - 1);
    char *to = copy;
    for (size_t i = 0; copy && i < bytes;) {
        size_t character = b[i] != '\0' ? rk_utf8_character(b + i, bytes - i) : 0;
        if (character > 0) {
            to = mempcpy(to, b + i, character);
            i += character;
        } else {
            to = mempcpy(to, replacement, sizeof(replacement) - 1);
            i++;
        }
    }
    return copy;
}

void rk_text_clean(char *text)
{
    while (*text != '\0') {
        size_t bytes = rk_text_name_character(text, 4);
        if (bytes == 0) {
            *text = '?';
            bytes = 1;
        }
        text += bytes;
    }
}
