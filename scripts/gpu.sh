#!/usr/bin/env bash
# Tests and benchmarks on a GPU, in stages that fit into calls of 9 minutes: every figure of the README's GPU table, and
# of the reproduction the memory at full size and, if data/ has the model and the tasks, the grid of accuracies.
#
#     bash scripts/gpu.sh                    # the stages that are not done yet, for at most 8.5 minutes
#     bash scripts/gpu.sh tests kernels      # these alone
#     bash scripts/gpu.sh --dry-run          # all stages at toy size on the CPU, kernels in Triton's interpreter
#     bash scripts/gpu.sh --list
#
# Call it again until it says "all stages are done". A stage is done when its result is in scripts/benchmarks/results/
# (RESULTS names another folder) or, of the reproduction, in scripts/reproduce/results/, the tests when they have passed
# at this version of the files. Uses the torch, transformers and peft that PYTHON (default: python3) finds; stage qdora
# needs bitsandbytes, stage tests pytest.
# Where the files come without their repository, DORA_PEFT_COMMIT names the commit for the results.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
export RESULTS=${RESULTS:-scripts/benchmarks/results} PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
LIMIT=${LIMIT:-510}
DEVICE=cuda
TOY=()
STAGES=(
    tests kernels step_3b step_3b_default step_8b step_8b_default compiled rank_384 qwen memory eval decode qdora
    reproduce_memory
)
[ ! -d data/smollm2 ] || STAGES+=(reproduce_accuracy)
REPRODUCTION=scripts/reproduce/results

bench() { # SUITE MODEL TAG OPTIONS...
    local suite=$1 model=$2 tag=$3
    shift 3
    "${RUN[@]}" scripts/benchmark.py "$suite" --device "$DEVICE" --model "$model" --tag "$tag" --dtype bf16 \
        --results "$RESULTS" "$@" "${TOY[@]}"
}

run_stage() {
    local main="--contenders dora,frozen,lora_floor" long="--batch 1 --seq-len 2048 --rounds 7"
    # shellcheck disable=SC2086  # the words of these are options
    case $1 in
    tests)
        if [ "$DEVICE" = cpu ]; then
            "${RUN[@]}" -m pytest -q -p no:cacheprovider tests/ops/test_choice.py tests/ops/kernels/test_fused.py
        else
            "${RUN[@]}" -m pytest -q -p no:cacheprovider -m "gpu or not gpu" \
                tests/ops/kernels
        fi
        ;;
    kernels) "${RUN[@]}" scripts/benchmark_kernels.py --device "$DEVICE" --results "$RESULTS" ${TOY_KERNELS:-} ;;
    step_3b) bench step llama-3.2-3b step_3b --adapter-dtype bf16 $long $main ;;
    step_3b_default) bench step llama-3.2-3b step_3b_default $long $main ;;
    step_8b) bench step llama-3-8b step_8b --adapter-dtype bf16 $long $main ;;
    step_8b_default) bench step llama-3-8b step_8b_default $long $main ;;
    compiled) bench step llama-3.2-3b compiled --layers 8 --adapter-dtype bf16 --compile $long --contenders dora ;;
    rank_384)
        bench step llama-3-8b rank_384 --layers 16 --rank 384 --adapter-dtype bf16 --accumulation 8 \
            --checkpointing non-reentrant --batch 1 --seq-len 2048 --rounds 5 --warmup 1 --contenders dora
        ;;
    qwen)
        bench step qwen3-8b qwen --rank 384 --adapter-dtype bf16 --accumulation 8 --checkpointing non-reentrant \
            --batch 1 --seq-len 4096 --rounds 5 --warmup 1 --contenders dora
        ;;
    memory) bench memory llama-3.2-3b memory --batch 1 --seq-len 2048 --contenders dora --repeats 1 ${TOY_MEMORY:-} ;;
    eval) bench eval llama-3.2-3b eval --adapter-dtype bf16 $long $main ;;
    decode) bench decode llama-3.2-3b decode --adapter-dtype bf16 --new-tokens 32 $main ;;
    qdora) "${RUN[@]}" scripts/benchmark_qdora.py --device "$DEVICE" --results "$RESULTS" ${TOY_QDORA:-} ;;
    reproduce_memory)
        "${RUN[@]}" scripts/reproduce.py memory --size full --results "$REPRODUCTION" ${TOY_REPRODUCTION:-}
        ;;
    reproduce_accuracy)
        "${RUN[@]}" scripts/reproduce.py accuracy --tasks spelling cities --ranks 2 4 8 16 32 --num_rates 3 \
            --results "$REPRODUCTION"
        ;;
    *)
        echo "error: no stage '$1'; there are: ${STAGES[*]}" >&2
        return 2
        ;;
    esac
}

