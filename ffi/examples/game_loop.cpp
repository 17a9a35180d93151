// game_loop MODEL: a host with its own time. Each frame gives the engine a slice: it steps until the
// slice is spent, and characters say what has become certain.
#include <chrono>
#include <iostream>
#include <string>
#include <vector>

#include "lory.hpp"

struct Character {
    std::string name;
    lory::Session session;
    lory::Generation speech;
    std::string said;
    bool done;
};

static Character character(const lory::Engine &engine, const std::string &name) {
    lory::Session session = engine.session();
    lory::Request request;
    request.tokens = engine.tokenize(name + " says");
    request.max_new_tokens = 24;
    lory::Generation speech = session.generate(request);
    return Character{name, std::move(session), std::move(speech), "", false};
}

int main(int argc, char **argv) try {
    if (argc != 2) {
        std::cerr << "usage: game_loop MODEL\n";
        return 2;
    }
    lory::EngineOptions options;
    options.n_batch = 16; // a bound on how long one step can take
    lory::Engine engine = lory::Engine::open(argv[1], options);
    std::vector<Character> cast;
    for (const char *name : {"Ann", "Bob", "Cid"}) cast.push_back(character(engine, name));

    const auto slice = std::chrono::milliseconds(4);
    int frames = 0;
    for (size_t speaking = cast.size(); speaking > 0; frames++) {
        // draw(); physics(); then what is left of the frame:
        const auto until = std::chrono::steady_clock::now() + slice;
        while (engine.step() && std::chrono::steady_clock::now() < until) {
        }
        for (Character &c : cast) {
            while (!c.done) {
                const lory_event *event = c.speech.poll();
                if (!event) break;
                c.said += lory::text(*event);
                c.done = event->kind == LORY_EVENT_END;
                speaking -= c.done;
            }
        }
    }
    for (const Character &c : cast) std::cout << c.name << " says" << c.said << "\n";
    std::cerr << frames << " frames\n";
    return 0;
} catch (const lory::Error &e) {
    std::cerr << lory_status_name(e.status()) << ": " << e.what() << "\n";
    return 1;
}
