#!/bin/sh
# Build pillow-simd over the Pillow of the environment whose bin folder is $BIN, where that can work; else say why not.
# $SIMD: auto (AVX2 where this machine has it), avx2, sse4, or none to leave Pillow in place.
# With --required, what can't be built is an error.
set -eu
VERSION=12.1.1.post0
PYTHON="${BIN:?set BIN to the bin folder of the environment}/python"
SIMD="${SIMD:-auto}"

without() {
    if [ "${required:-}" ]; then
        echo "pillow-simd: $1" >&2
        exit 1
    fi
    echo "pillow-simd: $1: going on with Pillow, which decodes slower"
    exit 0
}

case "${1:-}" in
    "") ;;
    --required) required=1 ;;
    *) echo "usage: BIN=folder [SIMD=auto|avx2|sse4|none] $0 [--required]" >&2; exit 2 ;;
esac
flags=
case "$SIMD" in
    auto) if grep -q -m1 avx2 /proc/cpuinfo 2>/dev/null; then flags=-mavx2; fi ;;
    avx2) flags=-mavx2 ;;
    sse4) ;;
    none) exit 0 ;;
    *) echo "SIMD=$SIMD: choose auto, avx2, sse4 or none" >&2; exit 2 ;;
esac
include=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
if ! command -v cc >/dev/null 2>&1; then
    without "no C compiler (cc)"
fi
if ! printf '#include <stdio.h>\n#include <jpeglib.h>\n#include <zlib.h>\n#include <Python.h>\n' |
    cc -E -I"$include" - >/dev/null 2>&1; then
    without "no headers of libjpeg, zlib or Python"
fi
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# pip's cache would hand out a build for another machine's instructions.
if CC="cc $flags" "$PYTHON" -m pip install --disable-pip-version-check -q --no-deps --force-reinstall --no-cache-dir \
    --no-binary pillow-simd "pillow-simd==$VERSION" >"$log" 2>&1; then
    "$PYTHON" -c 'import PIL.Image; print("pillow-simd:", PIL.__version__, "built over Pillow")'
else
    echo "the end of the build's log:"
    tail -n 3 "$log"
    without "could not be built"
fi
