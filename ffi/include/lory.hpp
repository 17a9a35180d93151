/*
 * liblory for C++17: handles that free themselves, exceptions for errors, a range over tokens.
 * Header only, over lory.h, whose rules hold here too. Exceptions thrown in callbacks given to this
 * wrapper end the operation and come out of the call; they never pass through the library.
 */
#ifndef LORY_HPP
#define LORY_HPP

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <iterator>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "lory.h"

namespace lory {

/** A call that failed: its status and the thread's error text. */
class Error : public std::runtime_error {
  public:
    explicit Error(lory_status status) : std::runtime_error(lory_last_error()), status_(status) {}
    lory_status status() const noexcept { return status_; }

  private:
    lory_status status_;
};

/** A call on several generations that failed for one of them. */
class GenerationError : public Error {
  public:
    GenerationError(lory_status status, size_t index) : Error(status), index_(index) {}
    /** Which of them has ended with the error. */
    size_t index() const noexcept { return index_; }

  private:
    size_t index_;
};

/** The name of a status, such as "LORY_E_IO". */
inline std::string_view status_name(lory_status status) { return lory_status_name(status); }

/** The version of the library that is loaded. */
inline std::string_view version() { return lory_version(); }

/** Whether the library that is loaded is of the header's ABI. */
inline bool abi_matches() { return lory_abi_version() == LORY_ABI_VERSION; }

/** Throws unless `status` is LORY_OK. */
inline void check(lory_status status) {
    if (status != LORY_OK) throw Error(status);
}

namespace detail {

template <class T, void (*Free)(T *)> struct Deleter {
    void operator()(T *handle) const noexcept { Free(handle); }
};

template <class T, void (*Free)(T *)> using Handle = std::unique_ptr<T, Deleter<T, Free>>;

/** An options struct of the C header with its defaults. */
template <class T, lory_status (*Init)(T *, size_t)> struct Options : T {
    Options() : T() { check(Init(this, sizeof(T))); }
};

inline lory_str str(std::string_view text) { return lory_str{text.data(), text.size()}; }

inline std::string_view view(lory_str text) {
    return text.len == 0 ? std::string_view() : std::string_view(text.data, text.len);
}

inline std::string take(lory_text &text) {
    std::unique_ptr<lory_text, Deleter<lory_text, lory_text_free>> owner(&text);
    return std::string(text.data, text.len);
}

inline std::vector<float> take(lory_floats &floats) {
    std::unique_ptr<lory_floats, Deleter<lory_floats, lory_floats_free>> owner(&floats);
    return std::vector<float>(floats.data, floats.data + floats.len);
}

inline std::vector<uint32_t> take(lory_tokens &tokens) {
    std::unique_ptr<lory_tokens, Deleter<lory_tokens, lory_tokens_free>> owner(&tokens);
    return std::vector<uint32_t>(tokens.data, tokens.data + tokens.len);
}

/** Keeps what a callback threw until the library has returned. */
class Caught {
  public:
    /** What `call` returns, or `otherwise` if it throws. */
    template <class R, class F> R run(R otherwise, F &&call) noexcept {
        try {
            return call();
        } catch (...) {
            thrown_ = std::current_exception();
            return otherwise;
        }
    }
    /** Throws what was caught, or else what `status` says. */
    void check(lory_status status) const {
        if (thrown_) std::rethrow_exception(thrown_);
        lory::check(status);
    }

  private:
    std::exception_ptr thrown_;
};

} // namespace detail

using EngineOptions = detail::Options<lory_engine_options, lory_engine_options_init>;
using SamplerOptions = detail::Options<lory_sampler_options, lory_sampler_options_init>;
using ModelInfo = detail::Options<lory_model_info, lory_model_info_init>;
using Metrics = detail::Options<lory_metrics, lory_metrics_init>;
using Stats = detail::Options<lory_stats, lory_stats_init>;

/** Always the most likely token. */
inline SamplerOptions greedy() {
    SamplerOptions options;
    options.temp = 0;
    return options;
}

/** An adapter and its weight. */
struct Scaled {
    lory_adapter id = 0;
    float scale = 1;
};

/** A message of a conversation. */
struct Message {
    std::string role;
    std::string content;
};

/** What answers must match; made by Engine::grammar, shareable. */
class Grammar {
  public:
    /** For calls of lory.h. */
    const lory_grammar *get() const { return handle_.get(); }

