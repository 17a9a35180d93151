/* sources MODEL: opens one model by path, descriptor, memory (copied and lent) and read callback,
 * gives up one opening halfway, and checks that all answer alike. */
#define _POSIX_C_SOURCE 200809L
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "lory.h"

struct memory {
    char *data;
    size_t size;
    int lent;
};

static void give_back(void *user, const void *data, size_t size) {
    struct memory *memory = user;
    memory->lent -= data == memory->data && size == memory->size;
}

static int64_t read_memory(void *user, uint64_t offset, void *buffer, size_t len) {
    struct memory *memory = user;
    size_t n = memory->size - offset < len ? memory->size - (size_t)offset : len;
    memcpy(buffer, memory->data + offset, n);
    return (int64_t)n;
}

static int32_t show(void *user, uint64_t done, uint64_t total) {
    (void)user;
    printf("  %llu of %llu bytes\n", (unsigned long long)done, (unsigned long long)total);
    return 0;
}

static int32_t give_up(void *user, uint64_t done, uint64_t total) {
    (void)user, (void)done, (void)total;
    return 1;
}

static int load_file(const char *path, struct memory *memory) {
    FILE *file = fopen(path, "rb");
    if (!file) return 0;
    fseek(file, 0, SEEK_END);
    memory->size = (size_t)ftell(file);
    rewind(file);
    memory->data = malloc(memory->size);
    int ok = memory->data && fread(memory->data, 1, memory->size, file) == memory->size;
    fclose(file);
    return ok;
}

/* A greedy answer; frees the engine. */
static lory_status answer(lory_engine *engine, lory_text *text) {
    lory_session *session = NULL;
    lory_generation *generation = NULL;
    lory_tokens prompt = {NULL, 0};
    lory_sampler_options sampler;
    lory_request request;
    lory_sampler_options_init(&sampler, sizeof sampler);
    sampler.temp = 0;
    lory_request_init(&request, sizeof request);
    request.sampler = &sampler;
    request.max_new_tokens = 12;
    lory_status status = lory_session_new(engine, NULL, &session);
    if (status == LORY_OK) status = lory_tokenize(engine, "Once", LORY_NTS, LORY_ADD_SPECIAL, &prompt);
    request.tokens = prompt.data;
    request.n_tokens = prompt.len;
    if (status == LORY_OK) status = lory_session_generate(session, &request, &generation);
    lory_engine_free(engine); /* what came from it goes on */
    if (status == LORY_OK) status = lory_generation_text(generation, text);
    lory_tokens_free(&prompt);
    lory_generation_free(generation);
    lory_session_free(session);
    return status;
}

int main(int argc, char **argv) {
    static const char *const NAMES[5] = {"path", "descriptor", "copied memory", "lent memory", "callback"};
    struct memory memory = {NULL, 0, 0};
    lory_engine_options options;
    lory_text first = {NULL, 0};
    int fd, result = 0;

    if (argc != 2 || !load_file(argv[1], &memory)) {
        fprintf(stderr, "usage: sources MODEL\n");
        return 2;
    }
    fd = open(argv[1], O_RDONLY);
    lory_engine_options_init(&options, sizeof options);
    options.loading = LORY_LOADING_READ;
    options.progress = show;
    for (int i = 0; i < 5 && result == 0; i++) {
        lory_engine *engine = NULL;
        lory_text text = {NULL, 0};
        lory_status status = LORY_OK;
        printf("%s\n", NAMES[i]);
        switch (i) {
        case 0: status = lory_engine_open(argv[1], LORY_NTS, &options, &engine); break;
        case 1: status = lory_engine_open_fd(fd, "fd", LORY_NTS, &options, &engine); break;
        case 2:
            status = lory_engine_open_memory(memory.data, memory.size, "memory", LORY_NTS, NULL, NULL, &options,
                                             &engine);
            break;
        case 3:
            memory.lent = 1;
            status = lory_engine_open_memory(memory.data, memory.size, "memory", LORY_NTS, give_back, &memory,
                                             &options, &engine);
            break;
        case 4:
            status = lory_engine_open_callback(read_memory, &memory, memory.size, "callback", LORY_NTS, &options,
                                               &engine);
            break;
        }
        if (status == LORY_OK) status = answer(engine, &text);
        if (status != LORY_OK) {
            fprintf(stderr, "%s: %s\n", NAMES[i], lory_last_error());
            result = 1;
        } else if (first.data && strcmp(first.data, text.data) != 0) {
            fprintf(stderr, "%s answers %s instead of %s\n", NAMES[i], text.data, first.data);
            result = 1;
        }
        if (!first.data)
            first = text;
        else
            lory_text_free(&text);
    }
    if (result == 0) {
        lory_engine *engine = NULL;
        options.progress = give_up;
        lory_status status = lory_engine_open(argv[1], LORY_NTS, &options, &engine);
        printf("given up: %s: %s\n", lory_status_name(status), lory_last_error());
        result = status != LORY_E_ABORTED || engine != NULL || memory.lent != 0;
        printf("%s\n", first.data);
    }
    lory_text_free(&first);
    close(fd);
    free(memory.data);
    return result;
}
