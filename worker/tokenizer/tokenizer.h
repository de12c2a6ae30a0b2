/*
 * tokenizer: byte-level BPE with the pre-tokenizers "smollm" and "gpt2" (split
 * by PCRE2 with Unicode properties, its only user), from a GGUF vocabulary; and
 * the ChatML chat template.
 *
 * "smollm": first each numeric character (category N*) is cut out alone, then
 * the GPT-2 pattern runs in each piece; the look-ahead sees the piece's end.
 * Bytes without a token are dropped, as transformers and llama.cpp do.
 *
 * Threads: immutable after creation; any thread.
 */
#ifndef WORKER_TOKENIZER_TOKENIZER_H
#define WORKER_TOKENIZER_TOKENIZER_H

#include "common/base/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct model_vocabulary;
struct tokenizer;

/* Ids or bytes that a call made; free with rk_free(data). */
struct tokenizer_ids {
    int32_t *data;
    size_t count;
};
struct tokenizer_text {
    char *data; /* also NUL-terminated; may hold NULs and invalid UTF-8 */
    size_t bytes;
};

/* Copies what it needs. RK_ERR_UNSUPPORTED names a pre-tokenizer that it does not know. */
RK_MUST_CHECK enum rk_status tokenizer_create(const struct model_vocabulary *vocabulary,
                                              struct tokenizer **ret_tokenizer,
                                              struct rk_error *error);
/*
 * Is the vocabulary fit for service? RK_ERR_CORRUPT: a printable ASCII character, a space or a line
 * feed has no token, so text would lose it. What is merely unusual (other bytes without a token,
 * two equal tokens, no end) is logged once, as a warning, and served.
 */
RK_MUST_CHECK enum rk_status tokenizer_check(const struct tokenizer *tokenizer,
                                             struct rk_error *error);
void tokenizer_destroy(struct tokenizer *tokenizer); /* accepts NULL */

/* parse_special: "<|im_start|>" in the text becomes its token; false for text from outside.
 * text: any bytes; invalid UTF-8 is tokenised byte by byte. No BOS is added unless the
 * vocabulary asks for it and add_bos is set. */
RK_MUST_CHECK enum rk_status tokenizer_encode(const struct tokenizer *tokenizer, const char *text,
                                              size_t bytes, bool parse_special, bool add_bos,
                                              struct tokenizer_ids *ret_ids,
                                              struct rk_error *error);
RK_MUST_CHECK enum rk_status tokenizer_decode(const struct tokenizer *tokenizer, const int32_t *ids,
                                              size_t count, bool skip_special,
                                              struct tokenizer_text *ret_text,
                                              struct rk_error *error);
/* The token that the vocabulary wants each text to begin with (add_bos_token); -1: none. */
int32_t tokenizer_begin_id(const struct tokenizer *tokenizer);
bool tokenizer_is_special(const struct tokenizer *tokenizer, int32_t id);
bool tokenizer_is_end(const struct tokenizer *tokenizer, int32_t id); /* EOS or <|im_end|> */
uint32_t tokenizer_vocab_size(const struct tokenizer *tokenizer);

/* ---- Chat (ChatML models only) ---- */

bool tokenizer_has_chat(const struct tokenizer *tokenizer);
struct tokenizer_message {
    const char *role; /* "system", "user", "assistant" */
    const char *content;
    size_t content_bytes;
};
/* Whole conversation. parse_special_in_content as transformers does it; a server that serves
 * untrusted text passes false, so that content cannot forge a turn. */
RK_MUST_CHECK enum rk_status tokenizer_chat_encode(const struct tokenizer *tokenizer,
                                                   const struct tokenizer_message *messages,
                                                   size_t num_messages, bool add_generation_prompt,
                                                   bool parse_special_in_content,
                                                   struct tokenizer_ids *ret_ids,
                                                   struct rk_error *error);
/* The two halves around a user turn that is made of cached segments and a question:
 * opening = the token to begin with, if any, system message (NULL: the model's own) and the start
 * of the user turn;
 * closing = end of the user turn and the start of the assistant's. */
RK_MUST_CHECK enum rk_status tokenizer_chat_open(const struct tokenizer *tokenizer,
                                                 const char *system, struct tokenizer_ids *ret_ids,
                                                 struct rk_error *error);
RK_MUST_CHECK enum rk_status tokenizer_chat_close(const struct tokenizer *tokenizer,
                                                  struct tokenizer_ids *ret_ids,
                                                  struct rk_error *error);

#endif
