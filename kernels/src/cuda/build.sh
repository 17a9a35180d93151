#!/usr/bin/env bash
# Compiles the kernels to PTX, which is committed: building Lory needs no CUDA toolkit.
#
#   kernels/src/cuda/build.sh            writes kernels/src/cuda/ptx/*.ptx
#   kernels/src/cuda/build.sh --check    fails if they differ from what is committed
#
# compute_80 is the floor (tensor cores with BF16, TF32 and signed bytes); the driver compiles it for the device it finds.
# nvcc writes the newest PTX version it knows, which only drivers of its own age read. The kernels use nothing
# newer than version 7.0, so the text says that, and ptxas has to agree by assembling it.
# Without $NVCC, the compiler's wheels are installed in a virtual environment below target/.
set -euo pipefail
cd "$(dirname "$0")"

version=13.0
target=${CARGO_TARGET_DIR:-../../../target}
venv=$target/nvcc-$version
if [ -z "${NVCC:-}" ]; then
    find_nvcc() { find "$venv" -path '*/bin/nvcc' -type f 2>/dev/null | head -n 1; }
    if [ -z "$(find_nvcc)" ]; then
        mkdir -p "$target"
        python3 -m venv "$venv"
        wheels=()
        for wheel in nvcc crt runtime cccl; do wheels+=("nvidia-cuda-$wheel==$version.*"); done
        "$venv/bin/pip" install --quiet --disable-pip-version-check "nvidia-nvvm==$version.*" "${wheels[@]}"
    fi
    NVCC=$(find_nvcc)
fi
"$NVCC" --version | grep -q "release $version" || {
    printf '%s is not of release %s\n' "$NVCC" "$version" >&2
    exit 1
}
ptxas=$(dirname "$NVCC")/ptxas

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
compile() {
    local name
    name=$(basename "$1" .cu)
    "$NVCC" --ptx --gpu-architecture=compute_80 -O3 -fmad=false -std=c++17 -Werror all-warnings \
        -o "$work/$name.full" "$1"
    # The comments name the compiler's build; the header is the first lines.
    sed -e '/^\/\//d' -e 's/^\.version .*/.version 7.0/' -e '/./,$!d' "$work/$name.full" >"$work/$name.ptx"
    for arch in sm_80 sm_90; do
        "$ptxas" --gpu-name "$arch" --warn-on-spills -o /dev/null "$work/$name.ptx"
    done
}
for source in kernels/*.cu; do compile "$source"; done

if [ "${1:-}" = --check ]; then
    for ptx in ptx/*.ptx; do
        [ -e "$work/$(basename "$ptx")" ] || { printf '%s has no source\n' "$ptx" >&2; exit 1; }
    done
    for ptx in "$work"/*.ptx; do
        cmp "$ptx" "ptx/$(basename "$ptx")" || {
            printf 'run kernels/src/cuda/build.sh and commit what it writes\n' >&2
            exit 1
        }
    done
else
    mkdir -p ptx
    rm -f ptx/*.ptx
    cp "$work"/*.ptx ptx/
fi
