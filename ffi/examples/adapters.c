/* adapters MODEL N ADAPTER…: loads N adapters (the files given, in turn, under names of their own),
 * then answers one request with each: on the same session, a switch is a change of index. */
#include <stdio.h>
#include <stdlib.h>

#include "lory.h"

static lory_status load(const lory_engine *engine, int n, int n_files, char **files) {
    lory_status status = LORY_OK;
    for (int i = 0; status == LORY_OK && i < n; i++) {
        char name[32];
        lory_adapter id = 0;
        snprintf(name, sizeof name, "tenant-%04d", i);
        status = lory_adapter_load(engine, files[i % n_files], LORY_NTS, name, LORY_NTS, &id);
    }
    return status;
}

static lory_status answer(lory_session *session, const lory_request *request, lory_str name, lory_adapter id) {
    lory_adapter_scale set = {id, 1.0f, 0};
    lory_generation *generation = NULL;
    lory_text text = {NULL, 0};
    /* Keys and values belong to their adapter: the switch forgets them, so every answer is what a
     * new session with this adapter would give. */
    lory_status status = lory_session_set_adapters(session, &set, 1, LORY_ON_SWITCH_RECOMPUTE);
    if (status == LORY_OK) status = lory_session_rewind(session, 0);
    if (status == LORY_OK) status = lory_session_generate(session, request, &generation);
    if (status == LORY_OK) status = lory_generation_text(generation, &text);
    if (status == LORY_OK) printf("%.*s:%s\n", (int)name.len, name.data, text.data);
    lory_text_free(&text);
    lory_generation_free(generation);
    return status;
}

int main(int argc, char **argv) {
    lory_engine *engine = NULL;
    lory_session *session = NULL;
    lory_adapter_list *list = NULL;
    lory_tokens prompt = {NULL, 0};
    lory_sampler_options sampler;
    lory_request request;
    lory_adapter_info info;
    uint64_t bytes = 0;
    lory_status status;

    if (argc < 4) {
        fprintf(stderr, "usage: adapters MODEL N ADAPTER...\n");
        return 2;
    }
    lory_sampler_options_init(&sampler, sizeof sampler);
    sampler.temp = 0;
    lory_request_init(&request, sizeof request);
    request.sampler = &sampler;
    request.max_new_tokens = 4;
    lory_adapter_info_init(&info, sizeof info);

    status = lory_engine_open(argv[1], LORY_NTS, NULL, &engine);
    if (status == LORY_OK) status = load(engine, atoi(argv[2]), argc - 3, argv + 3);
    if (status == LORY_OK) status = lory_session_new(engine, NULL, &session);
    if (status == LORY_OK) status = lory_tokenize(engine, "Once", LORY_NTS, LORY_ADD_SPECIAL, &prompt);
    if (status == LORY_OK) status = lory_adapter_list_new(engine, &list);
    request.tokens = prompt.data;
    request.n_tokens = prompt.len;
    for (size_t i = 0; status == LORY_OK && i < lory_adapter_list_len(list); i++) {
        lory_adapter id = 0;
        status = lory_adapter_list_get(list, i, &info);
        if (status == LORY_OK) status = lory_adapter_resolve(engine, info.name.data, info.name.len, &id);
        if (status == LORY_OK) status = answer(session, &request, info.name, id);
        bytes += info.bytes;
    }
    if (status == LORY_OK) {
        printf("%zu adapters, %llu bytes\n", lory_adapter_list_len(list), (unsigned long long)bytes);
    } else {
        fprintf(stderr, "%s: %s\n", lory_status_name(status), lory_last_error());
    }
    lory_adapter_list_free(list);
    lory_tokens_free(&prompt);
    lory_session_free(session);
    lory_engine_free(engine);
    return status == LORY_OK ? 0 : 1;
}
