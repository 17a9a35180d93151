/* hammer MODEL SECONDS ADAPTER: eight threads do everything at once to one engine; every answer must be
 * the one that a thread alone gets. For race detectors, and to see what a machine holds. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "lory.h"

struct shared {
    const lory_engine *engine;
    const char *adapter_path;
    lory_tokens prompt;
    lory_adapter adapter;
    lory_text want[2]; /* without and with the adapter */
    time_t end;
    atomic_ulong answers;
    atomic_int failed;
};

static lory_status answer(const struct shared *shared, int adapted, int cancel, lory_text *text) {
    lory_adapter_scale set = {shared->adapter, 1.0f, 0};
    lory_sampler_options sampler;
    lory_session_options options;
    lory_request request;
    lory_session *session = NULL, *fork = NULL;
    lory_generation *generation = NULL;
    lory_status status;

    lory_sampler_options_init(&sampler, sizeof sampler);
    sampler.temp = 0;
    lory_session_options_init(&options, sizeof options);
    options.adapters = &set;
    options.n_adapters = adapted ? 1 : 0;
    lory_request_init(&request, sizeof request);
    request.tokens = shared->prompt.data;
    request.n_tokens = shared->prompt.len;
    request.max_new_tokens = 12;
    request.ignore_eos = 1;
    request.sampler = &sampler;
    status = lory_session_new(shared->engine, &options, &session);
    if (status == LORY_OK) status = lory_session_fork(session, &fork);
    if (status == LORY_OK) status = lory_session_generate(fork, &request, &generation);
    if (status == LORY_OK && cancel) status = lory_generation_cancel(generation);
    if (status == LORY_OK) status = lory_generation_text(generation, text);
    lory_session_free(session);
    lory_session_free(fork);
    lory_generation_free(generation);
    return status;
}

/* Another name comes and goes beside the answers. */
static lory_status churn(const struct shared *shared, unsigned n) {
    char name[32];
    lory_adapter id = 0;
    lory_metrics metrics;
    lory_status status;
    snprintf(name, sizeof name, "churn-%u", n);
    status = lory_adapter_load(shared->engine, shared->adapter_path, LORY_NTS, name, LORY_NTS, &id);
    if (status == LORY_OK) status = lory_adapter_unload(shared->engine, name, LORY_NTS);
    lory_metrics_init(&metrics, sizeof metrics);
    return status == LORY_OK ? lory_engine_metrics(shared->engine, &metrics) : status;
}

static void *work(void *arg) {
    struct shared *shared = arg;
    static atomic_uint counter;
    /* At least once: the time may be over before a thread begins. */
    do {
        unsigned n = atomic_fetch_add(&counter, 1);
        int adapted = n % 2, cancel = n % 7 == 0;
        lory_text text = {NULL, 0};
        lory_status status = n % 5 == 0 ? churn(shared, n) : LORY_OK;
        if (status == LORY_OK) status = answer(shared, adapted, cancel, &text);
        if (status != LORY_OK) {
            fprintf(stderr, "%s: %s\n", lory_status_name(status), lory_last_error());
            shared->failed = 1;
        } else if (!cancel && strcmp(text.data, shared->want[adapted].data) != 0) {
            fprintf(stderr, "%s instead of %s\n", text.data, shared->want[adapted].data);
            shared->failed = 1;
        }
        lory_text_free(&text);
        shared->answers++;
    } while (time(NULL) < shared->end && !shared->failed);
    return NULL;
}

int main(int argc, char **argv) {
    struct shared shared = {0};
    pthread_t threads[8];
    lory_engine *engine = NULL;
    lory_status status;

    if (argc != 4) {
        fprintf(stderr, "usage: hammer MODEL SECONDS ADAPTER\n");
        return 2;
    }
    shared.adapter_path = argv[3];
    status = lory_engine_open(argv[1], LORY_NTS, NULL, &engine);
    shared.engine = engine;
    if (status == LORY_OK) status = lory_tokenize(engine, "Once upon", LORY_NTS, LORY_ADD_SPECIAL, &shared.prompt);
    if (status == LORY_OK)
        status = lory_adapter_load(engine, argv[3], LORY_NTS, "one", LORY_NTS, &shared.adapter);
    for (int i = 0; status == LORY_OK && i < 2; i++) status = answer(&shared, i, 0, &shared.want[i]);
    if (status != LORY_OK) {
        fprintf(stderr, "%s: %s\n", lory_status_name(status), lory_last_error());
        shared.failed = 1;
    } else {
        shared.end = time(NULL) + atoi(argv[2]);
        for (int i = 0; i < 8; i++) pthread_create(&threads[i], NULL, work, &shared);
        for (int i = 0; i < 8; i++) pthread_join(threads[i], NULL);
        printf("%lu answers\n", (unsigned long)shared.answers);
    }
    lory_text_free(&shared.want[0]);
    lory_text_free(&shared.want[1]);
    lory_tokens_free(&shared.prompt);
    lory_engine_free(engine);
    return shared.failed;
}
