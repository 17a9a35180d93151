#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU: results, speed, memory and races.
#
#   kernels/src/cuda/check.sh                  builds the programs and runs them
#   kernels/src/cuda/check.sh --build FOLDER   builds them into a folder, for a machine without Rust
#   kernels/src/cuda/check.sh --with FOLDER    runs those, in a copy of the repository
#
# Needs a driver; compute-sanitizer (of the CUDA toolkit) where it is found. The tests' own output says which device
# they ran on; on the emulated driver this script fails. Speed is measured with random models that are made first, of the shapes
# in LORY_CHECK_SHAPES (llama-1b llama-8b) and formats in LORY_CHECK_TYPES (Q4_K_M Q8_0 BF16), in LORY_CHECK_ROOM
# (a temporary folder; 16 GB for the largest). Every step runs, also after one that failed; the last line counts those.
set -euo pipefail
cd "$(dirname "$0")/../../.."

failures=0
step() {
    printf '\n== %s\n' "$1"
    shift
    local start=$SECONDS
    "$@" || { printf '== failed: %s\n' "$*"; failures=$((failures + 1)); }
    printf '== %s s\n' $((SECONDS - start))
}

executable() {
    cargo test --release --locked "$@" --no-run --message-format=json |
        sed -n 's/.*"executable":"\([^"]*cuda-[^"]*\)".*/\1/p' | tail -n 1
}

build() {
    mkdir -p "$1"
    local kernels models
    kernels=$(executable -p lory-kernels --test cuda)
    models=$(executable -p lory-runtime --test cuda)
    cargo build --release --locked -p lory --no-default-features
    strip -o "$1/kernels" "$kernels"
    strip -o "$1/models" "$models"
    strip -o "$1/lory" "$(cargo metadata --no-deps --format-version 1 |
        sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p')/release/lory"
}

# One model: a prompt, a sequence, batches; and, if asked for, with an adapter for each sequence.
speed() {
    local lory=$1 shape=$2 type=$3 adapters=$4
    local model=$room/model.gguf pack=$room/pack.gguf
    "$lory" synth model "$shape" --type "$type" -o "$model" >/dev/null &&
        "$lory" bench --device cuda -m "$model" -p 512 -n 128 -r 3 &&
        "$lory" bench --device cuda -m "$model" -p 0 -n 0 -npp 16 -ntg 32 -npl 8,32,256 -r 2 &&
        if [ "$adapters" = yes ]; then
            "$lory" synth pack -m "$model" --adapters 1000 --rank 64 -o "$pack" >/dev/null &&
                "$lory" bench --device cuda -m "$model" --pack "$pack" --adapter-dist distinct \
                    -p 0 -n 64 -npp 16 -ntg 32 -npl 8,32,256 -r 2
        fi
    local result=$?
    rm -f "$model" "$pack"
    return "$result"
}

case ${1-} in
--build)
    build "${2:?a folder}"
    exit
    ;;
--with) programs=${2:?a folder} ;;
'')
    programs=$(mktemp -d)
    trap 'rm -rf "$programs"' EXIT
    build "$programs"
    ;;
*)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac

export LORY_REQUIRE_CUDA=1 LORY_REPOSITORY=$PWD
step "the device" nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
step "every operation against the reference" "$programs/kernels" --test-threads 1
step "whole models" "$programs/models"

room=$(mktemp -d -p "${LORY_CHECK_ROOM:-${TMPDIR:-/tmp}}")
trap 'rm -rf "$room"; [ -n "${1-}" ] || rm -rf "$programs"' EXIT
for shape in ${LORY_CHECK_SHAPES:-llama-1b llama-8b}; do
    adapters=yes
    for type in ${LORY_CHECK_TYPES:-Q4_K_M Q8_0 BF16}; do
        step "speed of $shape in $type" speed "$programs/lory" "$shape" "$type" "$adapters"
        adapters=no
    done
done

if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck synccheck initcheck; do
        step "compute-sanitizer $tool" \
            compute-sanitizer --tool "$tool" --error-exitcode 1 "$programs/kernels" --test-threads 1
    done
else
    printf '\n== skipped: compute-sanitizer is not on the path\n'
fi
printf '\n== %s steps failed\n' "$failures"
[ "$failures" = 0 ]
