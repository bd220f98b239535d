#!/usr/bin/env bash
# RKD: distils Qwen2-7B into Qwen2-0.5B, which has the same tokenizer, by reverse KL. Every setting can be given in front
# of the command, and any further argument of modeling/run_clm_llms_rkd.py behind it:
#
#     EPOCHS=5 DATA=data/dolly_train.jsonl bash script_train/phi-qwen/train_kd_a100_qwen_qwen_RKD.sh --save_total_limit 2
#
# DEVICE, NPROC, HOSTFILE, PRECISION, PYTHON and DRY_RUN: see script_train/launch.sh.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/../launch.sh"

TEACHER=${TEACHER:-Qwen/Qwen2-7B}                      # hub name or folder; the tokenizer must be the student's
STUDENT=${STUDENT:-Qwen/Qwen2-0.5B}                    # hub name or folder
DATA=${DATA:-$CDM_ROOT/data/dolly_train.sample.json}   # the 50-row sample; data/prepare_data.py makes the full file
VALIDATION=${VALIDATION:-}                             # held-out file of the same form; none = no evaluation
OUTPUT=${OUTPUT:-$CDM_ROOT/outputs/qwen_qwen_rkd}      # the trained student, its logs and its curves

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
ZERO=${ZERO:-2}                                        # DeepSpeed ZeRO stage, 2 or 3
WORKERS=${WORKERS:-4}                                  # processes that tokenise the data
REPORT_TO=${REPORT_TO:-tensorboard}                    # tensorboard or none

evaluation=()
if [[ -n $VALIDATION ]]; then
    evaluation=(--do_eval true --validation_file "$VALIDATION" --eval_strategy epoch)
fi

launch modeling/run_clm_llms_rkd.py \
    --model_name_or_path "$STUDENT" \
    --teacher_path "$TEACHER" \
    --train_file "$DATA" \
    --output_dir "$OUTPUT" \
    --do_train true \
    --kd_alpha "$KD_ALPHA" \
    --kd_temperature "$KD_TEMPERATURE" \
    --block_size "$BLOCK_SIZE" \
    --preprocessing_num_workers "$WORKERS" \
    --num_train_epochs "$EPOCHS" \
    --learning_rate "$LEARNING_RATE" \
    --lr_scheduler_type "$SCHEDULER" \
    --warmup_steps "$WARMUP" \
    --per_device_train_batch_size "$BATCH_SIZE" \
    --per_device_eval_batch_size "$BATCH_SIZE" \
    --gradient_accumulation_steps "$ACCUMULATION" \
    --logging_steps 10 \
    --save_strategy epoch \
    --seed "$SEED" \
    --report_to "$REPORT_TO" \
    "${evaluation[@]}" "$@"
