#!/usr/bin/env bash
# Runs each fuzzer for a number of seconds (default 60) from its corpus. What it finds beyond that is thrown away; a crash is kept.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-60}
if ! command -v clang >/dev/null; then
    echo 'fuzz: SKIPPED, clang is not installed'
    exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for target in safetensors config; do
    clang -std=gnu17 -O1 -g -D_GNU_SOURCE -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
        base/status.c planner/*.c "test/fuzz/fuzz_$target.c" $(pkg-config --cflags --libs libcjson) -lm -o "$work/$target"
    mkdir "$work/new-$target"
    echo "fuzz: $target for ${seconds}s"
    "$work/$target" -max_total_time="$seconds" -max_len=4096 -dict="test/fuzz/$target.dict" -verbosity=0 -print_final_stats=1 \
        -artifact_prefix="./crash-$target-" "$work/new-$target" "test/fuzz/corpus/$target" 2>&1 | grep -E 'executed|SUMMARY|ERROR|crash' || true
    [ -z "$(ls crash-"$target"-* 2>/dev/null)" ] || { echo "fuzz: $target crashed"; exit 1; }
done