  private:
    friend class Engine;
    explicit Grammar(lory_grammar *handle) : handle_(handle, lory_grammar_free) {}
    std::shared_ptr<lory_grammar> handle_;
};

/** What a session is asked for. */
struct Request {
    std::vector<uint32_t> tokens;
    size_t max_new_tokens = 256;
    SamplerOptions sampler;
    std::vector<std::string> stop;
    bool ignore_eos = false;
    bool prompt_logits = false;
    int32_t prompt_logprobs = -1;
    lory_hidden hidden = LORY_HIDDEN_NONE;
    std::optional<Grammar> grammar;
    /** Events that may wait for their reader. */
    size_t max_queued = 256;
};

/** What is known about an adapter. */
struct AdapterInfo {
    std::string name;
    std::string origin;
    uint64_t bytes = 0;
    bool in_pack = false;
    bool loaded = false;
    /** Which loading the name means now; 0 if it was never asked for. */
    lory_adapter id = 0;
    /** Requests that used this loading, and sessions that have it now. */
    uint64_t uses = 0;
    uint64_t sessions = 0;
    /** Tokens that switch it on; empty for an adapter that always works, and until it has been brought in. */
    std::vector<uint32_t> invocation;
};

/** Ends a generation from anywhere, whether that still exists or not. */
class Canceller {
  public:
    void cancel() const { check(lory_canceller_cancel(handle_.get())); }

  private:
    friend class Generation;
    explicit Canceller(lory_canceller *handle) : handle_(handle) {}
    detail::Handle<lory_canceller, lory_canceller_free> handle_;
};

/** A running request: an input range of its events. */
class Generation {
  public:
    /** The next event, with steps run as needed; the last one is of kind LORY_EVENT_END. Its
        pointers are valid until the next call. */
    const lory_event &next() {
        check(lory_generation_next(handle_.get(), &event_));
        return event_;
    }

    /** The next event if it is there already; nothing is run. */
    const lory_event *poll() {
        check(lory_generation_poll(handle_.get(), &event_));
        return event_.kind == LORY_EVENT_NONE ? nullptr : &event_;
    }

    /** Runs to the end; `on_event` returns false to cancel, and may throw. */
    template <class F> lory_finish_reason run(F &&on_event) {
        struct State {
            F &call;
            detail::Caught caught;
        } state{on_event, {}};
        auto thunk = [](void *user, const lory_event *event) -> int32_t {
            auto *state = static_cast<State *>(user);
            return state->caught.run(1, [&] { return state->call(*event) ? 0 : 1; });
        };
        lory_finish_reason reason = LORY_FINISH_NONE;
        state.caught.check(lory_generation_run(handle_.get(), thunk, &state, &reason));
        return reason;
    }

    /** Runs to the end; the whole text. */
    std::string text() {
        lory_text text{};
        check(lory_generation_text(handle_.get(), &text));
        return detail::take(text);
    }

    /** Ends it before its next step; from any thread. */
    void cancel() const { check(lory_generation_cancel(handle_.get())); }

    Canceller canceller() const {
        lory_canceller *canceller = nullptr;
        check(lory_generation_canceller(handle_.get(), &canceller));
        return Canceller(canceller);
    }

    Stats stats() {
        Stats stats;
        check(lory_generation_stats(handle_.get(), &stats));
        return stats;
    }

    /** Why it ended, once its last event has been seen. */
    lory_finish_reason finish_reason() const { return event_.finish_reason; }

    /** For calls of lory.h. */
    lory_generation *get() const { return handle_.get(); }

