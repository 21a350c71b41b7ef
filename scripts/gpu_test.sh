#!/usr/bin/env bash
# The GPU suite, for a machine with an NVIDIA GPU, CUDA, Python, PyTorch, transformers and pytest; no network needed.
#
#   scripts/gpu_test.sh           tests, sanitizers over small runs of the operators, the step and a model, and the table
#                                 of the operators' speed
#   scripts/gpu_test.sh quick     tests alone
#   scripts/gpu_test.sh ops       as the first, of the operators and the runtime alone
#
# `make gpu-test` builds first. OUT: a folder for the full logs (default build/gpu-test).
set -uo pipefail
cd "$(dirname "$0")/.."
mode=${1:-full}
out=${OUT:-build/gpu-test}
mkdir -p "$out"
export PATH="$PWD/.venv/bin:$PATH:/usr/local/cuda/bin" PYTHONPATH="$PWD/bindings${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
summary=() failed=0

stop() { printf 'gpu_test: %s\n' "$*" >&2; exit 1; }
# step NAME LOG COMMAND...: runs it, keeps the log, shows its end
step() {
    local name=$1 log=$out/$2 start=$SECONDS verdict=ok
    shift 2
    printf '\n== %s\n' "$name"
    "$@" >"$log" 2>&1 || { verdict=FAILED; failed=1; }
    if [ $verdict = ok ]; then tail -n 4 "$log"; else tail -n 60 "$log"; fi
    summary+=("$(printf '%-44s %-7s %4d s  %s' "$name" "$verdict" $((SECONDS - start)) "$log")")
}
skip() { summary+=("$(printf '%-44s %-7s %s' "$1" skipped "$2")"); printf '\n== %s: SKIPPED, %s\n' "$1" "$2"; }

# ---- what must be there ----
command -v nvidia-smi >/dev/null && nvidia-smi -L || stop 'no NVIDIA driver: nvidia-smi does not answer'
lib=bindings/llaisys/libllaisys/libllaisys.so
[ -e "$lib" ] || stop "$lib is missing: run make (it needs nvcc, and cJSON: the package libcjson-dev, or cjson's own sources)"
missing=$(ldd "$lib" | awk '/not found/ {print $1}')
[ -z "$missing" ] || stop "$lib needs $missing; libcjson.so.1 is in the package libcjson1, or may lie in a folder of LD_LIBRARY_PATH"
python -c 'import torch, pytest, transformers; assert torch.cuda.is_available(), "PyTorch sees no GPU"' || stop 'Python packages are missing'
python -c 'import llaisys, sys; sys.exit(llaisys.RuntimeAPI(llaisys.DeviceType.NVIDIA).get_device_count() == 0)' ||
    stop 'the library reports 0 NVIDIA devices: was it built with nvcc?'

# ---- tests ----
workers=()
python -c 'import xdist' 2>/dev/null && workers=(-n 8)
step 'operators, runtime, tensors' pytest-ops.txt \
    python -m pytest -q --tb=short "${workers[@]}" -k nvidia test/ops test/test_runtime.py test/test_tensor.py
if [ "$mode" != ops ]; then
    step 'models' pytest-models.txt python -m pytest -q --tb=short -k nvidia --ignore=test/ops \
        --ignore=test/test_runtime.py --ignore=test/test_tensor.py test
    for test in build/test_cuda_*; do
        [ -x "$test" ] && [ -f "$test" ] && step "$(basename "$test")" "$(basename "$test").txt" "$test"
    done
fi

# ---- sanitizers and speed ----
if [ "$mode" != quick ]; then
    if command -v compute-sanitizer >/dev/null; then
        sanitize() { # TOOL NAME COMMAND...
            local tool=$1 name=$2
            shift 2
            step "compute-sanitizer $tool, $name" "$tool-$name.txt" \
                timeout 300 compute-sanitizer --tool "$tool" --error-exitcode 1 "$@"
        }
        for tool in memcheck racecheck; do sanitize $tool operators python test/ops/small_run.py; done
        if [ "$mode" != ops ]; then
            for tool in memcheck racecheck initcheck; do
                sanitize $tool step build/test_cuda_nodes quick
                sanitize $tool model python -m llaisys generate models/refrain-mini --device nvidia \
                    --prompt 'Count from 1 to 9.' --max-new-tokens 12
            done
        fi
    else
        skip 'compute-sanitizer' 'not installed'
    fi
    limits=$out/liblimits.so
    step 'limits of the memory' limits.txt nvcc -O3 -shared -Xcompiler -fPIC -cudart static -arch=native profiles/limits.cu -o "$limits"
    step 'speed of the operators' ops.txt python profiles/ops_bench.py --limits "$limits" --json "$out/ops.json"
    printf '\n'
    cat "$out/ops.txt"
fi

printf '\n%s\n' '== summary'
printf '%s\n' "${summary[@]}"
exit $failed
