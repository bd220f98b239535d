#!/usr/bin/env bash
# SFT of Qwen2-0.5B: the baseline without a teacher. Settings go in front, further arguments of modeling/run_clm_sft.py
# behind; for DEVICE, NPROC, PRECISION, DRY_RUN and others see launch.sh.
#
#     EPOCHS=5 DATA=data/dolly_train.jsonl bash script_train/phi-qwen/train_sft_a100_qwen.sh --save_total_limit 2
set -euo pipefail
# shellcheck disable=SC2034 # script_train/methods.py reads it
METHOD=SFT SCRIPT=run_clm_sft.py PAIR=none ORDER=1
source "$(dirname -- "${BASH_SOURCE[0]}")/../launch.sh"

STUDENT=${STUDENT:-Qwen/Qwen2-0.5B}                    # hub name or folder
DATA=${DATA:-$CDM_ROOT/data/dolly_train.sample.json}   # the 50-row sample; data/prepare_data.py makes the full file
VALIDATION=${VALIDATION:-}                             # held-out file of the same form; none = no evaluation
OUTPUT=${OUTPUT:-$CDM_ROOT/outputs/qwen_sft}           # the trained model, its logs and its curves

EPOCHS=${EPOCHS:-3}
LEARNING_RATE=${LEARNING_RATE:-2e-5}
SCHEDULER=${SCHEDULER:-cosine}
WARMUP=${WARMUP:-0.03}                                 # steps, or below 1 the share of all steps
BATCH_SIZE=${BATCH_SIZE:-4}                            # examples a device and forward
ACCUMULATION=${ACCUMULATION:-8}                        # forwards a step
BLOCK_SIZE=${BLOCK_SIZE:-512}                          # tokens an example may have
SEED=${SEED:-42}

train "$@"