    /** Waits until one of several generations of one engine has an event, with steps run as needed, and
        returns which; its event is `event()`. Those that have ended are passed over; nothing if all have.
        Throws GenerationError for one that ends with an error. */
    static std::optional<size_t> next_of(const std::vector<Generation *> &generations) {
        std::vector<lory_generation *> handles;
        for (const Generation *g : generations) handles.push_back(g->get());
        size_t index = handles.size();
        detail::Options<lory_event, lory_event_init> event;
        lory_status status = lory_generations_next(handles.data(), handles.size(), &index, &event);
        if (status != LORY_OK && index < handles.size()) throw GenerationError(status, index);
        check(status);
        if (index == handles.size()) return std::nullopt;
        generations[index]->event_ = event;
        return index;
    }

    /** The event that came last; its pointers are valid until the next call. */
    const lory_event &event() const { return event_; }

    /** Events until the end. */
    class Iterator {
      public:
        using iterator_category = std::input_iterator_tag;
        using value_type = lory_event;
        using difference_type = std::ptrdiff_t;
        using pointer = const lory_event *;
        using reference = const lory_event &;

        Iterator() = default;
        explicit Iterator(Generation *generation) : generation_(generation) { ++*this; }
        reference operator*() const { return generation_->event_; }
        pointer operator->() const { return &generation_->event_; }
        Iterator &operator++() {
            if (generation_->next().kind == LORY_EVENT_END) generation_ = nullptr;
            return *this;
        }
        void operator++(int) { ++*this; }
        bool operator==(const Iterator &other) const { return generation_ == other.generation_; }
        bool operator!=(const Iterator &other) const { return !(*this == other); }

      private:
        Generation *generation_ = nullptr;
    };

    Iterator begin() { return Iterator(this); }
    Iterator end() { return Iterator(); }

  private:
    friend class Session;
    explicit Generation(lory_generation *handle) : handle_(handle) {}
    detail::Handle<lory_generation, lory_generation_free> handle_;
    detail::Options<lory_event, lory_event_init> event_;
};

/** An adapter of a session. */
struct SessionAdapter {
    lory_adapter id;
    std::string name;
    float scale;
    bool works;
    size_t works_from;
};

/** The text of an event. */
inline std::string_view text(const lory_event &event) { return detail::view(event.text); }

/** A conversation. */
class Session {
  public:
    /** Appends the request's tokens and starts to answer. */
    Generation generate(const Request &request) {
        std::vector<lory_str> stop;
        for (const std::string &text : request.stop) stop.push_back(detail::str(text));
        detail::Options<lory_request, lory_request_init> r;
        r.tokens = request.tokens.data();
        r.n_tokens = request.tokens.size();
        r.max_new_tokens = request.max_new_tokens;
        r.sampler = &request.sampler;
        r.stop = stop.data();
        r.n_stop = stop.size();
        r.ignore_eos = request.ignore_eos;
        r.prompt_logits = request.prompt_logits;
        r.prompt_logprobs = request.prompt_logprobs;
        r.hidden = request.hidden;
        r.grammar = request.grammar ? request.grammar->get() : nullptr;
        r.max_queued = request.max_queued;
        lory_generation *generation = nullptr;
        check(lory_session_generate(handle_.get(), &r, &generation));
        return Generation(generation);
    }

    std::vector<uint32_t> tokens() {
        lory_tokens tokens{};
        check(lory_session_tokens(handle_.get(), &tokens));
        return detail::take(tokens);
    }

    size_t cached_tokens() {
        size_t n = 0;
        check(lory_session_cached_tokens(handle_.get(), &n));
        return n;
    }

    bool is_mixed() {
        int32_t mixed = 0;
        check(lory_session_is_mixed(handle_.get(), &mixed));
        return mixed != 0;
    }

    void set_adapters(const std::vector<Scaled> &adapters,
                      lory_on_switch on_switch = LORY_ON_SWITCH_RECOMPUTE) {
        auto set = c_adapters(adapters);
        check(lory_session_set_adapters(handle_.get(), set.data(), set.size(), on_switch));
    }

