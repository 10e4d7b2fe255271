# Sourced by demo.sh and test.sh from the repository's root: makes sure that .venv holds this package, with its test and
# development extras, in the versions that constraints.txt pins. Afterwards "$VENV_PYTHON" is that environment's Python.
#
# PYTHON picks the interpreter for a new environment (default: python3). On a Linux machine without a GPU, setting
# PIP_EXTRA_INDEX_URL to PyTorch's index of CPU builds avoids a download of several GB.

say() { printf '\n=== %s ===\n' "$*"; }

VENV_PYTHON=.venv/bin/python

check_python_version() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || {
        echo "error: Python 3.10 to 3.13 is needed, but $1 is $("$1" -V 2>&1)." >&2
        echo "Name another interpreter, as in: PYTHON=python3.11 bash $0 (after removing .venv, if there is one)" >&2
        return 1
    }
}

environment_fingerprint() {
    "$VENV_PYTHON" - scripts/constraints.txt pyproject.toml <<'PYTHON'
import hashlib, pathlib, sys

digest = hashlib.sha256(sys.version.encode())
for path in sys.argv[1:]:
    digest.update(pathlib.Path(path).read_bytes())
print(digest.hexdigest())
PYTHON
}

setup_env() {
    say "environment (.venv)"
    if [ ! -x "$VENV_PYTHON" ]; then
        local python=${PYTHON:-python3}
        command -v "$python" >/dev/null || {
            echo "error: no $python on the PATH; install Python 3.10 to 3.13, or name one with PYTHON=..." >&2
            return 1
        }
        check_python_version "$python"
        echo "creating .venv with $("$python" -V)"
        "$python" -m venv .venv
    fi
    check_python_version "$VENV_PYTHON"

    # Installing takes minutes, and finding out that there is nothing to install takes seconds: skip both when the
    # environment was completed from these very files.
    local stamp=.venv/dora_peft_environment
    local fingerprint
    fingerprint=$(environment_fingerprint)
    if [ "$(cat "$stamp" 2>/dev/null)" = "$fingerprint" ]; then
        echo "up to date with scripts/constraints.txt and pyproject.toml"
        return
    fi
    rm -f "$stamp"
    # One call: constraints.txt pins torch, so that no looser requirement can bring in another build. Not --no-compile:
    # some packages' sources warn when they are compiled, and under pytest a warning is an error.
    PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 "$VENV_PYTHON" -m pip install \
        --prefer-binary -c scripts/constraints.txt -e ".[test,dev]"
    echo "$fingerprint" >"$stamp"
}
