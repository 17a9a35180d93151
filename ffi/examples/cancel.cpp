// cancel MODEL: starts an answer, ends it from another thread after some tokens; then shows that an
// exception in a callback comes out where the generation was started.
#include <atomic>
#include <iostream>
#include <stdexcept>
#include <thread>

#include "lory.hpp"

int main(int argc, char **argv) try {
    if (argc != 2) {
        std::cerr << "usage: cancel MODEL\n";
        return 2;
    }
    lory::Engine engine = lory::Engine::open(argv[1]);
    lory::Session session = engine.session();
    lory::Request request;
    request.tokens = engine.tokenize("Once");
    request.max_new_tokens = 100000; // more than the context holds
    request.ignore_eos = true;

    std::atomic<int> tokens{0};
    lory::Generation generation = session.generate(request);
    lory::Canceller canceller = generation.canceller();
    std::thread watcher([&] {
        while (tokens < 5) std::this_thread::yield();
        canceller.cancel();
    });
    for (const lory_event &event : generation) {
        std::cout << lory::text(event) << std::flush;
        if (++tokens == 5) watcher.join(); // so that this example always ends the same way
    }
    std::cout << "\nended after " << tokens << " tokens\n";
    if (generation.finish_reason() != LORY_FINISH_CANCELLED) return 1;

    session.rewind(0);
    generation = session.generate(request);
    try {
        generation.run([](const lory_event &) -> bool { throw std::runtime_error("thrown in the callback"); });
    } catch (const std::runtime_error &e) {
        std::cout << e.what() << "\n";
        return 0;
    }
    return 1;
} catch (const lory::Error &e) {
    std::cerr << lory_status_name(e.status()) << ": " << e.what() << "\n";
    return 1;
}
