// c_exceptions WHERE MODEL: throws in a callback. Compiled and run by c_exceptions.rs.
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>

#include "lory.hpp"

struct Thrown : std::runtime_error {
    using std::runtime_error::runtime_error;
};

static lory::Generation start(const lory::Engine &engine, lory::Session &session) {
    lory::Request request;
    request.tokens = engine.tokenize("Once");
    request.max_new_tokens = 8;
    request.ignore_eos = true;
    return session.generate(request);
}

static int32_t raw(void *, const lory_event *) { throw Thrown("out of a C callback"); }

int main(int, char **argv) try {
    const std::string where = argv[1], path = argv[2];
    lory::Engine engine = lory::Engine::open(path);
    lory::Session session = engine.session();
    lory::Generation generation = start(engine, session);
    try {
        if (where == "run") {
            generation.run([](const lory_event &) -> bool { throw Thrown("run"); });
        } else if (where == "drive") {
            engine.drive([]() -> bool { throw Thrown("drive"); });
        } else if (where == "reader") {
            lory::Engine::open_reader(
                [](uint64_t, void *, size_t) -> int64_t { throw Thrown("reader"); }, 4096, "nothing");
        } else if (where == "raw") {
            lory_finish_reason reason = LORY_FINISH_NONE;
            lory::check(lory_generation_run(generation.get(), raw, nullptr, &reason));
        }
    } catch (const Thrown &thrown) {
        std::cout << "caught " << thrown.what() << std::endl;
    }
    // And everything goes on.
    session.rewind(0);
    std::cout << start(engine, session).text().size() << " bytes" << std::endl;
    return 0;
} catch (const std::exception &e) {
    std::cout << "another exception: " << e.what() << std::endl;
    return 1;
}
