#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU: results, memory and races.
#
#   kernels/src/cuda/check.sh
#
# Needs a driver; compute-sanitizer (of the CUDA toolkit) where it is found. The tests' own output says which device
# they ran on; on the emulated driver this script fails.
set -euo pipefail
cd "$(dirname "$0")/../../.."

step() { printf '\n== %s\n' "$*"; }

step "the device"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv

step "building the suite"
binary=$(cargo test --release -p lory-kernels --test cuda --no-run --message-format=json |
    sed -n 's/.*"executable":"\([^"]*cuda-[^"]*\)".*/\1/p' | tail -n 1)
[ -n "$binary" ] || { printf 'no test binary\n' >&2; exit 1; }

step "every operation against the reference"
LORY_REQUIRE_CUDA=1 "$binary" --test-threads 1

step "whole models"
LORY_REQUIRE_CUDA=1 cargo test --release -p lory-runtime --test cuda

if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck synccheck initcheck; do
        step "compute-sanitizer $tool"
        LORY_REQUIRE_CUDA=1 compute-sanitizer --tool "$tool" --error-exitcode 1 "$binary" --test-threads 1
    done
else
    step "skipped: compute-sanitizer is not on the path"
fi