    /** The adapters that the session has now; where one waits for its invocation tokens, it does not work. */
    std::vector<SessionAdapter> adapters() {
        lory_session_adapters *raw = nullptr;
        check(lory_session_adapters_new(handle_.get(), &raw));
        detail::Handle<lory_session_adapters, lory_session_adapters_free> list(raw);
        std::vector<SessionAdapter> adapters;
        detail::Options<lory_session_adapter, lory_session_adapter_init> a;
        for (size_t i = 0; i < lory_session_adapters_len(raw); i++) {
            check(lory_session_adapters_get(raw, i, &a));
            adapters.push_back(
                SessionAdapter{a.id, std::string(detail::view(a.name)), a.scale, a.works != 0, a.works_from});
        }
        return adapters;
    }

    void rewind(size_t n_tokens) { check(lory_session_rewind(handle_.get(), n_tokens)); }

    /** Rewinds to where the conversation and `tokens` part; how many they have in common. */
    size_t rewind_to_common(const std::vector<uint32_t> &tokens) {
        size_t kept = 0;
        check(lory_session_rewind_to_common(handle_.get(), tokens.data(), tokens.size(), &kept));
        return kept;
    }

    void set_priority(int32_t priority) { check(lory_session_set_priority(handle_.get(), priority)); }

    /** The embedding of a text, of length 1; one after the other with LORY_POOLING_NONE. */
    std::vector<float> embed(const std::vector<uint32_t> &tokens, lory_pooling pooling = LORY_POOLING_MEAN) {
        lory_floats vectors{};
        check(lory_session_embed(handle_.get(), tokens.data(), tokens.size(), pooling, 1, &vectors));
        return detail::take(vectors);
    }

    /** The log-probability of each token of each continuation. */
    std::vector<std::vector<float>> score(const std::vector<uint32_t> &prompt,
                                          const std::vector<std::vector<uint32_t>> &continuations) {
        std::vector<lory_token_span> spans;
        for (const auto &c : continuations) spans.push_back(lory_token_span{c.data(), c.size()});
        lory_floats flat{};
        check(lory_session_score(handle_.get(), prompt.data(), prompt.size(), spans.data(), spans.size(), &flat));
        std::vector<float> all = detail::take(flat);
        std::vector<std::vector<float>> scores;
        auto at = all.begin();
        for (const auto &c : continuations) {
            scores.emplace_back(at, at + static_cast<std::ptrdiff_t>(c.size()));
            at += static_cast<std::ptrdiff_t>(c.size());
        }
        return scores;
    }

    /** Saves the session; the file appears whole or not at all. */
    void save(std::string_view path) { check(lory_session_save(handle_.get(), path.data(), path.size())); }

    /** The same into memory. */
    std::string save() {
        lory_text bytes{};
        check(lory_session_save_memory(handle_.get(), &bytes));
        return detail::take(bytes);
    }

    Session fork() {
        lory_session *fork = nullptr;
        check(lory_session_fork(handle_.get(), &fork));
        return Session(fork);
    }

    /** For calls of lory.h. */
    lory_session *get() const { return handle_.get(); }

  private:
    friend class Engine;
    explicit Session(lory_session *handle) : handle_(handle) {}

    static std::vector<lory_adapter_scale> c_adapters(const std::vector<Scaled> &adapters) {
        std::vector<lory_adapter_scale> set;
        for (const Scaled &a : adapters) set.push_back(lory_adapter_scale{a.id, a.scale, 0});
        return set;
    }

    detail::Handle<lory_session, lory_session_free> handle_;
};

/** A stream of tokens to text. */
class Detokenizer {
  public:
    /** The text that `token` completes; valid until the next call. */
    std::string_view push(uint32_t token) {
        lory_str text{};
        check(lory_detokenizer_push(handle_.get(), token, &text));
        return detail::view(text);
    }

    /** What is left of an incomplete character. */
    std::string_view finish() {
        lory_str text{};
        check(lory_detokenizer_finish(handle_.get(), &text));
        return detail::view(text);
    }

