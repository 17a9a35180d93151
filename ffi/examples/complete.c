/* complete MODEL PROMPT: prints a completion. */
#include <stdio.h>

#include "lory.h"

static int failed(const char *what) {
    fprintf(stderr, "%s: %s\n", what, lory_last_error());
    return 1;
}

int main(int argc, char **argv) {
    lory_engine *engine = NULL;
    lory_session *session = NULL;
    lory_generation *generation = NULL;
    lory_tokens prompt = {NULL, 0};
    lory_text answer = {NULL, 0};
    lory_request request;
    lory_sampler_options sampler;
    int result = 1;

    if (argc != 3) {
        fprintf(stderr, "usage: complete MODEL PROMPT\n");
        return 2;
    }
    if (lory_engine_open(argv[1], LORY_NTS, NULL, &engine) != LORY_OK) return failed("opening");

    lory_request_init(&request, sizeof request);
    request.max_new_tokens = 64;
    lory_sampler_options_init(&sampler, sizeof sampler);
    sampler.temp = 0; /* always the most likely token */
    request.sampler = &sampler;
    if (lory_tokenize(engine, argv[2], LORY_NTS, LORY_ADD_SPECIAL | LORY_PARSE_SPECIAL, &prompt) != LORY_OK) {
        failed("tokenizing");
        goto end;
    }
    request.tokens = prompt.data;
    request.n_tokens = prompt.len;
    if (lory_session_new(engine, NULL, &session) != LORY_OK ||
        lory_session_generate(session, &request, &generation) != LORY_OK ||
        lory_generation_text(generation, &answer) != LORY_OK) {
        failed("generating");
        goto end;
    }
    printf("%s%s\n", argv[2], answer.data);
    result = 0;

end: /* every _free takes NULL */
    lory_text_free(&answer);
    lory_tokens_free(&prompt);
    lory_generation_free(generation);
    lory_session_free(session);
    lory_engine_free(engine);
    return result;
}
