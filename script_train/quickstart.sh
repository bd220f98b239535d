#!/usr/bin/env bash
# From nothing to a distilled student, on a CPU, in ten to twenty minutes: installs the project, fetches a real model,
# makes a student of it with another tokenizer, trains that with SFT and with CDM, and compares the two on held-out rows.
#
#     bash script_train/quickstart.sh
#
# A step that is done is not done again; what was made with other settings is named. FRESH=1 starts over. The settings
# of the block below can be given in front of the command. PYTHON, VENV and BASE_PYTHON: see setup_env.sh; DEVICE and
# PRECISION (on a CPU by default bf16 where the processor has it): see launch.sh.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
source "$here/setup_env.sh"
[[ ${DRY_RUN:-0} == 1 ]] || setup_env requirements.txt
source "$here/launch.sh"

set -a                                   # exported: the scripts that it runs read the same names
OUTPUT=${OUTPUT:-$CDM_ROOT/outputs/quickstart}
FRESH=${FRESH:-0}                        # 1 deletes first what earlier calls have made
NPROC=${NPROC:-1}                        # processes; these models are too small to gain from more
SEED=${SEED:-42}
BLOCK_SIZE=${BLOCK_SIZE:-320}            # tokens an example may have, on either side

TEACHER_EPOCHS=${TEACHER_EPOCHS:-1}      # the teacher is fine-tuned on the training rows first, as in the paper
TEACHER_LEARNING_RATE=${TEACHER_LEARNING_RATE:-5e-5}

VOCAB_SIZE=${VOCAB_SIZE:-4096}           # of the student's tokenizer, which is trained on the rows

EPOCHS=${EPOCHS:-1}                      # of SFT and of CDM alike, as is all that follows
LEARNING_RATE=${LEARNING_RATE:-4e-4}
BATCH_SIZE=${BATCH_SIZE:-4}              # the teacher's too
KD_ALPHA=${KD_ALPHA:-0.9}                # of CDM alone
KD_TEMPERATURE=${KD_TEMPERATURE:-1.0}    # of CDM, and of the KD to the teacher that is measured of all, as what follows
TOPK=${TOPK:-100}
SIMI_THRESHOLD=${SIMI_THRESHOLD:-0.3}
ALIGNMENT=${ALIGNMENT:-dtw}

WARMUP=0.1 ACCUMULATION=1 WORKERS=1 CHECKPOINTS=no REPORT_TO=none
[[ $OUTPUT == /* ]] || OUTPUT=$PWD/$OUTPUT
DATA=$OUTPUT/data/train.json VALIDATION=$OUTPUT/data/held_out.json
TEACHER=$OUTPUT/teacher STUDENT=$OUTPUT/student MAPPER_KIND=em MAPPER=$OUTPUT/em_mapper.safetensors
choose_small_precision
set +a
export PYTHON TOKENIZERS_PARALLELISM=false

samples=("$CDM_ROOT"/data/{dolly_train,code_tuning,math_tuning}.sample.json)
models=("$PYTHON" "$here/quickstart_models.py")
launch=(bash "$here/launch.sh")
train_sft=(bash "$here/phi-qwen/train_sft_a100_qwen.sh")
train_cdm=(bash "$here/phi-qwen/train_kd_a100_phi_qwen_CDM.sh")

# step ID RESULT NAME COMMAND…: a step of steps.py that builds on all before it.
number=0 before=("${samples[@]}")
step() {
    number=$((number + 1))
    supervise "$PYTHON" "$here/steps.py" "$OUTPUT" "$1" "$2" "[$number/11] $3" "${before[@]}" -- "${@:4}"
    before+=("$1")
}

printf 'Device: %s, precision: %s\n' "$DEVICE" "$PRECISION"
[[ $FRESH != 1 ]] || run "$PYTHON" "$here/steps.py" --start_over "$OUTPUT"

step data data/held_out.json "Rows: 45 of each sample file to train, 5 held out" \
    "${models[@]}" split --data "${samples[@]}" --output "$OUTPUT/data"

step teacher_base teacher_base/config.json "Teacher: SmolLM2-135M-Instruct" \
    "${models[@]}" teacher --output "$OUTPUT/teacher_base" --downloads "$OUTPUT/downloads" --held_out "$VALIDATION"

step teacher_untuned references/teacher_untuned/eval_results.json "The teacher as it comes, on the held-out rows" \
    env OUTPUT="$OUTPUT/references/teacher_untuned" "${launch[@]}" evaluate run_clm_sft.py "$OUTPUT/teacher_base"

step teacher teacher/eval_results.json "The teacher is fine-tuned on the training rows" \
    env OUTPUT="$TEACHER" STUDENT="$OUTPUT/teacher_base" EPOCHS="$TEACHER_EPOCHS" \
    LEARNING_RATE="$TEACHER_LEARNING_RATE" "${train_sft[@]}"

step student student/config.json "Student: the same network with a tokenizer of its own" \
    "$PYTHON" "$here/make_transfer_pair.py" --model "$OUTPUT/teacher_base" --train_tokenizer "$DATA" \
    --vocab_size "$VOCAB_SIZE" --output "$STUDENT" --overwrite

step em_mapper em_mapper.safetensors "Vocabulary mapper: exact matches" \
    "${launch[@]}" build_mapper

step student_untrained references/student_untrained/eval_results.json "The untrained student, on the held-out rows" \
    env OUTPUT="$OUTPUT/references/student_untrained" "${launch[@]}" evaluate_student "$STUDENT"

step sft sft/eval_results.json "SFT: the student alone" \
    env OUTPUT="$OUTPUT/sft" "${train_sft[@]}"

step sft_held_out sft/evaluation/eval_results.json "The student after SFT, on the held-out rows, beside the teacher" \
    env OUTPUT="$OUTPUT/sft/evaluation" "${launch[@]}" evaluate_student "$OUTPUT/sft"

step cdm cdm/eval_results.json "CDM: the same student with the teacher" \
    env OUTPUT="$OUTPUT/cdm" "${train_cdm[@]}"

step answers answers/answers.md "Three held-out prompts, and what the models answer" \
    "${models[@]}" answers --held_out "$VALIDATION" --output "$OUTPUT/answers" \
    --models teacher="$TEACHER" SFT="$OUTPUT/sft" CDM="$OUTPUT/cdm"

run "$PYTHON" "$CDM_ROOT/script_eval/summarize.py" "$OUTPUT/sft" "$OUTPUT/cdm" --margin 0.05 --output "$OUTPUT/summary" \
    --references "$OUTPUT/references/teacher_untuned" "$TEACHER" "$OUTPUT/references/student_untrained"
run cat "$OUTPUT/answers/answers.md"
printf '\n%d s in all. The trained students: %s and %s\n' "$SECONDS" "$OUTPUT/sft" "$OUTPUT/cdm"
