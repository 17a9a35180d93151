// cpp_wrapper MODEL LORA PACK: what lory.hpp adds to lory.h. Compiled and run by cpp_wrapper.rs.
#include <fstream>
#include <iostream>
#include <iterator>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "lory.hpp"

static int parts = 0;

static void holds(bool condition, const char *what) {
    if (!condition) throw std::runtime_error(std::string("does not hold: ") + what);
    parts++;
}

/** The status with which a call fails. */
template <class F> static lory_status status_of(F &&call) {
    try {
        call();
    } catch (const lory::Error &e) {
        return e.status();
    }
    return LORY_OK;
}

static lory::Request request(const lory::Engine &engine, const std::string &prompt, size_t tokens) {
    lory::Request request;
    request.tokens = engine.tokenize(prompt);
    request.max_new_tokens = tokens;
    request.sampler = lory::greedy();
    request.ignore_eos = true;
    return request;
}

int main(int, char **argv) try {
    const std::string model = argv[1], lora = argv[2], pack = argv[3];
    holds(lory::abi_matches() && !lory::version().empty() && lory::status_name(LORY_E_IO) == "LORY_E_IO", "the library");
    lory::Engine engine = lory::Engine::open(model);

    // Tokens.
    std::optional<uint32_t> end = engine.special_token(LORY_TOKEN_EOS);
    const uint32_t first = engine.tokenize("Once", 0).at(0);
    holds(end && engine.ends(*end) && !engine.ends(first), "the end of a text");
    holds(!engine.token_bytes(first).empty() &&
              status_of([&] { engine.token_bytes(UINT32_MAX); }) == LORY_E_NOT_FOUND,
          "bytes of a token");

    // An adapter from memory.
    std::ifstream file(lora, std::ios::binary);
    const std::string bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    const lory_adapter once = engine.load_adapter_copy(bytes.data(), bytes.size(), "own");
    const bool taken = status_of([&] { engine.load_adapter_copy(bytes.data(), bytes.size(), "own"); }) != LORY_OK;
    const lory_adapter again = engine.load_adapter_copy(bytes.data(), bytes.size(), "own", true);
    holds(taken && once != again && engine.adapter("own") == again, "an adapter in memory");

    // A pack, and a budget.
    const size_t n = engine.open_pack(pack);
    holds(n == 3 && engine.reopen_pack(pack) == 3, "a pack");
    engine.set_adapter_budget(1);
    holds(status_of([&] { engine.session({{engine.adapter("synth-00000"), 1}}); }) == LORY_E_ADAPTER_BUDGET, "a budget");
    engine.set_adapter_budget(0);
    engine.session({{engine.adapter("synth-00000"), 1}});
    engine.close_pack(pack);
    holds(status_of([&] { engine.adapter("synth-00001"); }) == LORY_E_NOT_FOUND, "a closed pack");

    // A session that was saved goes on as the one that it was.
    const std::vector<lory::Scaled> set = {{again, 0.5f}};
    lory::Session session = engine.session(set);
    session.generate(request(engine, "Once upon", 4)).text();
    const std::string saved = session.save();
    lory::Session restored = engine.restore(saved.data(), saved.size(), set);
    const std::string one = session.generate(request(engine, " and", 6)).text();
    const std::string other = restored.generate(request(engine, " and", 6)).text();
    holds(!one.empty() && one == other, "a session in memory");
    holds(status_of([&] { engine.restore(saved.data(), saved.size() / 2, set); }) != LORY_OK, "half of one");

    // Several generations, whichever is first.
    std::vector<lory::Session> sessions;
    std::vector<lory::Generation> generations;
    for (const char *prompt : {"Ann", "Bob"}) {
        sessions.push_back(engine.session());
        generations.push_back(sessions.back().generate(request(engine, prompt, 5)));
    }
    std::vector<lory::Generation *> all;
    for (lory::Generation &g : generations) all.push_back(&g);
    std::vector<std::string> said(all.size());
    size_t ended = 0;
    while (std::optional<size_t> i = lory::Generation::next_of(all)) {
        const lory_event &event = all[*i]->event();
        said[*i] += lory::text(event);
        ended += event.kind == LORY_EVENT_END;
    }
    holds(ended == 2 && said[0] == engine.session().generate(request(engine, "Ann", 5)).text() && !said[1].empty(),
          "several generations");

    // One that ends with an error, and which it was.
    lory::EngineOptions narrow;
    narrow.kv_policy = LORY_KV_REFUSE;
    narrow.kv_tokens = 32;
    lory::Engine small = lory::Engine::open(model, narrow);
    lory::Session fits = small.session(), grows = small.session();
    lory::Request queued = request(small, "Ann", 1);
    queued.max_queued = 1;
    lory::Request long_one = request(small, "Bob", 1);
    long_one.tokens.resize(60, long_one.tokens.front());
    lory::Generation first_one = fits.generate(queued), second_one = grows.generate(long_one);
    std::optional<size_t> failed;
    try {
        while (lory::Generation::next_of({&first_one, &second_one})) {
        }
    } catch (const lory::GenerationError &e) {
        if (e.status() == LORY_E_KV_FULL) failed = e.index();
    }
    holds(failed == size_t(1), "which generation failed");

    lory::Session drawn = engine.session();
    lory::Request seeded = request(engine, "Ann", 1);
    seeded.sampler.has_seed = 1;
    seeded.sampler.seed = 7;
    holds(drawn.generate(seeded).stats().seed == 7, "the seed in use");

    const std::vector<lory::AdapterInfo> infos = engine.adapters();
    holds(infos.size() == 1 && infos[0].id == again && infos[0].uses == 3 && infos[0].sessions == 2 &&
              infos[0].invocation.empty(),
          "what is known about an adapter");

    std::cout << parts << " parts hold" << std::endl;
    return 0;
} catch (const std::exception &e) {
    std::cout << e.what() << std::endl;
    return 1;
}
