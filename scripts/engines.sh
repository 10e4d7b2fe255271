#!/usr/bin/env bash
# Other tools' own software reads what `dora-peft convert` wrote, and writes what it reads.
#
#     bash scripts/engines.sh formats              # all tools; the outcome goes to scripts/engines/formats.json
#     bash scripts/engines.sh formats mlx          # one of them
#
# Each tool gets an environment of its own in .engines/, since their requirements exclude each other. Expected result: a
# table of the largest differences between the tool's output and reference.py's, exit status 0 if all are below 1e-5.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh

declare -A PACKAGES=(
    [peft]="" # of the tests' own environment
    [lycoris]="lycoris-lora==4.1.3 torch==2.13.0 numpy safetensors"
    [mlx]="mlx[cpu]==0.32.0 mlx-lm==0.32.2"
    # it imports names that newer releases of torchao do not have
    [torchtune]="torchtune==0.6.1 torchao==0.9.0 torch==2.13.0"
)
ORDER=(peft lycoris mlx torchtune)

python_of() {
    if [ -z "${PACKAGES[$1]}" ]; then
        echo "$VENV_PYTHON"
        return
    fi
    local folder=.engines/$1
    if [ "$(cat "$folder/packages" 2>/dev/null)" != "${PACKAGES[$1]}" ]; then
        rm -rf "$folder"
        python3 -m venv "$folder" >&2
        # shellcheck disable=SC2086  # several words
        "$folder/bin/python" -m pip install -q --prefer-binary ${PACKAGES[$1]} >&2
        echo "${PACKAGES[$1]}" >"$folder/packages"
    fi
    echo "$folder/bin/python"
}

[ "${1:-}" = formats ] || { echo "usage: bash scripts/engines.sh formats [TOOL...]" >&2; exit 2; }
shift
setup_env
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$VENV_PYTHON" scripts/check_formats.py make "$work"
[ $# -gt 0 ] || set -- "${ORDER[@]}"
for tool; do
    say "$tool"
    "$(python_of "$tool")" "scripts/engine_$tool.py" "$work"
done
"$VENV_PYTHON" scripts/check_formats.py compare "$work" --results scripts/engines