fingerprint() {
    {
        find dora_peft -name '*.py' | LC_ALL=C sort | xargs cat
        find tests/ops/kernels -name '*.py' | LC_ALL=C sort | xargs cat
    } | cksum | cut -d' ' -f1
}

is_done() {
    case $1 in
    tests) [ -e "$RESULTS/tests_$DEVICE.txt" ] && grep -q "$(fingerprint)" "$RESULTS/tests_$DEVICE.txt" ;;
    kernels | qdora) [ -e "$RESULTS/$1_$DEVICE.json" ] ;;
    reproduce_memory) grep -qs '"summary"' "$REPRODUCTION/memory_full.json" ;;
    reproduce_accuracy) # that of a CPU may lie there
        grep -qs '"summary"' "$REPRODUCTION/accuracy_laptop.json" &&
            grep -q '"device": "cuda"' "$REPRODUCTION/accuracy_laptop.json"
        ;;
    *) compgen -G "$RESULTS/*_${DEVICE}_$1.json" >/dev/null ;;
    esac
}

chosen=()
for word in "$@"; do
    case $word in
    --dry-run)
        DEVICE=cpu LIMIT=100000
        RESULTS=$(mktemp -d)
        REPRODUCTION=$RESULTS
        # It trains the real model.
        [ "${STAGES[-1]}" != reproduce_accuracy ] || unset 'STAGES[-1]'
        trap 'rm -rf "$RESULTS"' EXIT
        export TRITON_INTERPRET=1 OMP_NUM_THREADS=1
        # the last of two equal options counts
        TOY=(--model tiny --layers 1 --batch 1 --seq-len 8 --rank 2 --rounds 2 --warmup 1 --accumulation 1
            --new-tokens 2 --repeats 1 --contenders "dora,dora:triton")
        # Peaks take a process for each figure.
        TOY_MEMORY=--no-peak
        TOY_REPRODUCTION=--dry_run
        TOY_KERNELS="--tokens 64 --width 48 --rank 4 --rounds 2"
        TOY_QDORA="--hidden 64 --layers 1 --vocab 64 --tokens 8 --rank 2 --rounds 2"
        ;;
    --list)
        printf '%s\n' "${STAGES[@]}"
        exit
        ;;
    *) chosen+=("$word") ;;
    esac
done
[ ${#chosen[@]} -gt 0 ] || chosen=("${STAGES[@]}")

failed=() left=()
for stage in "${chosen[@]}"; do
    if is_done "$stage"; then
        echo "$stage: done before"
        continue
    fi
    remaining=$((LIMIT - SECONDS))
    if [ "$remaining" -lt 20 ]; then
        left+=("$stage")
        continue
    fi
    printf '\n=== %s, %s s left ===\n' "$stage" "$remaining"
    RUN=(timeout "$remaining" "$PYTHON")
    status=0
    run_stage "$stage" || status=$?
    if [ "$status" -eq 124 ] && [ "$remaining" -lt "$((LIMIT - 60))" ]; then
        left+=("$stage") # it may end in a call for it alone
    elif [ "$status" -ne 0 ]; then
        failed+=("$stage ($status)")
    elif [ "$stage" = tests ]; then
        echo "passed at $(fingerprint), $(date -u +%F)" >"$RESULTS/tests_$DEVICE.txt"
    fi
done

echo
[ ${#left[@]} -eq 0 ] || echo "left for another call: ${left[*]}"
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" && exit 1; }
if [ ${#left[@]} -eq 0 ]; then echo "all stages are done"; fi
