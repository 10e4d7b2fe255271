#!/usr/bin/env bash
# A fast part of the tests at the ends of the ranges in pyproject.toml, each in an environment of its own.
#
#     bash scripts/test_versions.sh lowest           # the package alone, everything it names at its lower bound
#     bash scripts/test_versions.sh lowest-extras    # the same with all extras, at theirs as far as they fit together
#     bash scripts/test_versions.sh newest           # the newest of everything, with all extras
#     bash scripts/test_versions.sh lowest --tests   # the tests again, in the environment that the last call made
#
# In lowest-extras other packages lift some above their lower bounds: accelerate, datasets, huggingface_hub, protobuf,
# safetensors and tqdm; the log names the versions that were there.
#
# Makes build/env-NAME anew, of 6 to 8 GB (under 2 on Linux with UV_TORCH_BACKEND=cpu, where PyTorch's own index can be
# reached), and writes versions and outcome to scripts/versions/NAME.txt. Needs Python 3.10 to 3.13 (PYTHON names it), and
# a package index. Expected result: pytest's summary line last, exit status 0.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Creation, training, saving, loading, converting, merging, PEFT's registry and patches, trainers; what an import prints.
TESTS=(
    tests/test_{config,field_types,model,packaging,reference}.py
    tests/adapters/test_{checkpoint,convert,doctor,hotswap,merge}.py
    tests/cli/test_cli.py
    tests/layers/test_{create,layer,merge}.py
    tests/plugin/test_{configs,models,patching,peft_type,plugin}.py
    tests/whole/test_{quiet,trainers}.py
)

usage() { sed -n '4,7s/^# \{0,1\}//p' scripts/test_versions.sh; }

which=${1:-} tests_only=${2:-}
if [ $# -gt 2 ] || { [ -n "$tests_only" ] && [ "$tests_only" != --tests ]; }; then
    usage >&2
    exit 2
fi
# The versions of pytest and hypothesis are those of the extra `test`, of which the package alone takes nothing else.
mapfile -t bare < <(grep -oE '"(pytest|hypothesis)>=[0-9.]+"' pyproject.toml | tr -d '"')
case $which in
lowest) resolution=lowest-direct requirements=(-e . "${bare[@]}") ;;
lowest-extras) resolution=lowest-direct requirements=(-e ".[test]") ;;
newest) resolution=highest requirements=(-e ".[test]") ;;
-h | --help) usage && exit ;;
*) usage >&2 && exit 2 ;;
esac

environment=build/env-$which log=scripts/versions/$which.txt
mkdir -p build scripts/versions
if [ -z "$tests_only" ]; then
    uv=$(command -v uv || true)
    if [ -z "$uv" ]; then
        "${PYTHON:-python3}" -m venv build/env-uv
        build/env-uv/bin/python -m pip install --quiet uv
        uv=$PWD/build/env-uv/bin/uv
    fi
    "$uv" venv --clear --python "${PYTHON:-python3}" "$environment"
    "$uv" pip install --python "$environment/bin/python" --compile-bytecode --resolution "$resolution" \
        "${requirements[@]}"
fi

# Of every package that pyproject.toml names, in any extra, the version that is there.
versions() {
    "$environment/bin/python" - <<'PYTHON'
import platform, re
from importlib.metadata import requires, version

print("python", platform.python_version())
names = sorted({re.match(r"[\w-]+", requirement)[0].lower() for requirement in requires("dora-peft")} - {"dora-peft"})
for name in names:
    try:
        print(name, version(name))
    except ModuleNotFoundError:
        pass
PYTHON
}

{
    echo "bash scripts/test_versions.sh $which: $(uname -s) $(uname -m), commit $(git rev-parse --short=9 HEAD)"
    echo
    versions
    echo
    # What libraries of these ages say of their own coming changes is no error here, as it is at the pinned versions.
    # Paths of this machine say nothing to others, nor does what Triton 3.9 has left in memory at the end.
    OMP_NUM_THREADS=1 "$environment/bin/python" -m pytest -q -r fEsxX --tb=short --color=no -W ignore::DeprecationWarning \
        -W ignore::FutureWarning "${TESTS[@]}" 2>&1 |
        sed -e "s#$PWD/##g" -e 's#\(^\|[ "]\)/[^ :]*/lib/python3#\1lib/python3#g' -e '/^nanobind:/,$d' -e '/^[.sxXFE]* *\[ *[0-9]*%\]$/d'
} | tee "$log"
