#!/usr/bin/env bash
# The whole suite: lint, C tests, C tests under sanitizers, fuzzers for a moment, Python tests.
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

step 'fuzzers'
scripts/fuzz.sh 20

step 'Python tests'
exec .venv/bin/python -m pytest -q test
