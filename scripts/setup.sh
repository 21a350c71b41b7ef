#!/usr/bin/env bash
# Sets up what a build needs: system packages, then .venv. Quick where everything is there; safe to run again.
#
#   scripts/setup.sh        for the build and the demo
#   scripts/setup.sh dev    for the tests and linters, too
set -euo pipefail
cd "$(dirname "$0")/.."
level=${1:-run}
PATH=${PATH//"$PWD/.venv/bin:"/} # the Makefile puts it first; here "python3" means the system's

say() { printf 'setup: %s\n' "$*" >&2; }

# ---- system packages: a C compiler and cJSON; for tests also clang (fuzzers) and cppcheck ----
missing=()
command -v cc >/dev/null || missing+=(gcc)
command -v c++ >/dev/null || missing+=(g++)
command -v make >/dev/null || missing+=(make)
command -v git >/dev/null || missing+=(git)
echo '#include <cjson/cJSON.h>' | cc -E -x c - >/dev/null 2>&1 || missing+=(libcjson-dev)
command -v pkg-config >/dev/null || missing+=(pkg-config)
python3 -c 'import venv, ensurepip' 2>/dev/null || missing+=(python3-venv)
if [ "$level" = dev ]; then
    command -v clang >/dev/null || missing+=(clang)
    command -v cppcheck >/dev/null || missing+=(cppcheck)
    [ -n "$(find /usr/lib -name 'libclang_rt.fuzzer*' -print -quit 2>/dev/null)" ] || missing+=(libclang-rt-dev)
fi
if [ ${#missing[@]} -gt 0 ]; then
    sudo=
    [ "$(id -u)" = 0 ] || sudo='sudo -n'
    if command -v apt-get >/dev/null && { [ -z "$sudo" ] || sudo -n true 2>/dev/null; }; then
        $sudo apt-get update -qq 2>/dev/null || true
        # older releases know libclang-rt-dev under the number of their clang only
        packages=()
        for p in "${missing[@]}"; do
            if [ "$p" = libclang-rt-dev ] && ! apt-cache show "$p" >/dev/null 2>&1; then
                number=$(apt-cache depends clang 2>/dev/null | sed -n 's/.*Depends: clang-\([0-9]*\).*/\1/p' | head -n 1) || true
                p=libclang-rt-${number:-14}-dev
            fi
            packages+=("$p")
        done
        say "installing ${packages[*]}"
        $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${packages[@]}" >/dev/null 2>&1 || say "could not install all of: ${packages[*]}"
    else
        say "please install: ${missing[*]}"
    fi
fi

# The chat page is tested in a browser; where none can be had, those tests skip and say so.
if [ "$level" = dev ] && ! command -v chromium chromium-browser google-chrome >/dev/null && [ "$(id -u)" = 0 ] &&
    command -v apt-get >/dev/null; then
    say 'installing chromium'
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium; } >/dev/null 2>&1 ||
        say 'no chromium: the chat page will not be tested'
fi

# ---- Python: a .venv of its own, or, where packages cannot be had (a machine without network), the system's ----
requirements=requirements.txt
[ "$level" = dev ] && requirements=requirements-dev.txt
stamp=.venv/.stamp-$level
if [ -x .venv/bin/python ] && [ -e "$stamp" ] && [ "$stamp" -nt requirements.txt ] && [ "$stamp" -nt requirements-dev.txt ]; then
    exit 0
fi
modules='jinja2 tokenizers'
[ "$level" = dev ] && modules="$modules torch transformers numpy pytest"
[ -x .venv/bin/python ] || python3 -m venv .venv
if ! .venv/bin/pip install -q --disable-pip-version-check --retries 2 -r "$requirements"; then
    say 'packages cannot be installed; using those of the system'
    for m in $modules; do
        python3 -c "import $m" || { say "python package '$m' is missing"; exit 1; }
    done
    rm -rf .venv
    # venv's own switch for system packages looks at the base interpreter: link the packages of the one in use
    python3 -m venv --without-pip .venv
    python3 -c 'import site, sysconfig; print("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))' \
        >"$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/system.pth"
    for tool in meson ninja; do
        [ -x ".venv/bin/$tool" ] || ln -s "$(command -v $tool)" ".venv/bin/$tool"
    done
fi
# A client that asks for older versions of what the other tests use lives apart.
if [ "$level" = dev ] && [ ! -x .venv/litellm/bin/litellm ]; then
    { python3 -m venv .venv/litellm && .venv/litellm/bin/pip install -q --disable-pip-version-check --retries 2 litellm; } ||
        say 'no litellm: that client will not be tested'
fi
touch "$stamp"
[ "$level" = dev ] && touch .venv/.stamp-run
exit 0
