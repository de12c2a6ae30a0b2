#include "common/base/log.h"

#include "common/base/clock.h"
#include "common/base/text.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>
#include <time.h>
#include <unistd.h>

static const char *log_component = "redknot";
static enum rk_log_level log_level = RK_LOG_LEVEL_INFO;
static const char *const level_names[] = {"debug", "info", "warn", "error"};

struct line {
    char text[2048];
    size_t used;
};

void rk_log_init(const char *component, enum rk_log_level level)
{
    log_component = component;
    log_level = level;
}

bool rk_log_level_parse(const char *word, enum rk_log_level *ret_level)
{
    for (int i = 0; i <= RK_LOG_LEVEL_ERROR; i++) {
        if (strcasecmp(word, level_names[i]) == 0) {
            *ret_level = (enum rk_log_level)i;
            return true;
        }
    }
    return false;
}

/* One byte is kept for the newline. */
static void put_char(struct line *line, char c)
{
    if (line->used < sizeof(line->text) - 1) {
        line->text[line->used++] = c;
    }
}

static void put_quoted(struct line *line, const char *text)
{
    put_char(line, '"');
    for (const char *p = text ? text : "(null)"; *p;) {
        size_t character = rk_text_name_character(p, 4);
        if (*p == '"' || *p == '\\') {
            put_char(line, '\\');
            put_char(line, *p++);
        } else if (*p == '\n') {
            put_char(line, '\\');
            put_char(line, 'n');
            p++;
        } else if (character == 0) {
            put_char(line, '?');
            p++;
        } else if (line->used + character < sizeof(line->text)) {
            memcpy(line->text + line->used, p, character);
            line->used += character;
            p += character;
        } else {
            break; /* Half a character is none. */
        }
    }
    put_char(line, '"');
}

__attribute__((format(printf, 2, 0))) static void put_format(struct line *line, const char *format,
                                                             va_list args)
{
    size_t room = sizeof(line->text) - 1 - line->used;
    int wanted = vsnprintf(line->text + line->used, room + 1, format, args);
    if (wanted > 0) {
        line->used += (size_t)wanted < room ? (size_t)wanted : room;
    }
}

__attribute__((format(printf, 2, 3))) static void put_text(struct line *line, const char *format,
                                                           ...)
{
    va_list args;
    va_start(args, format);
    put_format(line, format, args);
    va_end(args);
}

/* A value that is one word as it stands: no quotes are needed. */
static bool is_word(const char *text)
{
    while (*text != '\0') {
        size_t character = rk_text_name_character(text, 4);
        if (character == 0 || *text == ' ' || *text == '"') {
            return false;
        }
        text += character;
    }
    return true;
}

/* Also where the caller believed that a text was one of ours: an id that a peer chose must not
 * forge a line or a field. */
static void put_string(struct line *line, const char *conversion, const char *text)
{
    bool plain = strcmp(conversion, "%s") == 0;
    if (plain && (!text || !is_word(text))) {
        put_quoted(line, text);
    } else {
        put_text(line, conversion, text);
    }
}

/* One conversion of printf, copied out of format, so that %q can stand among them. */
static const char *put_conversion(struct line *line, const char *format, va_list *args)
{
    char one[16];
    size_t length = strcspn(format + 1, "diouxXcspfgeq%") + 2;
    char kind = format[length - 1];
    if (length >= sizeof(one) || kind == '\0') {
        return format + strlen(format);
    }
    memcpy(one, format, length);
    one[length] = '\0';
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
    if (kind == 'q') {
        put_quoted(line, va_arg(*args, const char *));
    } else if (kind == '%') {
        put_char(line, '%');
    } else if (kind == 's' && strchr(one, '*')) {
        int length_max = va_arg(*args, int);
        put_text(line, one, length_max, va_arg(*args, const char *));
    } else if (kind == 's') {
        put_string(line, one, va_arg(*args, const char *));
    } else if (kind == 'p') {
        put_text(line, one, va_arg(*args, void *));
    } else if (strchr("fge", kind)) {
        put_text(line, one, va_arg(*args, double));
    } else if (strchr(one, 'z') || strchr(one, 'l') || strchr(one, 'j')) {
        put_text(line, one, va_arg(*args, long));
    } else {
        put_text(line, one, va_arg(*args, int));
    }
#pragma GCC diagnostic pop
    return format + length;
}

void rk_log(enum rk_log_level level, const char *event, const char *format, ...)
{
    if (level < log_level) {
        return;
    }
    struct line line = {.used = 0};
    struct timespec now;
    struct tm utc;
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &utc);
    put_text(&line, "ts=%04d-%02d-%02dT%02d:%02d:%02d.%03ldZ level=%s component=%s event=%s ",
             utc.tm_year + 1900, utc.tm_mon + 1, utc.tm_mday, utc.tm_hour, utc.tm_min, utc.tm_sec,
             now.tv_nsec / 1000000, level_names[level], log_component, event);

    va_list args;
    va_start(args, format);
    for (const char *p = format; *p;) {
        if (*p == '%') {
            p = put_conversion(&line, p, &args);
        } else {
            put_char(&line, *p++);
        }
    }
    va_end(args);
    while (line.used > 0 && line.text[line.used - 1] == ' ') {
        line.used--;
    }
    line.text[line.used++] = '\n';
    ssize_t written = write(STDERR_FILENO, line.text, line.used);
    (void)written; /* Nobody left to tell. */
}

bool rk_log_allowed(struct rk_log_limit *limit, unsigned *ret_more)
{
    int64_t now_ns = rk_clock_ns();
    int64_t next_ns = atomic_load(&limit->next_ns);
    if (now_ns < next_ns ||
        !atomic_compare_exchange_strong(&limit->next_ns, &next_ns,
                                        now_ns + RK_LOG_LIMIT_MS * INT64_C(1000000))) {
        atomic_fetch_add(&limit->dropped, 1);
        return false;
    }
    *ret_more = atomic_exchange(&limit->dropped, 0);
    return true;
}
