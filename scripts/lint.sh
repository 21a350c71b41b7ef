#!/usr/bin/env bash
# Format and static checks; changes nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
mapfile -t c_files < <(git ls-files '*.c' '*.h' '*.cu' '*.cuh' '*.cpp')
clang-format --dry-run --Werror "${c_files[@]}"
ruff format --check --quiet .
ruff check --quiet .
mapfile -t host < <(git ls-files 'base/*.c' 'planner/*.c' 'graph/*.c' 'engine/*.c' 'cli/*.c' 'kernels/cpu/*.c')
cppcheck --quiet --std=c11 --language=c --error-exitcode=1 --inline-suppr --enable=warning,performance,portability \
    --suppress=missingIncludeSystem --suppress=invalidPointerCast --suppress=normalCheckLevelMaxBranches -DLLA_ISA=portable -D__x86_64__ -j 2 "${host[@]}"
echo 'lint: clean'