  private:
    friend class Engine;
    explicit Detokenizer(lory_detokenizer *handle) : handle_(handle) {}
    detail::Handle<lory_detokenizer, lory_detokenizer_free> handle_;
};

/** A model, its adapters and its KV cache; const members may be called from many threads. */
class Engine {
  public:
    static Engine open(std::string_view path, const EngineOptions &options = {}) {
        lory_engine *engine = nullptr;
        check(lory_engine_open(path.data(), path.size(), &options, &engine));
        return Engine(engine);
    }

    static Engine open_fd(int fd, std::string_view name, const EngineOptions &options = {}) {
        lory_engine *engine = nullptr;
        check(lory_engine_open_fd(fd, name.data(), name.size(), &options, &engine));
        return Engine(engine);
    }

    /** Over a copy of `size` bytes at `data`. */
    static Engine open_copy(const void *data, size_t size, std::string_view name,
                            const EngineOptions &options = {}) {
        lory_engine *engine = nullptr;
        check(lory_engine_open_memory(data, size, name.data(), name.size(), nullptr, nullptr, &options, &engine));
        return Engine(engine);
    }

    /** Over bytes that are shared with the engine and all that comes from it; nothing is copied. */
    static Engine open_shared(std::shared_ptr<const std::vector<char>> bytes, std::string_view name,
                              const EngineOptions &options = {}) {
        using Owner = std::shared_ptr<const std::vector<char>>;
        auto owner = std::make_unique<Owner>(std::move(bytes));
        auto release = [](void *user, const void *, size_t) { delete static_cast<Owner *>(user); };
        lory_engine *engine = nullptr;
        const char *data = (*owner)->data();
        size_t size = (*owner)->size();
        lory_status status = lory_engine_open_memory(data, size, name.data(), name.size(), release,
                                                     owner.get(), &options, &engine);
        owner.release(); // by now or later freed by `release`, whatever happened
        check(status);
        return Engine(engine);
    }

    /** Over `size` bytes that `read(offset, buffer, length)` puts into the buffer; it returns how
        many, and may throw. */
    template <class F>
    static Engine open_reader(F &&read, uint64_t size, std::string_view name, const EngineOptions &options = {}) {
        struct State {
            F &call;
            detail::Caught caught;
        } state{read, {}};
        auto thunk = [](void *user, uint64_t offset, void *buffer, size_t length) -> int64_t {
            auto *state = static_cast<State *>(user);
            return state->caught.run(int64_t(-1), [&] { return int64_t(state->call(offset, buffer, length)); });
        };
        lory_engine *engine = nullptr;
        state.caught.check(
            lory_engine_open_callback(thunk, &state, size, name.data(), name.size(), &options, &engine));
        return Engine(engine);
    }

    Session session(const std::vector<Scaled> &adapters = {}, int32_t priority = 0) const {
        auto set = Session::c_adapters(adapters);
        SessionOptions options = session_options(set);
        options.priority = priority;
        lory_session *session = nullptr;
        check(lory_session_new(handle_.get(), &options, &session));
        return Session(session);
    }

    /** A session that was saved, with the adapters that it had. */
    Session restore(std::string_view path, const std::vector<Scaled> &adapters = {}) const {
        auto set = Session::c_adapters(adapters);
        SessionOptions options = session_options(set);
        lory_session *session = nullptr;
        check(lory_session_restore(handle_.get(), path.data(), path.size(), &options, &session));
        return Session(session);
    }

    /** The same from the `size` bytes that Session::save() gave. */
    Session restore(const void *data, size_t size, const std::vector<Scaled> &adapters = {}) const {
        auto set = Session::c_adapters(adapters);
        SessionOptions options = session_options(set);
        lory_session *session = nullptr;
        check(lory_session_restore_memory(handle_.get(), data, size, &options, &session));
        return Session(session);
    }

    std::vector<uint32_t> tokenize(std::string_view text,
                                   lory_token_flags flags = LORY_ADD_SPECIAL | LORY_PARSE_SPECIAL) const {
        lory_tokens tokens{};
        check(lory_tokenize(handle_.get(), text.data(), text.size(), flags, &tokens));
        return detail::take(tokens);
    }

