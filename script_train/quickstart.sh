#!/usr/bin/env bash
# From nothing to a distilled student, on a CPU, in a few minutes: installs the project, fetches a real teacher, makes
# a small student with another tokenizer, trains it with SFT and with CDM, and compares the two on held-out rows.
#
#     bash script_train/quickstart.sh
#
# A step that is done is not done again, unless one of its settings, or of a step before it, has changed. FRESH=1 starts
# over. Every setting can be given in front of the command. PYTHON, VENV and BASE_PYTHON: see setup_env.sh; DEVICE and
# PRECISION: see launch.sh.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
started=$SECONDS

OUTPUT=${OUTPUT:-$here/../outputs/quickstart}
FRESH=${FRESH:-0}                        # 1 forgets all earlier steps
NPROC=${NPROC:-1}                        # processes; these models are too small to gain from more
SEED=${SEED:-42}
BLOCK_SIZE=${BLOCK_SIZE:-320}            # tokens an example may have, on either side

TEACHER_EPOCHS=${TEACHER_EPOCHS:-1}      # the teacher is fine-tuned on the training rows first, as in the paper
TEACHER_LEARNING_RATE=${TEACHER_LEARNING_RATE:-5e-5}

VOCAB_SIZE=${VOCAB_SIZE:-2048}           # the student: its tokenizer, and the size of its Llama
HIDDEN=${HIDDEN:-256}
LAYERS=${LAYERS:-4}
HEADS=${HEADS:-4}

EPOCHS=${EPOCHS:-5}                      # of SFT and of CDM alike, as is all that follows
LEARNING_RATE=${LEARNING_RATE:-1e-3}
BATCH_SIZE=${BATCH_SIZE:-4}
KD_ALPHA=${KD_ALPHA:-0.5}                # CDM alone from here on
KD_TEMPERATURE=${KD_TEMPERATURE:-1.0}
TOPK=${TOPK:-100}
SIMI_THRESHOLD=${SIMI_THRESHOLD:-0.3}
ALIGNMENT=${ALIGNMENT:-dtw}

precision_wanted=${PRECISION:-}          # on a CPU by default what is faster there, bf16 or fp32

# ------------------------------------------------------------------------------------------------------ installation

source "$here/setup_env.sh"
setup_env requirements.txt
source "$here/launch.sh"
choose_devices

mkdir -p "$OUTPUT"
OUTPUT=$(cd "$OUTPUT" && pwd)
data=$OUTPUT/data
teacher_base=$OUTPUT/teacher_base
teacher=$OUTPUT/teacher
student=$OUTPUT/student
mapper=$OUTPUT/em_mapper.safetensors
export TOKENIZERS_PARALLELISM=false

# --------------------------------------------------------------------------------------------------------- the steps

source "$here/steps.sh"
steps=10

[[ $FRESH != 1 ]] || rm -rf "$OUTPUT/.done" "$OUTPUT/precision.txt"
mkdir -p "$OUTPUT/.done"

models() { "$PYTHON" "$here/quickstart_models.py" "$@"; }

# train_and_evaluate SCRIPT MODEL OUTPUT EPOCHS LEARNING_RATE ARGUMENTS…
train_and_evaluate() {
    local script=$1 model=$2 output=$3 epochs=$4 learning_rate=$5
    shift 5
    rm -rf "$output"
    launch "modeling/$script" --model_name_or_path "$model" --output_dir "$output" \
        --do_train true --train_file "$data/train.json" --num_train_epochs "$epochs" \
        --do_eval true --validation_file "$data/held_out.json" --eval_strategy epoch \
        --learning_rate "$learning_rate" --lr_scheduler_type cosine --warmup_steps 0.1 \
        --block_size "$BLOCK_SIZE" --per_device_train_batch_size "$BATCH_SIZE" --per_device_eval_batch_size 5 \
        --logging_steps 10 --save_strategy no --report_to none --seed "$SEED" "$@"
}

evaluate() {
    local script=$1 model=$2 output=$3
    shift 3
    rm -rf "$output"
    # DeepSpeed evaluates without training under ZeRO-3 alone.
    ZERO=3 launch "modeling/$script" --model_name_or_path "$model" --output_dir "$output" \
        --do_eval true --validation_file "$data/held_out.json" \
        --block_size "$BLOCK_SIZE" --per_device_eval_batch_size 5 --report_to none "$@"
}

samples=("$CDM_ROOT"/data/{dolly_train,code_tuning,math_tuning}.sample.json)
so_far="$BLOCK_SIZE $BATCH_SIZE $SEED $(cat "${samples[@]}" | cksum)"
do_step "Rows: 45 of each sample file to train, 5 held out" \
    models split --data "${samples[@]}" --output "$data"

do_step "Teacher: SmolLM2-135M-Instruct" \
    models teacher --output "$teacher_base" --downloads "$OUTPUT/downloads" --held_out "$data/held_out.json"

if [[ $DEVICE == cpu && -z $precision_wanted ]]; then
    [[ -s $OUTPUT/precision.txt ]] || models precision >"$OUTPUT/precision.txt"   # measured once: reruns must agree
    PRECISION=$(<"$OUTPUT/precision.txt")
fi
so_far+="$DEVICE $PRECISION"
printf '\nDevice: %s, precision: %s\n' "$DEVICE" "$PRECISION"

do_step "The teacher as it comes, on the held-out rows" \
    evaluate run_clm_sft.py "$teacher_base" "$OUTPUT/eval_teacher_base"

do_step "The teacher is fine-tuned on the training rows" \
    train_and_evaluate run_clm_sft.py "$teacher_base" "$teacher" "$TEACHER_EPOCHS" "$TEACHER_LEARNING_RATE"

do_step "Student: a small Llama, and a tokenizer of its own" \
    models student --output "$student" --train_file "$data/train.json" --vocab_size "$VOCAB_SIZE" \
    --hidden "$HIDDEN" --layers "$LAYERS" --heads "$HEADS" --seed "$SEED"

do_step "Vocabulary mapper: exact matches" \
    "$PYTHON" "$CDM_ROOT/get_vocab_mapper/get_em_mapper.py" --teacher "$teacher_base" --student "$student" \
    --simi_threshold "$SIMI_THRESHOLD" --output "$mapper"

distillation=(--teacher_path "$teacher" --teacher_to_student_id_mapping "$mapper" --kd_alpha "$KD_ALPHA"
    --kd_temperature "$KD_TEMPERATURE" --topk "$TOPK" --simi_threshold "$SIMI_THRESHOLD" --alignment "$ALIGNMENT")

do_step "The untrained student, on the held-out rows" \
    evaluate run_clm_distill_CDM.py "$student" "$OUTPUT/eval_student" "${distillation[@]}"

do_step "SFT: the student alone" \
    train_and_evaluate run_clm_sft.py "$student" "$OUTPUT/sft" "$EPOCHS" "$LEARNING_RATE"

do_step "The student after SFT, on the held-out rows, beside the teacher" \
    evaluate run_clm_distill_CDM.py "$OUTPUT/sft" "$OUTPUT/eval_sft" "${distillation[@]}"

do_step "CDM: the same student with the teacher" \
    train_and_evaluate run_clm_distill_CDM.py "$student" "$OUTPUT/cdm" "$EPOCHS" "$LEARNING_RATE" "${distillation[@]}"

"$PYTHON" "$here/quickstart_report.py" "$OUTPUT"
printf '\n%d s in all. The trained students: %s and %s\n' $((SECONDS - started)) "$OUTPUT/sft" "$OUTPUT/cdm"
