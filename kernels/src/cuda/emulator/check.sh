#!/usr/bin/env bash
# The CUDA suite on the emulated driver, built under AddressSanitizer and UndefinedBehaviorSanitizer.
set -euo pipefail
cd "$(dirname "$0")/../../../.."

library() { "${CXX:-c++}" -print-file-name="$1"; }
# Of the whole workspace, whose crates are there already; the runtime has a test of this name, too.
binary=$(cargo test --locked --workspace --test cuda --no-run --message-format=json |
    sed -n '/#lory-kernels@/s/.*"executable":"\([^"]*cuda-[^"]*\)".*/\1/p' | tail -n 1)
[ -n "$binary" ] || { printf 'no test binary\n' >&2; exit 1; }
# The process ends with the emulated context alive, so leaks mean nothing. Fibers live on stacks of their own.
cd kernels
LORY_CUDA_SANITIZE=1 LD_PRELOAD="$(library libasan.so):$(library libubsan.so)" \
    ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 "$binary"
