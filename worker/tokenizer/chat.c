#include "worker/tokenizer/tokenizer_internal.h"

#include "common/base/alloc.h"
#include "worker/model/model.h"

#include <stdio.h>
#include <string.h>

#define TURN_START "<|im_start|>"
#define TURN_END   "<|im_end|>"

#define DEFAULT_SYSTEM_BYTES_MAX 65536
#define MESSAGES_MAX             65536

/* ---- What the template says ---- */

/* -1: no special token of that text. */
static int32_t find_special(const struct tokenizer *tokenizer, const char *text)
{
    size_t bytes = strlen(text);
    uint8_t first = (uint8_t)text[0];
    for (uint32_t i = tokenizer->special_begin[first]; i < tokenizer->special_begin[first + 1];
         i++) {
        int32_t id = tokenizer->specials[i].id;
        uint64_t begin = tokenizer->offsets[id];
        if (tokenizer->offsets[id + 1] - begin == bytes &&
            memcmp(tokenizer->bytes + begin, text, bytes) == 0) {
            return id;
        }
    }
    return -1;
}

void tokenizer_make_control(struct tokenizer *tokenizer, int32_t id)
{
    tokenizer->control[id] = 1;
    if (tokenizer->offsets[id + 1] == tokenizer->offsets[id]) {
        return; /* No text is that token. */
    }
    uint8_t first = (uint8_t)tokenizer->bytes[tokenizer->offsets[id]];
    for (uint32_t i = tokenizer->special_begin[first]; i < tokenizer->special_begin[first + 1];
         i++) {
        if (tokenizer->specials[i].id == id) {
            tokenizer->specials[i].always = false;
        }
    }
}

static char unescape(char letter)
{
    switch (letter) {
    case 'n':
        return '\n';
    case 't':
        return '\t';
    case 'r':
        return '\r';
    default:
        return letter; /* \\, \' and \" */
    }
}

/*
 * The rest of a string literal of Jinja up to TURN_END into out (as long as the rest). -1: the
 * literal ends before, so the system message is put together from parts and is not the default.
 */
static long read_literal(const char *text, size_t bytes, char quote, char *out)
{
    long count = 0;
    for (size_t i = 0; i < bytes; i++) {
        if (bytes - i >= sizeof(TURN_END) - 1 &&
            memcmp(text + i, TURN_END, sizeof(TURN_END) - 1) == 0) {
            return count;
        }
        if (text[i] == quote || count >= DEFAULT_SYSTEM_BYTES_MAX) {
            return -1;
        }
        if (text[i] == '\\' && i + 1 < bytes) {
            out[count++] = unescape(text[++i]);
        } else {
            out[count++] = text[i];
        }
    }
    return -1;
}

/* Finds '<|im_start|>system\n...<|im_end|>' in one literal; without it there is no default. */
static enum rk_status read_default_system(struct tokenizer *tokenizer, struct model_string template,
                                          struct rk_error *error)
{
    static const char opening[] = TURN_START "system";
    const char *end = template.data + template.bytes;
    const char *at = template.data;
    char *out = rk_alloc(DEFAULT_SYSTEM_BYTES_MAX + 1);
    if (!out) {
        return rk_error_set(error, RK_ERR_NO_MEMORY, "tokenizer: no memory for the template");
    }
    while ((at = memmem(at, (size_t)(end - at), opening, sizeof(opening) - 1)) != NULL) {
        char quote = at > template.data ? at[-1] : '\0';
        at += sizeof(opening) - 1;
        long count = -1;
        if (quote == '\'' || quote == '"') {
            count = read_literal(at, (size_t)(end - at), quote, out);
        }
        if (count >= 1 && out[0] == '\n') {
            tokenizer->default_system_bytes = (size_t)count - 1;
            memmove(out, out + 1, tokenizer->default_system_bytes);
            tokenizer->default_system = out;
            return RK_OK;
        }
    }
    rk_free(out);
    return RK_OK;
}

enum rk_status tokenizer_build_chat(struct tokenizer *tokenizer,
                                    const struct model_vocabulary *vocabulary,
                                    struct rk_error *error)
{
    struct model_string template = vocabulary->chat_template;
    tokenizer->turn_start_id = -1;
    tokenizer->turn_end_id = -1;
    if (template.bytes == 0 ||
        !memmem(template.data, template.bytes, TURN_START, sizeof(TURN_START) - 1)) {
        return RK_OK;
    }
    int32_t start = find_special(tokenizer, TURN_START);
    int32_t end = find_special(tokenizer, TURN_END);
    if (start < 0 || end < 0) {
        return RK_OK;
    }
    tokenizer->turn_start_id = start;
    tokenizer->turn_end_id = end;
    tokenizer_make_control(tokenizer, start);
    tokenizer_make_control(tokenizer, end);
    return read_default_system(tokenizer, template, error);
}

/* ---- Turns ---- */

struct chat {
    const struct tokenizer *tokenizer;
    struct bpe bpe;
    struct id_list list;
    struct rk_error *error;
};

static enum rk_status append_id(struct chat *chat, int32_t id)
{
    enum rk_status status = id_list_append(&chat->list, id);
    return status == RK_OK ? RK_OK
                           : rk_error_set(chat->error, status,
                                          "tokenizer: too many tokens or no "
                                          "memory for them");
}

static enum rk_status append_text(struct chat *chat, const char *text, size_t bytes,
                                  bool parse_special)
{
    return tokenizer_append(chat->tokenizer, &chat->bpe, text, bytes, parse_special, &chat->list,
                            chat->error);
}

