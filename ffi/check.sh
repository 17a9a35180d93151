#!/usr/bin/env bash
# Builds the examples out of the relocatable folder and runs them on the fixtures: against the shared
# and the static library, under AddressSanitizer with UndefinedBehaviorSanitizer, and under valgrind.
# Needs cmake, a C and C++ compiler with sanitizers, and valgrind.
#
#   ffi/check.sh [PROFILE [CARGO ARGUMENTS…]]      default: dev
set -euo pipefail
cd "$(dirname "$0")/.."

profile=${1:-dev}
shift $(($# < 1 ? $# : 1))
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

fail() {
    printf 'FAILED: %s\n' "$*" >&2
    exit 1
}

ffi/dist.sh "$work/lory" "$profile" "$@"

foreign=$(nm -D --defined-only "$work/lory/lib/liblory.so" | awk '$3 !~ /^lory_/ {print $3}')
[ -z "$foreign" ] || fail "liblory.so exports $foreign"
foreign=$(nm -g --defined-only "$work/lory/lib/liblory.a" 2>/dev/null | awk 'NF == 3 && $3 !~ /^lory_/ {print $3}')
[ -z "$foreign" ] || fail "liblory.a exports $foreign"

fixtures=$PWD/tests/fixtures
model=$fixtures/models/llama.gguf

# run NAME FOLDER LAUNCHER…: every example, with what it must print where that is certain.
run() {
    local name=$1 build=$2
    shift 2
    one() {
        local want=$1 program=$2
        shift 2
        "${launcher[@]}" "$build/$program" "$@" >"$work/out" 2>"$work/err" </dev/stdin ||
            { cat "$work/err" >&2; fail "$name: $program $*"; }
        grep -aq -- "$want" "$work/out" || { cat "$work/out" >&2; fail "$name: $program does not print $want"; }
        printf '%s: %s\n' "$name" "$program"
    }
    local launcher=("$@")
    one Once complete "$model" Once
    one 'untie unlock unfold$' complete demo/base.gguf 'each un_: tie lock fold<|sep|>'
    printf 'Hello\nAgain\n' | one . chat "$model"
    one '^200 adapters' adapters "$model" 200 "$fixtures/lora/attn.gguf" "$fixtures/lora/all.gguf" "$fixtures/peft/lora"
    one '^A small' batch "$model" "$fixtures/lora/all.gguf"
    one 'given up: LORY_E_ABORTED' sources "$model"
    one '^1.000' embed "$model" Once Once 'A small cat'
    one '[1-9][0-9]* answers' hammer "$model" 1 "$fixtures/lora/all.gguf"
    one 'thrown in the callback' cancel "$model"
    one 'Cid says' game_loop "$model"
}

build() {
    local folder=$1
    shift
    cmake -S "$work/lory/share/lory/examples" -B "$folder" -DCMAKE_PREFIX_PATH="$work/lory" "$@" >"$work/log" &&
        cmake --build "$folder" -j 2 >"$work/log" 2>&1 || { cat "$work/log" >&2; fail "building the examples"; }
}

sanitize="-g -fsanitize=address,undefined -fno-sanitize-recover=all"
for static in OFF ON; do
    kind=$([ $static = ON ] && echo static || echo shared)
    build "$work/$kind" -DLORY_STATIC=$static -DCMAKE_C_FLAGS="$sanitize" -DCMAKE_CXX_FLAGS="$sanitize"
    run "$kind, sanitizers" "$work/$kind" env ASAN_OPTIONS=detect_leaks=1:detect_stack_use_after_return=1
done

# Blocks that only an interior pointer reaches ("possibly lost") are the template engine's table of
# functions, made once per process: reference-counted values are held by pointers behind their counts.
build "$work/plain" -DCMAKE_BUILD_TYPE=Debug
run "shared, valgrind" "$work/plain" valgrind --quiet --leak-check=full --show-leak-kinds=definite,indirect \
    --errors-for-leak-kinds=definite,indirect --error-exitcode=99
