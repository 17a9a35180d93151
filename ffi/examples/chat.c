/* chat MODEL: reads a message per line, streams the answers. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "lory.h"

/* For models that bring none. */
static const char FALLBACK[] =
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: ";

static int32_t print_event(void *user, const lory_event *event) {
    (void)user;
    if (event->kind == LORY_EVENT_TOKEN || event->kind == LORY_EVENT_TEXT) {
        fwrite(event->text.data, 1, event->text.len, stdout);
        fflush(stdout);
    }
    return 0; /* anything else would cancel */
}

/* Renders the messages and answers what is new in them; `session` remembers the rest. */
static lory_status answer(const lory_engine *engine, lory_session *session, lory_chat_options *chat) {
    lory_text prompt = {NULL, 0};
    lory_tokens tokens = {NULL, 0};
    lory_generation *generation = NULL;
    lory_request request;
    size_t kept = 0;

    lory_status status = lory_chat_render(engine, chat, &prompt);
    if (status == LORY_E_TEMPLATE && chat->template_source.len == 0) {
        chat->template_source.data = FALLBACK;
        chat->template_source.len = LORY_NTS;
        status = lory_chat_render(engine, chat, &prompt);
    }
    if (status == LORY_OK)
        status = lory_tokenize(engine, prompt.data, prompt.len, LORY_PARSE_SPECIAL, &tokens);
    if (status == LORY_OK)
        status = lory_session_rewind_to_common(session, tokens.data, tokens.len, &kept);
    if (status == LORY_OK) {
        lory_request_init(&request, sizeof request);
        request.tokens = tokens.data + kept;
        request.n_tokens = tokens.len - kept;
        request.max_new_tokens = 48;
        status = lory_session_generate(session, &request, &generation);
    }
    if (status == LORY_OK) status = lory_generation_run(generation, print_event, NULL, NULL);
    if (status == LORY_OK) printf("\n");
    lory_generation_free(generation);
    lory_tokens_free(&tokens);
    lory_text_free(&prompt);
    return status;
}

int main(int argc, char **argv) {
    lory_engine *engine = NULL;
    lory_session *session = NULL;
    lory_chat_options chat;
    char line[4096];
    lory_status status;

    if (argc != 2) {
        fprintf(stderr, "usage: chat MODEL < MESSAGES\n");
        return 2;
    }
    status = lory_engine_open(argv[1], LORY_NTS, NULL, &engine);
    if (status == LORY_OK) status = lory_session_new(engine, NULL, &session);
    lory_chat_options_init(&chat, sizeof chat);
    while (status == LORY_OK && fgets(line, sizeof line, stdin)) {
        /* One question at a time keeps the example short; a real chat appends both sides. */
        lory_chat_message message;
        line[strcspn(line, "\n")] = 0;
        message.role.data = "user";
        message.role.len = LORY_NTS;
        message.content.data = line;
        message.content.len = LORY_NTS;
        chat.messages = &message;
        chat.n_messages = 1;
        status = answer(engine, session, &chat);
    }
    if (status != LORY_OK) fprintf(stderr, "%s: %s\n", lory_status_name(status), lory_last_error());
    lory_session_free(session);
    lory_engine_free(engine);
    return status == LORY_OK ? 0 : 1;
}