    std::string detokenize(const std::vector<uint32_t> &tokens, lory_token_flags flags = 0) const {
        lory_text text{};
        check(lory_detokenize(handle_.get(), tokens.data(), tokens.size(), flags, &text));
        return detail::take(text);
    }

    /** The bytes that a token adds to a text; not always whole characters. */
    std::string token_bytes(uint32_t token) const {
        lory_text bytes{};
        check(lory_token_bytes(handle_.get(), token, &bytes));
        return detail::take(bytes);
    }

    /** The token with a role; nothing if the vocabulary has none. */
    std::optional<uint32_t> special_token(lory_token_role role) const {
        uint32_t token = 0;
        lory_status status = lory_token_special(handle_.get(), role, &token);
        if (status == LORY_E_NOT_FOUND) return std::nullopt;
        check(status);
        return token;
    }

    /** Whether generations end with this token. */
    bool ends(uint32_t token) const {
        int32_t ends = 0;
        check(lory_token_is_end(handle_.get(), token, &ends));
        return ends != 0;
    }

    Detokenizer detokenizer(lory_token_flags flags = 0) const {
        lory_detokenizer *detokenizer = nullptr;
        check(lory_detokenizer_new(handle_.get(), flags, &detokenizer));
        return Detokenizer(detokenizer);
    }

    /** The prompt for an answer to these messages; `template_source` empty takes the model's template. */
    std::string chat(const std::vector<Message> &messages, std::string_view template_source = {}) const {
        std::vector<lory_chat_message> list;
        for (const Message &m : messages) {
            list.push_back(lory_chat_message{detail::str(m.role), detail::str(m.content)});
        }
        detail::Options<lory_chat_options, lory_chat_options_init> options;
        options.messages = list.data();
        options.n_messages = list.size();
        options.template_source = detail::str(template_source);
        lory_text text{};
        check(lory_chat_render(handle_.get(), &options, &text));
        return detail::take(text);
    }

    /** Compiles a grammar: LORY_GRAMMAR_GBNF or LORY_GRAMMAR_JSON_SCHEMA. */
    Grammar grammar(lory_grammar_kind kind, std::string_view source) const {
        lory_grammar *grammar = nullptr;
        check(lory_grammar_new(handle_.get(), kind, source.data(), source.size(), &grammar));
        return Grammar(grammar);
    }

    lory_adapter load_adapter(std::string_view path, std::string_view name = {}) const {
        lory_adapter id = 0;
        check(lory_adapter_load(handle_.get(), path.data(), path.size(), name.data(), name.size(), &id));
        return id;
    }

    lory_adapter replace_adapter(std::string_view path, std::string_view name = {}) const {
        lory_adapter id = 0;
        check(lory_adapter_replace(handle_.get(), path.data(), path.size(), name.data(), name.size(), &id));
        return id;
    }

    /** A GGUF LoRA of `size` bytes at `data`, which are copied; `replace` takes a name that is there already. */
    lory_adapter load_adapter_copy(const void *data, size_t size, std::string_view name, bool replace = false) const {
        lory_adapter id = 0;
        check(lory_adapter_load_memory(handle_.get(), data, size, name.data(), name.size(), replace, &id));
        return id;
    }

    size_t open_pack(std::string_view path) const {
        size_t n = 0;
        check(lory_adapter_open_pack(handle_.get(), path.data(), path.size(), &n));
        return n;
    }

    /** Opens a pack again with what was added, replaced and removed since; sessions keep what they have. */
    size_t reopen_pack(std::string_view path) const {
        size_t n = 0;
        check(lory_adapter_reopen_pack(handle_.get(), path.data(), path.size(), &n));
        return n;
    }

    /** Takes a pack and its names out of the engine; sessions keep what they have. */
    void close_pack(std::string_view path) const {
        check(lory_adapter_close_pack(handle_.get(), path.data(), path.size()));
    }

    /** Bytes that adapters may have for themselves; 0 sets no limit. */
    void set_adapter_budget(uint64_t bytes) const { check(lory_adapter_set_budget(handle_.get(), bytes)); }

