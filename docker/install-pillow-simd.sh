#!/bin/sh
# Build pillow-simd over the Pillow of the environment whose bin folder is $BIN, where that can work; else say why not.
set -eu
VERSION=12.1.1.post0
PYTHON="${BIN:?set BIN to the bin folder of the environment}/python"
include=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')

if ! command -v cc >/dev/null 2>&1; then
    echo "pillow-simd: no C compiler (cc): going on with Pillow, which decodes slower"
    exit 0
fi
if ! printf '#include <stdio.h>\n#include <jpeglib.h>\n#include <zlib.h>\n#include <Python.h>\n' |
    cc -E -I"$include" - >/dev/null 2>&1; then
    echo "pillow-simd: no headers of libjpeg, zlib or Python: going on with Pillow, which decodes slower"
    exit 0
fi
flags=
if grep -q -m1 avx2 /proc/cpuinfo 2>/dev/null; then
    flags=-mavx2
fi
log=$(mktemp)
if CC="cc $flags" "$PYTHON" -m pip install --disable-pip-version-check -q --no-deps --force-reinstall \
    --no-binary pillow-simd "pillow-simd==$VERSION" >"$log" 2>&1; then
    "$PYTHON" -c 'import PIL.Image; print("pillow-simd:", PIL.__version__, "built over Pillow")'
else
    echo "pillow-simd: could not be built, going on with Pillow; the end of the build's log:"
    tail -n 3 "$log"
fi
rm -f "$log"
