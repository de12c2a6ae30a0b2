/* What is printed: messages, JSON and text that may hold any bytes. */
#include "client/cli/cli_internal.h"
#include "common/base/alloc.h"
#include "common/base/text.h"

#include <errno.h>
#include <stdarg.h>
#include <string.h>

#define MESSAGE_BYTES 4096

/* ---- Text from outside ---- */

const char *cli_shown(const char *text, char *ret_text, size_t room)
{
    (void)rk_text_escape(text, strlen(text), ret_text, room);
    return ret_text;
}

bool cli_write_text(FILE *file, const char *text, size_t bytes)
{
    bool written = true;
    for (size_t i = 0; i < bytes && written;) {
        size_t character = rk_text_name_character(text + i, bytes - i);
        bool plain = text[i] == '\n' || text[i] == '\t';
        if (character > 0 || plain) {
            character = character > 0 ? character : 1;
            written = fwrite(text + i, 1, character, file) == character;
        } else {
            character = 1;
            written = fprintf(file, "\\x%02x", (unsigned char)text[i]) > 0;
        }
        i += character;
    }
    return written;
}

/* ---- JSON ---- */

static bool json_wanted; /* Errors, too, are told as JSON. */
static bool json_printed;
static bool output_failed;
static struct rk_error first_error; /* Told at the end unless an object was printed. */
static bool any_error;

void cli_json_errors(void)
{
    json_wanted = true;
}

json_t *cli_json_text(const char *text, size_t bytes)
{
    json_t *string = memchr(text, 0, bytes) ? NULL : json_stringn(text, bytes);
    if (!string) {
        char *copy = rk_text_json(text, bytes);
        string = copy ? json_string(copy) : json_null();
        rk_free(copy);
    }
    return string;
}

static json_t *hex_of(const char *text, size_t bytes)
{
    static const char digits[] = "0123456789abcdef";
    char *hex = rk_alloc(2 * bytes + 1);
    if (!hex) {
        return json_null();
    }
    for (size_t i = 0; i < bytes; i++) {
        hex[2 * i] = digits[(unsigned char)text[i] >> 4];
        hex[2 * i + 1] = digits[(unsigned char)text[i] & 0xF];
    }
    json_t *string = json_stringn(hex, 2 * bytes);
    rk_free(hex);
    return string;
}

void cli_json_set_text(json_t *object, const char *key, const char *text, size_t bytes)
{
    (void)json_object_set_new(object, key, cli_json_text(text, bytes));
    if (memchr(text, 0, bytes) || !rk_utf8_valid(text, bytes)) {
        char key_hex[64];
        (void)snprintf(key_hex, sizeof(key_hex), "%s_hex", key);
        (void)json_object_set_new(object, key_hex, hex_of(text, bytes));
    }
}

void cli_json_set_string(json_t *object, const char *key, const char *text)
{
    cli_json_set_text(object, key, text, strlen(text));
}

json_t *cli_json_id(const struct rk_id *id)
{
    char hex[RK_ID_HEX_BYTES];
    rk_id_to_hex(id, hex);
    return json_string(hex);
}

json_t *cli_json_error(const struct rk_error *error)
{
    json_t *object = json_pack("{s:s}", "status", rk_status_name(error->status));
    cli_json_set_string(object, "text", error->text);
    return object;
}

void cli_print_json(json_t *object)
{
    if (json_dumpf(object, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(17)) != 0) {
        output_failed = true;
        (void)cli_fail("writing JSON failed: %s",
                       object ? strerror(errno) : "out of memory, or a text that is no text");
    }
    (void)fputc('\n', stdout);
    json_printed = true;
    json_decref(object);
}

/* ---- Errors ---- */

static void remember_error(enum rk_status status, const char *text)
{
    if (!any_error) {
        any_error = true;
        (void)rk_error_set(&first_error, status, "%s", text);
    }
}

static int fail(enum rk_status status, const char *text)
{
    cli_progress_end();
    (void)fflush(stdout);
    (void)fputs("redknot: ", stderr);
    (void)cli_write_text(stderr, text, strlen(text));
    (void)fputc('\n', stderr);
    remember_error(status, text);
    return CLI_FAIL;
}

int cli_fail(const char *format, ...)
{
    char text[MESSAGE_BYTES];
    va_list args;
    va_start(args, format);
    (void)vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    return fail(RK_ERR_INTERNAL, text);
}

/* What to do about it, for a person. */
static const char *advice_for(const struct rk_error *error)
{
    switch (rk_status_remedy(error->status)) {
    case RK_REMEDY_ELSEWHERE:
        if (error->answered) {
            return "";
        }
        /* Whoever cannot reach the coordinator cannot ask it for the nodes. */
        return strncmp(error->text, "coordinator", 11) == 0
                   ? "; is it running? `redknot up` starts a cluster, --coordinator names another"
                   : "; is it running? `redknot status` lists the nodes";
    case RK_REMEDY_RETRY:
        return strstr(error->text, "try again") ? "" : "; try again";
    case RK_REMEDY_GIVE_UP:
        /* What failed here, such as a full disk, is in no node's log. */
        return error->answered ? "; the node's log says more" : "";
    default:
        return "";
    }
}

int cli_fail_error(const char *what, const struct rk_error *error)
{
    char text[MESSAGE_BYTES];
    if (cli_interrupted()) {
        (void)snprintf(text, sizeof(text), "%s: interrupted", what);
        return fail(RK_ERR_CANCELLED, text);
    }
    (void)snprintf(text, sizeof(text), "%s: %s%s", what,
                   error->text[0] ? error->text : rk_status_text(error->status), advice_for(error));
    return fail(error->status, text);
}

int cli_finish(int code)
{
    if (json_wanted && !json_printed && any_error && code != CLI_USAGE) {
        cli_print_json(json_pack("{s:o}", "error", cli_json_error(&first_error)));
    }
    return output_failed && code == CLI_OK ? CLI_FAIL : code;
}

/* ---- Figures ---- */

const char *cli_bytes(uint64_t bytes, char ret_text[32])
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    double value = (double)bytes;
    size_t unit = 0;
    while (value >= 1024 && unit + 1 < sizeof(units) / sizeof(units[0])) {
        value /= 1024;
        unit++;
    }
    (void)snprintf(ret_text, 32, unit ? "%.1f %s" : "%.0f %s", value, units[unit]);
    return ret_text;
}

const char *cli_seconds(double seconds, char ret_text[32])
{
    if (seconds < 1) {
        (void)snprintf(ret_text, 32, "%.1f ms", seconds * 1000);
    } else {
        (void)snprintf(ret_text, 32, "%.2f s", seconds);
    }
    return ret_text;
}
