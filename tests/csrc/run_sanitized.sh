#!/bin/sh
# Builds the CPU library with AddressSanitizer and UndefinedBehaviorSanitizer, in a directory of its own beside a copy
# of the package, and runs the tests of the CPU kernels on it. Usage: tests/csrc/run_sanitized.sh [directory [arguments
# of pytest, such as tests/csrc/test_knn_cpu.py, in the place of all of tests/csrc]], with $PYTHON an interpreter that
# has torch and the dev extra (default python3). What is built already is kept: call it again for the next file.
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
out=${1:-build/sanitized}
[ $# -eq 0 ] || shift
# test_build.py and test_sanitized.py look at sources and compilers, not at kernels.
[ $# -gt 0 ] || set -- tests/csrc --ignore tests/csrc/test_build.py --ignore tests/csrc/test_sanitized.py
mkdir -p "$out"
out=$(cd "$out" && pwd)

UMDA_FAST_SANITIZE=address,undefined UMDA_FAST_EXTENSION=1 UMDA_FAST_CUDA=0 \
  "$python" setup.py -q build --build-lib "$out/lib" --build-temp "$out/temp"
rm -rf "$out/lib/tests"
mkdir "$out/lib/tests"
cp -r tests/__init__.py tests/csrc "$out/lib/tests/"
cd "$out/lib"

# The interpreter is not instrumented: the runtime has to be there before it. Python and torch leak at exit by design.
compiler=${CXX:-g++}
LD_PRELOAD="$($compiler -print-file-name=libasan.so) $($compiler -print-file-name=libubsan.so) $($compiler -print-file-name=libstdc++.so)" \
ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} \
  "$python" -m pytest -q -p no:cacheprovider "$@"
