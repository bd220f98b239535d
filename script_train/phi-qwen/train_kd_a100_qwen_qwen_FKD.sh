#!/usr/bin/env bash
# FKD: distils Qwen2-7B into Qwen2-0.5B, which has the same tokenizer, by forward KL. Settings go in front, further
# arguments of modeling/run_clm_llms_fkd.py behind; for DEVICE, NPROC, PRECISION, DRY_RUN and others see launch.sh.
#
#     EPOCHS=5 DATA=data/dolly_train.jsonl bash script_train/phi-qwen/train_kd_a100_qwen_qwen_FKD.sh --save_total_limit 2
set -euo pipefail
# shellcheck disable=SC2034 # script_train/methods.py reads it
METHOD=FKD SCRIPT=run_clm_llms_fkd.py PAIR=same ORDER=2
source "$(dirname -- "${BASH_SOURCE[0]}")/../launch.sh"

TEACHER=${TEACHER:-Qwen/Qwen2-7B}                      # hub name or folder; the tokenizer must be the student's
STUDENT=${STUDENT:-Qwen/Qwen2-0.5B}                    # hub name or folder
DATA=${DATA:-$CDM_ROOT/data/dolly_train.sample.json}   # the 50-row sample; data/prepare_data.py makes the full file
VALIDATION=${VALIDATION:-}                             # held-out file of the same form; none = no evaluation
OUTPUT=${OUTPUT:-$CDM_ROOT/outputs/qwen_qwen_fkd}      # the trained student, its logs and its curves

KD_ALPHA=${KD_ALPHA:-0.5}                              # share of cross-entropy in the loss, 0 to 1
KD_TEMPERATURE=${KD_TEMPERATURE:-2.0}                  # divides both sides' logits

EPOCHS=${EPOCHS:-3}
LEARNING_RATE=${LEARNING_RATE:-2e-5}
SCHEDULER=${SCHEDULER:-cosine}
WARMUP=${WARMUP:-0.03}                                 # steps, or below 1 the share of all steps
BATCH_SIZE=${BATCH_SIZE:-4}                            # examples a device and forward
ACCUMULATION=${ACCUMULATION:-8}                        # forwards a step
BLOCK_SIZE=${BLOCK_SIZE:-512}                          # tokens an example may have, on either side
SEED=${SEED:-42}

train "$@"
