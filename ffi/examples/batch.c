/* batch MODEL [ADAPTER]: four threads, a session each, with and without the adapter. Their rows run
 * in the same steps; whichever thread waits runs the next step for all. */
#include <pthread.h>
#include <stdio.h>

#include "lory.h"

struct job {
    const lory_engine *engine; /* shared: the functions take it const */
    lory_adapter adapter;      /* 0 is none */
    const char *prompt;
    lory_text answer;
    char error[256]; /* error texts belong to the thread that failed */
};

static void *work(void *arg) {
    struct job *job = arg;
    lory_adapter_scale set = {job->adapter, 1.0f, 0};
    lory_session *session = NULL;
    lory_generation *generation = NULL;
    lory_tokens prompt = {NULL, 0};
    lory_session_options options;
    lory_request request;
    lory_status status;

    lory_session_options_init(&options, sizeof options);
    options.adapters = &set;
    options.n_adapters = job->adapter != 0;
    lory_request_init(&request, sizeof request);
    request.max_new_tokens = 16;

    status = lory_session_new(job->engine, &options, &session);
    if (status == LORY_OK)
        status = lory_tokenize(job->engine, job->prompt, LORY_NTS, LORY_ADD_SPECIAL, &prompt);
    request.tokens = prompt.data;
    request.n_tokens = prompt.len;
    if (status == LORY_OK) status = lory_session_generate(session, &request, &generation);
    if (status == LORY_OK) status = lory_generation_text(generation, &job->answer);
    if (status != LORY_OK) snprintf(job->error, sizeof job->error, "%s", lory_last_error());
    lory_tokens_free(&prompt);
    lory_generation_free(generation);
    lory_session_free(session);
    return NULL;
}

int main(int argc, char **argv) {
    static const char *const PROMPTS[4] = {"Once", "The", "A small", "In the"};
    struct job jobs[4] = {0};
    pthread_t threads[4];
    lory_engine *engine = NULL;
    lory_adapter adapter = 0;
    int result = 0;

    if (argc != 2 && argc != 3) {
        fprintf(stderr, "usage: batch MODEL [ADAPTER]\n");
        return 2;
    }
    if (lory_engine_open(argv[1], LORY_NTS, NULL, &engine) != LORY_OK ||
        (argc == 3 && lory_adapter_load(engine, argv[2], LORY_NTS, NULL, 0, &adapter) != LORY_OK)) {
        fprintf(stderr, "%s\n", lory_last_error());
        lory_engine_free(engine);
        return 1;
    }
    for (int i = 0; i < 4; i++) {
        jobs[i].engine = engine;
        jobs[i].adapter = i % 2 ? adapter : 0;
        jobs[i].prompt = PROMPTS[i];
        pthread_create(&threads[i], NULL, work, &jobs[i]);
    }
    for (int i = 0; i < 4; i++) {
        pthread_join(threads[i], NULL);
        if (jobs[i].error[0]) {
            fprintf(stderr, "%s\n", jobs[i].error);
            result = 1;
        } else {
            printf("%s%s\n", jobs[i].prompt, jobs[i].answer.data);
        }
        lory_text_free(&jobs[i].answer);
    }
    lory_engine_free(engine);
    return result;
}
