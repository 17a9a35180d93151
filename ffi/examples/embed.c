/* embed MODEL TEXT TEXT…: how similar the first text is to each of the others (cosine). */
#include <stdio.h>
#include <stdlib.h>

#include "lory.h"

static lory_status embed(const lory_engine *engine, lory_session *session, const char *text, lory_floats *vector) {
    lory_tokens tokens = {NULL, 0};
    lory_status status = lory_tokenize(engine, text, LORY_NTS, LORY_ADD_SPECIAL, &tokens);
    /* The session stays empty: every text is embedded on its own. */
    if (status == LORY_OK)
        status = lory_session_embed(session, tokens.data, tokens.len, LORY_POOLING_MEAN, 1, vector);
    lory_tokens_free(&tokens);
    return status;
}

int main(int argc, char **argv) {
    lory_engine *engine = NULL;
    lory_session *session = NULL;
    lory_floats first = {NULL, 0};
    lory_status status;

    if (argc < 4) {
        fprintf(stderr, "usage: embed MODEL TEXT TEXT...\n");
        return 2;
    }
    status = lory_engine_open(argv[1], LORY_NTS, NULL, &engine);
    if (status == LORY_OK) status = lory_session_new(engine, NULL, &session);
    if (status == LORY_OK) status = embed(engine, session, argv[2], &first);
    for (int i = 3; status == LORY_OK && i < argc; i++) {
        lory_floats other = {NULL, 0};
        status = embed(engine, session, argv[i], &other);
        if (status == LORY_OK) {
            double cosine = 0;
            for (size_t k = 0; k < first.len; k++) cosine += (double)first.data[k] * other.data[k];
            printf("%.3f %s\n", cosine, argv[i]);
        }
        lory_floats_free(&other);
    }
    if (status != LORY_OK) fprintf(stderr, "%s: %s\n", lory_status_name(status), lory_last_error());
    lory_floats_free(&first);
    lory_session_free(session);
    lory_engine_free(engine);
    return status == LORY_OK ? 0 : 1;
}
