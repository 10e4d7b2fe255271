#!/usr/bin/env bash
# The whole check, on the CPU: lint, format, types and tests, in an environment that it makes in .venv.
#
#     bash scripts/test.sh              # everything, as CI runs it; under 10 minutes on 2 cores
#     bash scripts/test.sh --lint       # linters and types alone
#     bash scripts/test.sh --no-lint    # tests alone
#     bash scripts/test.sh --fast       # linters and types, and the tests of what changed since main
#     bash scripts/test.sh -k merge     # other arguments go to pytest, which then runs once
#
# Needs Python 3.10 to 3.13 and access to a package index. Expected result: pytest's summary line last, exit status 0.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh

lint() {
    say "ruff check"
    "$VENV_PYTHON" -m ruff check .
    say "ruff format"
    "$VENV_PYTHON" -m ruff format --check .
    say "mypy"
    "$VENV_PYTHON" -m mypy
}

run_tests() {
    # A worker per core with one thread each: with torch's default of all cores per process they would fight over them.
    OMP_NUM_THREADS=1 "$VENV_PYTHON" -m pytest -n logical --maxprocesses 8 --dist worksteal "$@"
}

# Tests of the files that differ from the last commit shared with main, one path a line: changed tests themselves,
# tests that import changed fixtures, and for a/b.py the file a/test_b.py or, if there is none, all test files of a.
changed_tests() {
    local base file folder test
    base=$(git merge-base HEAD main 2>/dev/null || git rev-parse HEAD)
    { git diff --name-only "$base" && git ls-files --others --exclude-standard; } | sort -u | while read -r file; do
        test=tests/${file#dora_peft/}
        folder=$(dirname "$test")
        test=$folder/test_$(basename "$file")
        case $file in
        tests/*/test_*.py | tests/test_*.py) ls "$file" ;;
        tests/*.py) grep -rlw "$(basename "$file" .py)" tests --include='test_*.py' ;;
        scripts/*/*.py) grep -rlw "$(basename "$file" .py)" tests/scripts --include='test_*.py' || ls tests/scripts/test_*.py ;;
        dora_peft/*.py | scripts/*.py) if [ -f "$test" ]; then echo "$test"; else ls "$folder"/test_*.py; fi ;;
        esac
    done 2>/dev/null | sort -u
}

mode=all
case ${1:-} in
--lint | --no-lint | --fast)
    mode=${1#--}
    shift
    ;;
esac

setup_env
if [ "$mode" != no-lint ]; then lint; fi
if [ "$mode" = lint ]; then exit; fi

say "pytest"
if [ "$mode" = fast ]; then
    # Unquoted, for one word a path.
    run_tests tests/test_imports.py $(changed_tests) "$@"
    exit
fi
run_tests "$@"

if [ $# -eq 0 ] && [ "$(uname -s)" = Linux ]; then
    say "pytest, the layers once more by Triton's kernels"
    # Tests that choose an implementation by themselves do not depend on the option.
    run_tests --implementation triton -m "not gpu and not slow and not implementation" \
        tests/layers/test_{conv,embedding,kind,layer,layer_copies,merge,quantised,zero_rows}.py \
        tests/norms/test_{evaluation,refreshes,state}.py \
        tests/ops/test_{dropout,kept_output,linear,linear_autograd,linear_parts,overwritten}.py \
        tests/ops/test_{products,recomputation,saved}.py tests/plugin/test_use_dora.py tests/whole/test_compile.py
fi
