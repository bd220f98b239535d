#!/usr/bin/env bash
# SFT of Phi-3-mini on the training rows, before it teaches: then TEACHER=outputs/phi_sft in the distillation scripts.
# Settings go in front, further arguments of modeling/run_clm_sft.py behind; for DEVICE, NPROC, PRECISION, DRY_RUN and
# others see launch.sh.
#
#     EPOCHS=5 DATA=data/dolly_train.jsonl bash script_train/phi-qwen/train_sft_a100_phi.sh --save_total_limit 2
set -euo pipefail
SCRIPT=run_clm_sft.py PAIR=none
source "$(dirname -- "${BASH_SOURCE[0]}")/../launch.sh"

TEACHER=${TEACHER:-microsoft/Phi-3-mini-4k-instruct}   # hub name or folder
DATA=${DATA:-$CDM_ROOT/data/dolly_train.sample.json}   # the 50-row sample; data/prepare_data.py makes the full file
VALIDATION=${VALIDATION:-}                             # held-out file of the same form; none = no evaluation
OUTPUT=${OUTPUT:-$CDM_ROOT/outputs/phi_sft}            # the trained model, its logs and its curves

EPOCHS=${EPOCHS:-3}
LEARNING_RATE=${LEARNING_RATE:-1e-5}
SCHEDULER=${SCHEDULER:-cosine}
WARMUP=${WARMUP:-0.03}                                 # steps, or below 1 the share of all steps
BATCH_SIZE=${BATCH_SIZE:-2}                            # examples a device and forward
ACCUMULATION=${ACCUMULATION:-16}                       # forwards a step
BLOCK_SIZE=${BLOCK_SIZE:-512}                          # tokens an example may have
SEED=${SEED:-42}
ZERO=${ZERO:-3}                                        # DeepSpeed ZeRO stage, 2 or 3; 3 shards the 3.8 billion weights too

STUDENT=$TEACHER   # the model that is trained
train --gradient_checkpointing true "$@"
