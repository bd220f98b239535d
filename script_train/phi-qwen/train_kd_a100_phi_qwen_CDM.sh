#!/usr/bin/env bash
# CDM: distils Phi-3-mini into Qwen2-0.5B. Settings go in front, further arguments of modeling/run_clm_distill_CDM.py
# behind; for DEVICE, NPROC, PRECISION, DRY_RUN and others see launch.sh.
#
#     EPOCHS=5 DATA=data/dolly_train.jsonl bash script_train/phi-qwen/train_kd_a100_phi_qwen_CDM.sh --save_total_limit 2
set -euo pipefail
# shellcheck disable=SC2034 # script_train/methods.py reads it
METHOD=CDM SCRIPT=run_clm_distill_CDM.py PAIR=any ORDER=6
source "$(dirname -- "${BASH_SOURCE[0]}")/../launch.sh"

TEACHER=${TEACHER:-microsoft/Phi-3-mini-4k-instruct}   # hub name or folder; the paper's teachers are fine-tuned first (train_sft_a100_phi.sh)
STUDENT=${STUDENT:-Qwen/Qwen2-0.5B}                    # hub name or folder
DATA=${DATA:-$CDM_ROOT/data/dolly_train.sample.json}   # the 50-row sample; data/prepare_data.py makes the full file
VALIDATION=${VALIDATION:-}                             # held-out file of the same form; none = no evaluation
OUTPUT=${OUTPUT:-$CDM_ROOT/outputs/phi_qwen_cdm}       # the trained student, its logs and its curves

MAPPER_KIND=${MAPPER_KIND:-em}                         # em, MinED or prefixEM: what "exact match" means in step 4
MAPPER=${MAPPER:-$CDM_ROOT/outputs/mappers/${TEACHER##*/}-to-${STUDENT##*/}.$MAPPER_KIND.safetensors}  # built if not there
KD_ALPHA=${KD_ALPHA:-0.5}                              # share of cross-entropy in the loss, 0 to 1
KD_TEMPERATURE=${KD_TEMPERATURE:-1.0}                  # divides both sides' logits
TOPK=${TOPK:-100}                                      # tokens of each side that a group maps
SIMI_THRESHOLD=${SIMI_THRESHOLD:-0.3}                  # nearer strings count as similar; a larger one needs a new MAPPER
ALIGNMENT=${ALIGNMENT:-dtw}                            # dtw (the paper's) or byte (exact, by byte positions)

EPOCHS=${EPOCHS:-3}
LEARNING_RATE=${LEARNING_RATE:-2e-5}
SCHEDULER=${SCHEDULER:-cosine}
WARMUP=${WARMUP:-0.03}                                 # steps, or below 1 the share of all steps
BATCH_SIZE=${BATCH_SIZE:-4}                            # examples a device and forward
ACCUMULATION=${ACCUMULATION:-8}                        # forwards a step
BLOCK_SIZE=${BLOCK_SIZE:-512}                          # tokens an example may have, on either side
SEED=${SEED:-42}

[[ -f $MAPPER ]] || build_mapper
train --teacher_to_student_id_mapping "$MAPPER" --topk "$TOPK" --simi_threshold "$SIMI_THRESHOLD" \
    --alignment "$ALIGNMENT" "$@"
