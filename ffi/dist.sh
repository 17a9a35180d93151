#!/usr/bin/env bash
# Makes a relocatable folder: shared and static library, headers, pkg-config and CMake files,
# licences, examples. Prints the sizes.
#
#   ffi/dist.sh [FOLDER [PROFILE [CARGO ARGUMENTS…]]]      default: target/lory release
set -euo pipefail
cd "$(dirname "$0")/.."

out=${1:-target/lory}
profile=${2:-release}
shift $(($# < 2 ? $# : 2))

cargo build --quiet --locked -p lory-ffi --profile "$profile" "$@"
target=$(cargo metadata --format-version 1 --no-deps --locked | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
built=$target/$([ "$profile" = dev ] && echo debug || echo "$profile")
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' Cargo.toml | head -1)
abi=$(sed -n 's/^pub const LORY_ABI_VERSION: u32 = \([0-9]*\);$/\1/p' ffi/src/version.rs)
system="-lgcc_s -lutil -lrt -lpthread -lm -ldl -lc"
features=()
case " $* " in *ggml*) system="-lstdc++ $system" features=(--features ggml) ;; esac

rm -rf "$out"
mkdir -p "$out"/{include,lib/pkgconfig,lib/cmake/Lory,share/lory}
cp ffi/include/lory.h ffi/include/lory.hpp "$out/include/"
cp LICENSE-MIT LICENSE-APACHE ffi/README.md "$out/share/lory/"
cp -r ffi/examples "$out/share/lory/examples"
# The crates that are inside and their licences.
cargo tree --locked -p lory-ffi -e normal --prefix none --format '{p}: {l}' "${features[@]}" |
    grep -v '^lory-' | sed 's/ (\*)$//; s/ (proc-macro)//' | sort -u >"$out/share/lory/THIRD-PARTY"

shared=$out/lib/liblory.so.$version
cp "$built/liblory.so" "$shared"
ln -s "liblory.so.$version" "$out/lib/liblory.so.$abi"
ln -s "liblory.so.$abi" "$out/lib/liblory.so"

# One object in which everything but lory_* is local, so that a host may have a ggml or another
# Rust library of its own, and in which nothing is that lory_* cannot reach. Its sections stay apart for
# the linker's --gc-sections.
static=$out/lib/liblory.a
object=$(mktemp -d)/lory.o
mapfile -t roots < <(nm -D --defined-only "$shared" | awk '$3 ~ /^lory_/ {print "--undefined=" $3}')
ld -r --gc-sections "${roots[@]}" --whole-archive "$built/liblory.a" -o "$object"
# The standard library's embedded bitcode only confuses other linkers' plugins.
objcopy --wildcard --keep-global-symbol='lory_*' -R .llvmbc -R .llvmcmd "$object"
if [ "$profile" = release ]; then
    strip --strip-unneeded "$shared" "$object"
fi
ar rcs "$static" "$object"
rm -r "$(dirname "$object")"

fill() {
    sed -e "s|@VERSION@|$version|g" -e "s|@ABI@|$abi|g" -e "s|@SYSTEM@|$system|g" "$1" >"$2"
}
fill ffi/cmake/lory.pc.in "$out/lib/pkgconfig/lory.pc"
fill ffi/cmake/LoryConfig.cmake.in "$out/lib/cmake/Lory/LoryConfig.cmake"
fill ffi/cmake/LoryConfigVersion.cmake.in "$out/lib/cmake/Lory/LoryConfigVersion.cmake"

printf '%s\n' "$out"
(cd "$out" && stat -c '%10s  %n' include/* "lib/liblory.so.$version" lib/liblory.a)
