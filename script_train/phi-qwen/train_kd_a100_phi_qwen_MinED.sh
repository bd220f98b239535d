#!/usr/bin/env bash
# MinED: distils Phi-3-mini into Qwen2-0.5B. Every setting can be given in front of the command, and any further
# argument of modeling/run_clm_MinED.py behind it:
#
#     EPOCHS=5 DATA=data/dolly_train.jsonl bash script_train/phi-qwen/train_kd_a100_phi_qwen_MinED.sh --save_total_limit 2
#
# DEVICE, NPROC, HOSTFILE, PRECISION, PYTHON and DRY_RUN: see script_train/launch.sh.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/../launch.sh"

TEACHER=${TEACHER:-microsoft/Phi-3-mini-4k-instruct}   # hub name or folder; the paper's teachers are fine-tuned first (train_sft_a100_phi.sh)
STUDENT=${STUDENT:-Qwen/Qwen2-0.5B}                    # hub name or folder
DATA=${DATA:-$CDM_ROOT/data/dolly_train.sample.json}   # the 50-row sample; data/prepare_data.py makes the full file
VALIDATION=${VALIDATION:-}                             # held-out file of the same form; none = no evaluation
OUTPUT=${OUTPUT:-$CDM_ROOT/outputs/phi_qwen_mined}     # the trained student, its logs and its curves

MAPPER=${MAPPER:-$CDM_ROOT/outputs/mappers/${TEACHER##*/}-to-${STUDENT##*/}.MinED.safetensors}  # built if not there
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

if [[ ! -f $MAPPER ]]; then
    run "$PYTHON" "$CDM_ROOT/get_vocab_mapper/get_MinED_mapper.py" \
        --teacher "$TEACHER" --student "$STUDENT" --output "$MAPPER"
fi
echo "mapper: $MAPPER" >&2

evaluation=()
if [[ -n $VALIDATION ]]; then
    evaluation=(--do_eval true --validation_file "$VALIDATION" --eval_strategy epoch)
fi

launch modeling/run_clm_MinED.py \
    --model_name_or_path "$STUDENT" \
    --teacher_path "$TEACHER" \
    --teacher_to_student_id_mapping "$MAPPER" \
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
