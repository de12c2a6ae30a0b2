/*
 * tokenizer, inside: the tables of a vocabulary and byte-pair merging.
 *
 * Text is held as raw bytes throughout; the GPT-2 alphabet, in which a
 * vocabulary spells its bytes, is undone once, when the tables are built.
 */
#ifndef WORKER_TOKENIZER_TOKENIZER_INTERNAL_H
#define WORKER_TOKENIZER_TOKENIZER_INTERNAL_H

#define PCRE2_CODE_UNIT_WIDTH 8
#include "worker/tokenizer/tokenizer.h"

#include <pcre2.h>

/* A longer text is refused: a context is at most 2^22 tokens. */
#define TOKENIZER_TEXT_BYTES_MAX (1u << 26)
#define TOKENIZER_IDS_MAX        (1u << 23)
/* Special tokens are matched at every byte of a text: a bound for hostile vocabularies. */
#define TOKENIZER_SPECIALS_MAX 65536

/* GGUF's type of a token that is matched in any text. */
#define TOKENIZER_TYPE_USER_DEFINED 4

/* Token bytes -> id. Open addressing; 0 in slots means empty, else id + 1. */
struct token_map {
    uint32_t *slots;
    uint32_t mask;
};

struct merge {
    int32_t left; /* -1: empty slot */
    int32_t right;
    int32_t result;
    uint32_t rank;
};

/* (left, right) -> rank and result. Open addressing. */
struct merge_map {
    struct merge *slots;
    uint32_t mask;
};

struct special {
    int32_t id;
    bool always; /* user defined: matched in any text; the others only when asked for */
};

struct tokenizer {
    uint32_t num_tokens;
    char *bytes;           /* all tokens' bytes, one behind the other */
    uint64_t *offsets;     /* [num_tokens + 1] into bytes */
    uint8_t *control;      /* [num_tokens], 1: a control token */
    int32_t byte_ids[256]; /* -1: no token for that byte */
    struct token_map map;
    struct merge_map merges;
    struct special *specials;      /* by first byte, longest first */
    uint32_t special_begin[257];   /* first byte -> range in specials */
    pcre2_general_context *pcre;   /* our allocator */
    pcre2_match_context *matching; /* limits */
    pcre2_code *number;            /* NULL: numeric characters are not cut out */
    pcre2_code *piece;
    int32_t bos_id, eos_id;
    bool add_bos;
    uint32_t num_equal; /* tokens that have the bytes of an earlier one: never used */
    int32_t turn_start_id, turn_end_id; /* <|im_start|>, <|im_end|>; -1: no chat */
    char *default_system;               /* NULL: the template has none */
    size_t default_system_bytes;
};

/* ---- vocabulary.c ---- */

/* Fills tables from bytes to merges; control tokens from types. */
RK_MUST_CHECK enum rk_status tokenizer_build(struct tokenizer *tokenizer,
                                             const struct model_vocabulary *vocabulary,
                                             struct rk_error *error);
int32_t tokenizer_find(const struct tokenizer *tokenizer, const char *bytes, size_t count);
/* NULL: the two are never merged. */
const struct merge *tokenizer_find_merge(const struct tokenizer *tokenizer, int32_t left,
                                         int32_t right);

/* ---- bpe.c ---- */

struct bpe_symbol {
    int32_t id; /* -1: merged into its left neighbour */
    int32_t previous, next;
};
struct bpe_pair {
    uint32_t rank;
    int32_t position; /* of the left symbol */
    int32_t left, right;
};
/* What one call of encode reuses from piece to piece. Zeroed at the start. */
struct bpe {
    struct bpe_symbol *symbols;
    size_t symbols_max;
    struct bpe_pair *heap;
    size_t heap_count, heap_max;
};
void bpe_clear(struct bpe *bpe);

struct id_list {
    int32_t *data;
    size_t count, max;
};
RK_MUST_CHECK enum rk_status id_list_append(struct id_list *list, int32_t id);

/* Merges one piece. O(n log n) whatever the piece; bytes without a token are dropped first. */
RK_MUST_CHECK enum rk_status bpe_encode(const struct tokenizer *tokenizer, struct bpe *bpe,
                                        const char *text, size_t bytes, struct id_list *list);

/* ---- tokenizer.c ---- */

RK_MUST_CHECK enum rk_status tokenizer_append(const struct tokenizer *tokenizer, struct bpe *bpe,
                                              const char *text, size_t bytes, bool parse_special,
                                              struct id_list *list, struct rk_error *error);

/* ---- chat.c ---- */

/* Nobody may write this token by accident, whatever type the file gives it. */
void tokenizer_make_control(struct tokenizer *tokenizer, int32_t id);
/* Sets the chat fields; a template that is not ChatML leaves them off. */
RK_MUST_CHECK enum rk_status tokenizer_build_chat(struct tokenizer *tokenizer,
                                                  const struct model_vocabulary *vocabulary,
                                                  struct rk_error *error);

#endif
