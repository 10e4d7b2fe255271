#!/usr/bin/env bash
# A small LLaMA learns to pronounce English words, with DoRA and with LoRA, from an empty environment to a conversation.
#
#     bash scripts/demo.sh                              # SmolLM2-135M, under 20 minutes on 2 CPU cores and 8 GiB
#     bash scripts/demo.sh --steps 2 --words 8          # the same in short, to see that everything runs
#     bash scripts/demo.sh --model meta-llama/Llama-3.2-1B --output outputs/llama32
#
#     --model ID_OR_PATH   any LLaMA in transformers' format instead of SmolLM2; an id is downloaded from the Hub
#     --steps N            optimizer steps for each method (default 60)
#     --words N            held-out words to measure on (default 200)
#     --output DIR         folder for adapters, results and plots (default outputs/demo)
#     --force              train and measure again; otherwise a second run reuses what a first one left
#
# Needs Python 3.10 to 3.13 and access to a package index. Expected result: the share of rightly pronounced held-out words,
# 0 % before and about 25 % after training, and a table of what each method costs in memory and time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh

usage() { sed -n '4,12s/^# \{0,1\}//p' scripts/demo.sh; }

model= steps=60 words=200 output=outputs/demo force=
while [ $# -gt 0 ]; do
    case $1 in
        --force) force=1; shift; continue ;;
        -h | --help) usage; exit ;;
        --model | --steps | --words | --output) [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; } ;;
        *) echo "error: unknown argument $1" >&2; usage >&2; exit 2 ;;
    esac
    printf -v "${1#--}" %s "$2"
    shift 2
done
for count in "$steps" "$words"; do
    [[ $count =~ ^[1-9][0-9]*$ ]] || { echo "error: --steps and --words need whole numbers above 0, not $count" >&2; exit 2; }
done

setup_env

say "model and data"
if [ -z "$model" ]; then
    "$VENV_PYTHON" scripts/prepare_smollm2.py
    model_flags=(--model_name_or_path data/smollm2 --gguf_file SmolLM2-135M-Instruct.Q4_1.gguf)
    config_flags=("${model_flags[@]}")
    # Everything is on the disk: no library needs to ask the Hub whether it knows better.
    export HF_HUB_OFFLINE=1
else
    model_flags=(--model_name_or_path "$model")
    config_flags=("${model_flags[@]}" --gguf_file null --dtype auto)
fi
"$VENV_PYTHON" scripts/prepare_cmudict.py

mkdir -p "$output"
# The output of a step goes through tee, and would otherwise come only at its end.
export PYTHONUNBUFFERED=1
# A thread that waits for the others sleeps instead of spinning, which makes steps several times slower on a busy machine.
export OMP_WAIT_POLICY=PASSIVE
# What other libraries say about themselves, message by message; warnings of this package and all errors come through.
export PYTHONPATH=$PWD/scripts/quiet${PYTHONPATH:+:$PYTHONPATH}

# once NAME SETTINGS COMMAND...: run the command, unless it ended well before under the same settings; its output is kept.
once() {
    local log=$output/$1.log done_file=$output/$1.done settings=$2
    shift 2
    if [ -z "$force" ] && [ "$(cat "$done_file" 2>/dev/null)" = "$settings" ]; then
        echo "reusing $log of an earlier run (--force repeats it)"
        return
    fi
    rm -f "$done_file"
    "$@" | tee "$log"
    echo "$settings" >"$done_file"
}

train() {
    local method=$1 started=$output/$1.started
    # A run that was interrupted goes on from its last checkpoint; one of other settings makes room.
    if [ -n "$force" ] || [ "$(cat "$started" 2>/dev/null)" != "$training" ]; then
        rm -rf "${output:?}/$method"
        echo "$training" >"$started"
    fi
    "$VENV_PYTHON" scripts/finetune_llama.py configs/smollm2_135m.yaml "${config_flags[@]}" --method "$method" \
        --max_steps "$steps" --learning_rate 2e-3 --max_train_samples 16000 --eval_steps 30 --output_dir "$output/$method" \
        --resume_from_checkpoint true
}

evaluate() {
    "$VENV_PYTHON" scripts/evaluate_spelling.py "${model_flags[@]}" --limit "$words" "$@"
}

training="model=${model:-smollm2} steps=$steps"
say "accuracy before training, on $words held-out words"
once accuracy_before "model=${model:-smollm2} words=$words" evaluate --json "$output/accuracy_before.json"
for method in dora lora; do
    say "training with $method, $steps steps"
    once "train_$method" "$training" train "$method"
    say "accuracy after training with $method"
    once "accuracy_$method" "$training words=$words" evaluate --adapter "$output/$method" --json "$output/accuracy_$method.json"
done

say "what each method costs"
once memory "model=${model:-smollm2}" "$VENV_PYTHON" scripts/benchmark_memory.py configs/smollm2_135m.yaml \
    "${config_flags[@]}" --max_train_samples 640 --steps 3 --json "$output/memory.json" --plot "$output/memory.png"

say "a conversation with the adapter in $output/dora; none of these words was trained on"
"$VENV_PYTHON" scripts/chat.py "${model_flags[@]}" --adapter "$output/dora" --task spelling --compare --max_new_tokens 20 \
    --say watching --say zipper --say trombones

say "results"
tail -qn 1 "$output/accuracy_before.log" "$output/accuracy_dora.log" "$output/accuracy_lora.log"
echo
cat "$output/memory.log"
echo
echo "adapters: $output/dora, $output/lora    plots: $output/dora/loss.png, $output/lora/loss.png, $output/memory.png"