/* <|im_start|>role\ncontent: one text between two special tokens, so tokenised in one go. */
static enum rk_status append_turn_begin(struct chat *chat, const char *role, const char *content,
                                        size_t content_bytes, bool parse_special)
{
    size_t role_bytes = strlen(role);
    if (content_bytes > TOKENIZER_TEXT_BYTES_MAX) {
        return rk_error_set(chat->error, RK_ERR_TOO_LONG,
                            "tokenizer: %zu bytes of text are more than it takes at once",
                            content_bytes);
    }
    char *text = rk_alloc(role_bytes + 1 + content_bytes);
    if (!text) {
        return rk_error_set(chat->error, RK_ERR_NO_MEMORY, "tokenizer: no memory for a message");
    }
    memcpy(text, role, role_bytes);
    text[role_bytes] = '\n';
    if (content_bytes > 0) {
        memcpy(text + role_bytes + 1, content, content_bytes);
    }
    enum rk_status status = append_id(chat, chat->tokenizer->turn_start_id);
    if (status == RK_OK) {
        status = append_text(chat, text, role_bytes + 1 + content_bytes, parse_special);
    }
    rk_free(text);
    return status;
}

static enum rk_status append_turn_end(struct chat *chat)
{
    enum rk_status status = append_id(chat, chat->tokenizer->turn_end_id);
    return status == RK_OK ? append_text(chat, "\n", 1, false) : status;
}

static enum rk_status append_turn(struct chat *chat, const char *role, const char *content,
                                  size_t content_bytes, bool parse_special)
{
    enum rk_status status = append_turn_begin(chat, role, content, content_bytes, parse_special);
    return status == RK_OK ? append_turn_end(chat) : status;
}

static enum rk_status append_begin(struct chat *chat)
{
    int32_t id = tokenizer_begin_id(chat->tokenizer);
    return id < 0 ? RK_OK : append_id(chat, id);
}

static enum rk_status append_default_system(struct chat *chat)
{
    const struct tokenizer *tokenizer = chat->tokenizer;
    if (!tokenizer->default_system) {
        return RK_OK;
    }
    return append_turn(chat, "system", tokenizer->default_system, tokenizer->default_system_bytes,
                       false);
}

static enum rk_status finish(struct chat *chat, enum rk_status status,
                             struct tokenizer_ids *ret_ids)
{
    bpe_clear(&chat->bpe);
    if (status != RK_OK) {
        rk_free(chat->list.data);
        return status;
    }
    *ret_ids = (struct tokenizer_ids){chat->list.data, chat->list.count};
    return RK_OK;
}

static enum rk_status require_chat(const struct tokenizer *tokenizer, struct rk_error *error)
{
    return tokenizer_has_chat(tokenizer)
               ? RK_OK
               : rk_error_set(error, RK_ERR_UNSUPPORTED,
                              "tokenizer: the model has no ChatML template; send a plain prompt");
}

bool tokenizer_has_chat(const struct tokenizer *tokenizer)
{
    return tokenizer->turn_start_id >= 0;
}

static bool known_role(const char *role)
{
    return strcmp(role, "system") == 0 || strcmp(role, "user") == 0 ||
           strcmp(role, "assistant") == 0;
}

enum rk_status tokenizer_chat_encode(const struct tokenizer *tokenizer,
                                     const struct tokenizer_message *messages, size_t num_messages,
                                     bool add_generation_prompt, bool parse_special_in_content,
                                     struct tokenizer_ids *ret_ids, struct rk_error *error)
{
    struct chat chat = {.tokenizer = tokenizer, .error = error};
    enum rk_status status = require_chat(tokenizer, error);
    if (status != RK_OK) {
        return status;
    }
    if (num_messages > MESSAGES_MAX) {
        return rk_error_set(error, RK_ERR_TOO_LONG, "tokenizer: more than %d messages",
                            MESSAGES_MAX);
    }
    for (size_t i = 0; i < num_messages; i++) {
        if (!known_role(messages[i].role)) {
            return rk_error_set(error, RK_ERR_INVALID,
                                "tokenizer: message %zu has an unknown role; use system, user or "
                                "assistant",
                                i);
        }
    }
    status = append_begin(&chat);
    if (status == RK_OK && num_messages > 0 && strcmp(messages[0].role, "system") != 0) {
        status = append_default_system(&chat);
    }
    for (size_t i = 0; i < num_messages && status == RK_OK; i++) {
        status = append_turn(&chat, messages[i].role, messages[i].content,
                             messages[i].content_bytes, parse_special_in_content);
    }
    if (status == RK_OK && add_generation_prompt) {
        status = append_turn_begin(&chat, "assistant", "", 0, false);
    }
    return finish(&chat, status, ret_ids);
}

enum rk_status tokenizer_chat_open(const struct tokenizer *tokenizer, const char *system,
                                   struct tokenizer_ids *ret_ids, struct rk_error *error)
{
    struct chat chat = {.tokenizer = tokenizer, .error = error};
    enum rk_status status = require_chat(tokenizer, error);
    if (status != RK_OK) {
        return status;
    }
    status = append_begin(&chat);
    if (status == RK_OK && system) {
        status = append_turn(&chat, "system", system, strlen(system), false);
    } else if (status == RK_OK) {
        status = append_default_system(&chat);
    }
    if (status == RK_OK) {
        status = append_turn_begin(&chat, "user", "", 0, false);
    }
    return finish(&chat, status, ret_ids);
}

enum rk_status tokenizer_chat_close(const struct tokenizer *tokenizer,
                                    struct tokenizer_ids *ret_ids, struct rk_error *error)
{
    struct chat chat = {.tokenizer = tokenizer, .error = error};
    enum rk_status status = require_chat(tokenizer, error);
    if (status != RK_OK) {
        return status;
    }
    status = append_turn_end(&chat);
    if (status == RK_OK) {
        status = append_turn_begin(&chat, "assistant", "", 0, false);
    }
    return finish(&chat, status, ret_ids);
}
