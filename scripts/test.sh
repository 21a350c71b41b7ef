#!/usr/bin/env bash
# The whole suite: lint, C tests, C tests under three sanitizers, fuzzers for a moment, Python tests.
set -euo pipefail
cd "$(dirname "$0")/.."
step() { printf '\n== %s (%ss)\n' "$*" "$SECONDS"; }

step lint
scripts/lint.sh

step 'C tests'
meson test -C build --print-errorlogs

step 'C tests under AddressSanitizer and UndefinedBehaviorSanitizer'
[ -e build-asan/build.ninja ] || meson setup build-asan -Db_sanitize=address,undefined -Doptimization=1 -Db_lundef=false -Dcuda=disabled >/dev/null
meson test -C build-asan --print-errorlogs

step 'C tests of the engine under ThreadSanitizer'
[ -e build-tsan/build.ninja ] || meson setup build-tsan -Db_sanitize=thread -Doptimization=1 -Db_lundef=false -Dcuda=disabled >/dev/null
ninja -C build-tsan test_engine test_invariance test_masks test_scheduler
# one OpenMP thread: ThreadSanitizer cannot see how GCC's OpenMP library keeps its threads apart
OMP_NUM_THREADS=1 meson test -C build-tsan --no-rebuild --print-errorlogs engine invariance masks scheduler

step 'fuzzers'
scripts/fuzz.sh 20

step 'Python tests'
exec .venv/bin/python -m pytest -q test
