#!/usr/bin/env bash
# The whole check, on the CPU: lint, format, types and tests, in an environment that it makes in .venv.
#
#     bash scripts/test.sh              # everything, as CI runs it; 10 to 20 minutes on 2 cores
#     bash scripts/test.sh -k merge     # arguments go to pytest
#
# Needs Python 3.10 to 3.13 and access to a package index. Expected result: pytest's summary line last, exit status 0.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh

setup_env

say "ruff check"
"$VENV_PYTHON" -m ruff check .
say "ruff format"
"$VENV_PYTHON" -m ruff format --check .
say "mypy"
"$VENV_PYTHON" -m mypy

say "pytest"
# Two workers with one thread each: with torch's default of all cores per process the workers would fight over them.
export OMP_NUM_THREADS=1
"$VENV_PYTHON" -m pytest -n 2 --dist worksteal "$@"

if [ $# -eq 0 ] && [ "$(uname -s)" = Linux ]; then
    say "pytest, the layers once more by Triton's kernels"
    "$VENV_PYTHON" -m pytest -n 2 --dist worksteal --implementation triton \
        tests/plugin/test_use_dora.py tests/whole/test_compile.py tests/layers/test_kinds.py tests/layers/test_layer.py \
        tests/layers/test_merge.py tests/layers/test_quantised.py tests/layers/test_layer_copies.py \
        tests/layers/test_zero_rows.py tests/norms/test_state.py tests/norms/test_refreshes.py tests/norms/test_evaluation.py \
        tests/ops/test_linear.py tests/ops/test_products.py tests/ops/test_magnitude_gradient.py \
        tests/ops/test_changed_output.py tests/ops/test_saved.py tests/ops/test_linear_dropout.py \
        tests/ops/test_linear_parts.py tests/ops/test_kept_output.py tests/ops/test_recomputation.py
fi