    lory_adapter adapter(std::string_view name) const {
        lory_adapter id = 0;
        check(lory_adapter_resolve(handle_.get(), name.data(), name.size(), &id));
        return id;
    }

    /** Brings adapters of packs in ahead of their first use; their bytes. */
    size_t prefetch_adapters(const std::vector<std::string> &names) const {
        std::vector<lory_str> list;
        for (const std::string &name : names) list.push_back(detail::str(name));
        size_t bytes = 0;
        check(lory_adapter_prefetch(handle_.get(), list.data(), list.size(), &bytes));
        return bytes;
    }

    void unload_adapter(std::string_view name) const {
        check(lory_adapter_unload(handle_.get(), name.data(), name.size()));
    }

    std::vector<AdapterInfo> adapters() const {
        lory_adapter_list *raw = nullptr;
        check(lory_adapter_list_new(handle_.get(), &raw));
        detail::Handle<lory_adapter_list, lory_adapter_list_free> list(raw);
        std::vector<AdapterInfo> infos;
        detail::Options<lory_adapter_info, lory_adapter_info_init> info;
        for (size_t i = 0; i < lory_adapter_list_len(raw); i++) {
            check(lory_adapter_list_get(raw, i, &info));
            infos.push_back(AdapterInfo{std::string(detail::view(info.name)), std::string(detail::view(info.origin)),
                                        info.bytes, info.in_pack != 0, info.loaded != 0, info.id, info.uses,
                                        info.sessions,
                                        std::vector<uint32_t>(info.invocation.data,
                                                              info.invocation.data + info.invocation.len)});
        }
        return infos;
    }

    ModelInfo model_info() const {
        ModelInfo info;
        check(lory_engine_model_info(handle_.get(), &info));
        return info;
    }

    Metrics metrics() const {
        Metrics metrics;
        check(lory_engine_metrics(handle_.get(), &metrics));
        return metrics;
    }

    std::string device() const {
        lory_text text{};
        check(lory_engine_device(handle_.get(), &text));
        return detail::take(text);
    }

    /** A key of the model file; nothing if it has none. */
    std::optional<std::string> metadata(std::string_view key) const {
        lory_text text{};
        lory_status status = lory_engine_metadata(handle_.get(), key.data(), key.size(), &text);
        if (status == LORY_E_NOT_FOUND) return std::nullopt;
        check(status);
        return detail::take(text);
    }

    /** Runs one step for all sessions; whether there was one to run. */
    bool step() const {
        int32_t ran = 0;
        check(lory_engine_step(handle_.get(), &ran));
        return ran != 0;
    }

    /** Runs steps on this thread until `go_on` returns false; it may throw. */
    template <class F> void drive(F &&go_on) const {
        struct State {
            F &call;
            detail::Caught caught;
        } state{go_on, {}};
        auto thunk = [](void *user) -> int32_t {
            auto *state = static_cast<State *>(user);
            return state->caught.run(0, [&] { return state->call() ? 1 : 0; });
        };
        state.caught.check(lory_engine_drive(handle_.get(), thunk, &state));
    }

    void wake_drivers() const { check(lory_engine_wake_drivers(handle_.get())); }

    /** Metrics in Prometheus' text format. */
    std::string prometheus() const {
        lory_text text{};
        check(lory_engine_prometheus(handle_.get(), &text));
        return detail::take(text);
    }

    /** For calls of lory.h. */
    const lory_engine *get() const { return handle_.get(); }

  private:
    using SessionOptions = detail::Options<lory_session_options, lory_session_options_init>;

    explicit Engine(lory_engine *handle) : handle_(handle) {}

    /** With a set that outlives them. */
    static SessionOptions session_options(const std::vector<lory_adapter_scale> &set) {
        SessionOptions options;
        options.adapters = set.data();
        options.n_adapters = set.size();
        return options;
    }

    detail::Handle<lory_engine, lory_engine_free> handle_;
};

} // namespace lory

#endif /* LORY_HPP */
