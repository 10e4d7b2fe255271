#!/usr/bin/env bash
# Checks and benchmarks on a GPU, in stages that fit into calls of a few minutes: every figure of the README's GPU table,
# and of the reproduction the memory at full size and, if data/ has the model and the tasks, the grid of accuracies.
#
#     bash scripts/gpu.sh                     # the stages that are not done yet, for at most 8.5 minutes (LIMIT=seconds)
#     bash scripts/gpu.sh checks kernels      # these alone; --again: also if they are done
#     bash scripts/gpu.sh --list              # the stages in order, how long each takes, and what it needs
#     bash scripts/gpu.sh --read ARCHIVE      # put results of another machine into scripts/benchmarks/results/
#     bash scripts/gpu.sh --dry-run           # all stages at toy size on the CPU, kernels in Triton's interpreter
#
# Call it again until it says "all stages are done". The order is: versions, 40 checks of values, compiling, then what is
# measured, the most wanted first. A stage that fails, or whose package is missing, does not stop the others.
#
# After every stage all results, logs, compiled kernels and what is done lie in one archive, gpu.tar.gz, in the folder
# GPU_OUT, else OUT if that is a folder, else scripts/benchmarks/results/gpu. A call on a bare machine goes on from the
# archive there, or from another one with --resume-from ARCHIVE. Example, for a machine that keeps nothing but $OUT:
#
#     DORA_PEFT_COMMIT=0123abc bash scripts/gpu.sh                            # there, brings home $OUT/gpu.tar.gz
#     bash scripts/gpu.sh --read gpu.tar.gz && python scripts/update_readme.py    # here
#     DORA_PEFT_COMMIT=0123abc bash scripts/gpu.sh --resume-from gpu.tar.gz   # there again
#
# Uses the torch, transformers and peft that PYTHON (default: python3) finds. RESULTS names another folder of results,
# GPU_WORK another one for caches and logs (outputs/gpu), DORA_PEFT_COMMIT the commit where there is no repository.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" scripts/run_gpu.py "$@"
