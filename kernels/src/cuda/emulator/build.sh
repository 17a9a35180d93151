#!/usr/bin/env bash
# Builds the emulated driver: every kernel as host C++, and the driver's interface over it.
#
#   kernels/src/cuda/emulator/build.sh FOLDER [--sanitize]     writes FOLDER/libcuda.so
#
# With --sanitize under AddressSanitizer and UndefinedBehaviorSanitizer; the process that loads it needs
# the former's library preloaded. Needs a C++17 compiler ($CXX, or c++).
set -euo pipefail
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")"
flags=(-std=c++17 -O1 -g -fPIC -ffp-contract=off -Wall -Wextra -Werror -pthread)
[ "${2:-}" != --sanitize ] || flags+=(-fsanitize=address,undefined -fno-sanitize-recover=undefined)
# Nothing to do where nothing changed.
if [ -e "$out/libcuda.so" ] && [ -z "$(find ../kernels . -newer "$out/libcuda.so")" ]; then exit 0; fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
printf '%s\0' ../kernels/*.cu *.cpp |
    xargs -0 -P 2 -I{} sh -c '"$@" -x c++ -c "$0" -o "'"$work"'/$(basename "$0").o"' {} "${CXX:-c++}" "${flags[@]}"
# The name by which dlopen finds it once it is loaded.
"${CXX:-c++}" "${flags[@]}" -shared -Wl,-soname,libcuda.so -o "$work/libcuda.so" "$work"/*.o
mv "$work/libcuda.so" "$out/libcuda.so"
