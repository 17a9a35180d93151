#!/usr/bin/env bash
# Eight threads do everything at once to one engine, through the C interface and under ThreadSanitizer,
# which must have nothing to say (examples/hammer.c also compares all answers with a lone thread's). The
# library is built with it, and so is Rust's standard library, whose locks would be unknown to it
# otherwise: that takes a nightly toolchain with the component rust-src.
#
#   ffi/race.sh [SECONDS]      default: 60
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=${1:-60}
work=${CARGO_TARGET_DIR:-target}/race
host=$(rustc -vV | sed -n 's/^host: //p')
built=$work/$host/debug
runtime=$(rustc +nightly --print sysroot)/lib/rustlib/$host/lib/librustc-nightly_rt.tsan.a

RUSTFLAGS="-Zsanitizer=thread" cargo +nightly build --quiet --locked -Zbuild-std --target "$host" \
    --target-dir "$work" -p lory-ffi
ln -sf liblory.so "$built/$(readelf -d "$built/liblory.so" | sed -n 's/.*SONAME.*\[\(.*\)\]/\1/p')"

# The runtime is the one that rustc's calls are for, whatever the C compiler.
cc -std=c11 -g -O1 -fsanitize=thread -I ffi/include -c ffi/examples/hammer.c -o "$work/hammer.o"
cc "$work/hammer.o" -o "$work/hammer" -L "$built" -llory -Wl,-rpath,"$built" -rdynamic \
    -Wl,--whole-archive "$runtime" -Wl,--no-whole-archive -lpthread -ldl -lm -lrt
TSAN_OPTIONS="exitcode=66 second_deadlock_stack=1" "$work/hammer" tests/fixtures/models/llama.gguf "$seconds" \
    tests/fixtures/lora/all.gguf
