#!/usr/bin/env bash
# Which method suits this teacher, this student and this data? Fine-tunes the teacher on the data, trains the student by
# every method that fits the pair, with one budget and over several seeds, measures all of them in the same way, and
# makes one table and two pictures.
#
#     TEACHER=microsoft/Phi-3-mini-4k-instruct STUDENT=Qwen/Qwen2-0.5B DATA=train.jsonl VALIDATION=dev.jsonl \
#         bash script_train/compare_methods.sh
#     SMALL=1 bash script_train/compare_methods.sh        # on a CPU, with models and data of its own
#
# Every setting can be given in front of the command, and behind it any further argument that all training scripts have,
# for the students' trainings. Interrupted, it goes on where it stopped: a training at its last checkpoint. Another
# setting does again, in place, what depends on it: to keep both results, give another OUTPUT.
#
# DEVICE, NPROC, HOSTFILE, PRECISION, PYTHON and DRY_RUN: see launch.sh; VENV and BASE_PYTHON: see setup_env.sh;
# TEMPERATURE, TOP_P, TOP_K, DSKD_COMPAT, DTYPE and ROUGE_TOKENIZER: see script_eval/eval_dolly.sh.
set -euo pipefail
# shellcheck disable=SC2329 # the functions are handed to step, which invokes them
{   # bash reads all of it before it begins: the file may be edited while it runs
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
started=$SECONDS
source "$here/setup_env.sh"
[[ ${DRY_RUN:-0} == 1 ]] || setup_env requirements.txt
source "$here/launch.sh"
source "$here/steps.sh"

SMALL=${SMALL:-0}                                      # 1: the quickstart's teacher, student and rows; needs nothing else
if [[ $SMALL == 1 ]]; then                             # what is another default there
    OUTPUT=${OUTPUT:-$CDM_ROOT/outputs/comparison_small}
    TEACHER_EPOCHS=${TEACHER_EPOCHS:-1} TEACHER_LEARNING_RATE=${TEACHER_LEARNING_RATE:-5e-5}
    TEACHER_BATCH_SIZE=${TEACHER_BATCH_SIZE:-4} TEACHER_ACCUMULATION=${TEACHER_ACCUMULATION:-1}
    EPOCHS=${EPOCHS:-4} LEARNING_RATE=${LEARNING_RATE:-1e-3} WARMUP=${WARMUP:-0.1}
    BATCH_SIZE=${BATCH_SIZE:-4} ACCUMULATION=${ACCUMULATION:-1} BLOCK_SIZE=${BLOCK_SIZE:-320}
    CHECKPOINTS=${CHECKPOINTS:-no} WORKERS=${WORKERS:-1} NPROC=${NPROC:-1}
    EVAL_SEEDS=${EVAL_SEEDS:-10 20 30} MAX_LENGTH=${MAX_LENGTH:-288} MAX_PROMPT_LENGTH=${MAX_PROMPT_LENGTH:-192}
fi

TEACHER=${TEACHER:-}                                   # hub name or folder
STUDENT=${STUDENT:-}                                   # hub name or folder
DATA=${DATA:-}                                         # rows to learn; see "The data" in README.md
VALIDATION=${VALIDATION:-}                             # held-out rows of the same form
OUTPUT=${OUTPUT:-$CDM_ROOT/outputs/comparison}         # runs/METHOD/seed_N, references, summary and what they need
SEEDS=${SEEDS:-1 2 3}                                  # each method is trained once with each
METHODS=${METHODS:-SFT FKD RKD ULD MinED CDM}          # FKD and RKD are left out where the tokenizers differ

TEACHER_READY=${TEACHER_READY:-0}                      # 1: it knows the data already, and is taken as it is
TEACHER_EPOCHS=${TEACHER_EPOCHS:-3}                    # how it is fine-tuned
TEACHER_LEARNING_RATE=${TEACHER_LEARNING_RATE:-1e-5}
TEACHER_BATCH_SIZE=${TEACHER_BATCH_SIZE:-2}
TEACHER_ACCUMULATION=${TEACHER_ACCUMULATION:-16}
TEACHER_SEED=${TEACHER_SEED:-42}
TEACHER_ZERO=${TEACHER_ZERO:-3}                        # DeepSpeed ZeRO stage, 2 or 3
TEACHER_CACHE=${TEACHER_CACHE:-1}                      # 1: it runs once over the rows, for all methods, epochs and seeds

EPOCHS=${EPOCHS:-3}                                    # the budget, of every method alike
LEARNING_RATE=${LEARNING_RATE:-2e-5}
SCHEDULER=${SCHEDULER:-cosine}
WARMUP=${WARMUP:-0.03}                                 # steps, or below 1 the share of all steps
BATCH_SIZE=${BATCH_SIZE:-4}                            # examples a device and forward
ACCUMULATION=${ACCUMULATION:-8}                        # forwards a step
BLOCK_SIZE=${BLOCK_SIZE:-512}                          # tokens an example may have, on either side
ZERO=${ZERO:-2}                                        # DeepSpeed ZeRO stage, 2 or 3
WORKERS=${WORKERS:-4}                                  # processes that tokenise the data
CHECKPOINTS=${CHECKPOINTS:-epoch}                      # epoch, or no: an interrupted training starts anew
REPORT_TO=${REPORT_TO:-none}                           # tensorboard or none

KD_ALPHA=${KD_ALPHA:-0.5}                              # share of cross-entropy in the loss, 0 to 1
FKD_TEMPERATURE=${FKD_TEMPERATURE:-2.0}                # divides both sides' logits
RKD_TEMPERATURE=${RKD_TEMPERATURE:-2.0}
ULD_TEMPERATURE=${ULD_TEMPERATURE:-1.0}
ULD_ALPHA=${ULD_ALPHA:-$KD_ALPHA}                      # 0.4 is the CE + 1.5·ULD of its paper
MINED_TEMPERATURE=${MINED_TEMPERATURE:-2.0}
CDM_TEMPERATURE=${CDM_TEMPERATURE:-1.0}                # CDM's are also those with which the KD of all methods is measured
TOPK=${TOPK:-100}                                      # tokens of each side that a group maps
SIMI_THRESHOLD=${SIMI_THRESHOLD:-0.3}                  # nearer strings count as similar, above 0, at most 1
ALIGNMENT=${ALIGNMENT:-dtw}                            # dtw (the paper's) or byte (exact, by byte positions)

EVAL_SETS=${EVAL_SETS:-}                               # for ROUGE-L: sets in DATA_DIR; none = the rows of VALIDATION
DATA_DIR=${DATA_DIR:-$CDM_ROOT/data}                   # holds SET/valid.jsonl, with prompt and output
LIMIT=${LIMIT:-}                                       # the first so many rows of each set; none = all
EVAL_SEEDS=${EVAL_SEEDS:-10 20 30 40 50}               # of the sampled responses
MAX_LENGTH=${MAX_LENGTH:-512}                          # tokens of prompt and response in all
MAX_PROMPT_LENGTH=${MAX_PROMPT_LENGTH:-$((MAX_LENGTH / 2))}
EVAL_BATCH_SIZE=${EVAL_BATCH_SIZE:-16}                 # prompts a device and forward

further=("$@")                                         # arguments of the students' trainings
ALL_METHODS=(SFT FKD RKD ULD MinED CDM)

# ------------------------------------------------------------------------------------------------ are they all right?

[[ $OUTPUT == /* ]] || OUTPUT=$PWD/$OUTPUT
if [[ $SMALL == 1 ]]; then
    [[ -z $TEACHER$STUDENT$DATA$VALIDATION ]] ||
        die "SMALL=1 brings TEACHER, STUDENT, DATA and VALIDATION of its own. Leave them out, or leave out SMALL."
    TEACHER=$OUTPUT/teacher_base STUDENT=$OUTPUT/student
    DATA=$OUTPUT/data/train.json VALIDATION=$OUTPUT/data/held_out.json
fi
for setting in TEACHER STUDENT DATA VALIDATION; do
    [[ -n ${!setting} ]] || die "$setting is not set. The shortest calls:
    TEACHER=… STUDENT=… DATA=train.jsonl VALIDATION=dev.jsonl bash $0
    SMALL=1 bash $0"
done
for setting in DATA VALIDATION; do
    [[ $SMALL == 1 || -f ${!setting} ]] || die "$setting=${!setting} is not a file. Give a JSON file of training rows."
done
read -ra seeds <<<"$SEEDS"
read -ra methods <<<"$METHODS"
((${#seeds[@]})) || die "SEEDS is empty. Give one number or more, such as SEEDS=\"1 2 3\"."
((${#methods[@]})) || die "METHODS is empty. There are: ${ALL_METHODS[*]}."
for seed in "${seeds[@]}"; do
    [[ $seed =~ ^(0|[1-9][0-9]*)$ ]] || die "SEEDS=\"$SEEDS\": $seed is no whole number."
done
for method in "${methods[@]}"; do
    [[ " ${ALL_METHODS[*]} " == *" $method "* ]] || die "METHODS=\"$METHODS\": $method is none of ${ALL_METHODS[*]}."
done
case $CHECKPOINTS in epoch | no) ;; *) die "CHECKPOINTS=$CHECKPOINTS is none of epoch, no." ;; esac
for set in $EVAL_SETS; do
    [[ -f $DATA_DIR/$set/valid.jsonl || -f $DATA_DIR/$set/11_/valid.jsonl ]] ||
        die "EVAL_SETS names $set, but there is no $DATA_DIR/$set/valid.jsonl. Set DATA_DIR."
done
lacks=$("$PYTHON" - <<'EOF'
import importlib.util, sys

sys.path = [folder for folder in sys.path if folder]  # not what merely lies in the current folder
names = ("torch", "transformers", "modeling", "get_vocab_mapper")
print(*(name for name in names if importlib.util.find_spec(name) is None))
EOF
)
[[ -z $lacks ]] || die "$PYTHON has no module ${lacks// /, }. Install requirements.txt for it (its last line installs \
this project's own), or unset PYTHON."

if [[ ${DRY_RUN:-0} != 1 ]]; then
    # Folders in it are deleted when a setting changes: it must be this script's own.
    [[ -e $OUTPUT/.done/comparison || ! -e $OUTPUT || -z $(ls -A "$OUTPUT") ]] ||
        die "OUTPUT=$OUTPUT holds other things than a comparison. Name a new folder."
    mkdir -p "$OUTPUT/.done"
    : >"$OUTPUT/.done/comparison"
fi
[[ $TEACHER_READY == 1 || ! $TEACHER -ef $OUTPUT/teacher ]] ||
    die "TEACHER=$TEACHER is what is fine-tuned here. Give TEACHER_READY=1, or the teacher that it was made from."

# FKD and RKD need one tokenizer.
left_out=
if [[ " ${methods[*]} " =~ \ (FKD|RKD)\  ]]; then
    if [[ $SMALL == 1 ]]; then
        why="The small student has a tokenizer of its own."
    else
        why=$("$PYTHON" "$here/compare_methods.py" tokenizers --teacher "$TEACHER" --student "$STUDENT")
    fi
    if [[ -n $why ]]; then
        fitting=()
        for method in "${methods[@]}"; do
            case $method in FKD | RKD) left_out+="${left_out:+ and }$method" ;; *) fitting+=("$method") ;; esac
        done
        left_out+=" left out. $why"
        methods=(${fitting[@]+"${fitting[@]}"})
        ((${#methods[@]})) || die "None of METHODS=\"$METHODS\" fits the pair: $left_out"
    fi
fi

precision_wanted=${PRECISION:-}
choose_devices
if [[ $SMALL == 1 && $DEVICE == cpu && -z $precision_wanted ]]; then
    if [[ ! -s $OUTPUT/precision.txt && ${DRY_RUN:-0} != 1 ]]; then
        "$PYTHON" "$here/quickstart_models.py" precision >"$OUTPUT/precision.txt"   # once: reruns must agree
    fi
    [[ ! -s $OUTPUT/precision.txt ]] || PRECISION=$(<"$OUTPUT/precision.txt")
fi
export PYTHON DEVICE DEVICE_COUNT PRECISION TOKENIZERS_PARALLELISM=false
[[ -z ${NPROC:-} ]] || export NPROC

# --------------------------------------------------------------------------------------------------- the commands

student_models() { run "$PYTHON" "$here/quickstart_models.py" "$@"; }

mapper() {          # mapper KIND FILE
    run "$PYTHON" "$CDM_ROOT/get_vocab_mapper/get_$1_mapper.py" --teacher "$TEACHER" --student "$STUDENT" \
        --simi_threshold "$SIMI_THRESHOLD" --output "$2"
}

train() {           # train SCRIPT MODEL OUTPUT ARGUMENTS…
    launch "modeling/$1" --model_name_or_path "$2" --output_dir "$3" --do_train true --train_file "$DATA" \
        --block_size "$BLOCK_SIZE" --preprocessing_num_workers "$WORKERS" --lr_scheduler_type "$SCHEDULER" \
        --warmup_steps "$WARMUP" --logging_steps 0.05 --save_strategy "$CHECKPOINTS" --save_total_limit 1 \
        --report_to "$REPORT_TO" "${@:4}"
    [[ ${DRY_RUN:-0} == 1 ]] || rm -rf "$3"/checkpoint-*   # of no use any more
}

train_teacher() {
    [[ ${DRY_RUN:-0} == 1 ]] || rm -rf "$OUTPUT/teacher_cache"   # what an earlier teacher said
    ZERO=$TEACHER_ZERO train run_clm_sft.py "$TEACHER" "$teacher" --seed "$TEACHER_SEED" \
        --num_train_epochs "$TEACHER_EPOCHS" --learning_rate "$TEACHER_LEARNING_RATE" \
        --per_device_train_batch_size "$TEACHER_BATCH_SIZE" --gradient_accumulation_steps "$TEACHER_ACCUMULATION"
}

train_student() {   # train_student METHOD SEED
    local script
    local -a own=()
    [[ $1 == SFT ]] || own=(--teacher_path "$teacher" "${cache[@]}")
    case $1 in
        SFT) script=run_clm_sft.py ;;
        FKD) script=run_clm_llms_fkd.py own+=(--kd_alpha "$KD_ALPHA" --kd_temperature "$FKD_TEMPERATURE") ;;
        RKD) script=run_clm_llms_rkd.py own+=(--kd_alpha "$KD_ALPHA" --kd_temperature "$RKD_TEMPERATURE") ;;
        ULD) script=run_clm_uld.py own+=(--kd_alpha "$ULD_ALPHA" --kd_temperature "$ULD_TEMPERATURE") ;;
        MinED)
            script=run_clm_MinED.py
            own+=(--teacher_to_student_id_mapping "$mappers/MinED/mapper.safetensors" --kd_alpha "$KD_ALPHA"
                --kd_temperature "$MINED_TEMPERATURE")
            ;;
        CDM) script=run_clm_distill_CDM.py own+=("${cdm[@]}" --kd_alpha "$KD_ALPHA") ;;
    esac
    train "$script" "$STUDENT" "$runs/$1/seed_$2" --seed "$2" --num_train_epochs "$EPOCHS" \
        --learning_rate "$LEARNING_RATE" --per_device_train_batch_size "$BATCH_SIZE" \
        --per_device_eval_batch_size "$BATCH_SIZE" --gradient_accumulation_steps "$ACCUMULATION" "${own[@]}" "${further[@]}"
}

# DeepSpeed evaluates without training under ZeRO-3 alone.
held_out() {        # held_out SCRIPT MODEL FOLDER ARGUMENTS…
    ZERO=3 launch "modeling/$1" --model_name_or_path "$2" --output_dir "$3/evaluation/held_out" --do_eval true \
        --validation_file "$VALIDATION" --block_size "$BLOCK_SIZE" --preprocessing_num_workers "$WORKERS" \
        --per_device_eval_batch_size "$BATCH_SIZE" --report_to none "${@:4}"
}

# Every student is held against the one teacher by CDM's divergence, however it was trained.
held_out_student() { held_out run_clm_distill_CDM.py "$1" "$2" --teacher_path "$teacher" "${cache[@]}" "${cdm[@]}"; }

rouge() {           # rouge MODEL FOLDER
    local name
    local -a settings=("MODEL=$1" "OUTPUT=$2/evaluation/instructions" "DATA_DIR=$sets_dir" "SETS=$sets" "LIMIT=$LIMIT"
        "SEEDS=$EVAL_SEEDS" "MAX_LENGTH=$MAX_LENGTH" "MAX_PROMPT_LENGTH=$MAX_PROMPT_LENGTH"
        "BATCH_SIZE=$EVAL_BATCH_SIZE")
    for name in TEMPERATURE TOP_P TOP_K DSKD_COMPAT DTYPE ROUGE_TOKENIZER; do
        [[ -z ${!name:-} ]] || settings+=("$name=${!name}")
    done
    run env "${settings[@]}" bash "$CDM_ROOT/script_eval/eval_dolly.sh"
}

# ------------------------------------------------------------------------------------------------------- the steps

declare -A sums   # of each step, and of each model and file given: a checksum of all that it depends on

# What tells a model from another, or from itself retrained: its name; of a folder also the sizes and ends of its files.
fingerprint() {
    local file
    printf '%s\n' "$1"
    for file in "$1"/*.safetensors "$1"/*.bin "$1"/*config.json "$1"/tokenizer.json; do
        if [[ -f $file ]]; then
            printf '%s %s\n' "${file##*/}" "$(wc -c <"$file")"
            head -c 1048576 "$file" | cksum
            tail -c 1048576 "$file" | cksum
        fi
    done
}

# step ID AFTER RESULT NAME COMMAND…: RESULT is the file that the command ends with, in a folder of the step's own.
# AFTER are the IDs that it builds on. Done again where its command (all its settings are there), one of these, or one
# before these has changed, and where RESULT is gone. What was begun with other settings is deleted; what was begun
# with these very ones is gone on from.
step() {
    local id=$1 after=$2 result=$3 name=$4 commands other mark=$OUTPUT/.done/$1
    shift 4
    if ((counting)); then
        steps=$((steps + 1))
        return
    fi
    if [[ ${DRY_RUN:-0} == 1 ]]; then
        step=$((step + 1))
        printf '\n# [%d/%d] %s\n' "$step" "$steps" "$name"
        "$@"
        return
    fi
    # Where it runs, how many processes tokenise and whether the teacher's signal is stored do not change a result.
    commands=$(DRY_RUN=1 "$@" |
        sed -E 's/ --(preprocessing_num_workers|teacher_cache|report_to|master_port) (\\.|[^ \\])*//g')
    for other in $after; do commands+=" ${sums[$other]}"; done
    sums[$id]=$(cksum <<<"$commands")
    [[ -e $result ]] || rm -f "$mark"
    if [[ ! -e $mark.begun || $(<"$mark.begun") != "${sums[$id]}" ]]; then
        rm -rf "${result%/*}"
        printf '%s\n' "${sums[$id]}" >"$mark.begun"
    fi
    run_step "$id" "${sums[$id]}" "$name" "$@"
}

# measure ID MODEL_ID ALSO FOLDER NAME MODEL HELD_OUT…: the two evaluations of the model that MODEL_ID made. HELD_OUT is
# the command of the first, which builds on the IDs ALSO too.
measure() {
    local id=$1 made_by=$2 also=$3 folder=$4 name=$5 model=$6
    shift 6
    step "$id.held_out" "$made_by validation $also" "$folder/evaluation/held_out/eval_results.json" \
        "$name: held-out rows" "$@"
    step "$id.rouge" "$made_by sets" "$folder/evaluation/instructions/results.json" "$name: ROUGE-L" \
        rouge "$model" "$folder"
}

runs=$OUTPUT/runs references=$OUTPUT/references mappers=$OUTPUT/mappers
teacher=$OUTPUT/teacher teacher_names=(teacher_untuned teacher_tuned)
[[ $TEACHER_READY != 1 ]] || teacher=$TEACHER teacher_names=(teacher)
cdm=(--teacher_to_student_id_mapping "$mappers/em/mapper.safetensors" --kd_temperature "$CDM_TEMPERATURE"
    --topk "$TOPK" --simi_threshold "$SIMI_THRESHOLD" --alignment "$ALIGNMENT")
cache=()
[[ $TEACHER_CACHE == 0 ]] || cache=(--teacher_cache "$OUTPUT/teacher_cache")
sets=$EVAL_SETS sets_dir=$DATA_DIR
[[ -n $EVAL_SETS ]] || sets=held-out sets_dir=$OUTPUT/sets

# What is given, and no step's.
samples=("$CDM_ROOT"/data/{dolly_train,code_tuning,math_tuning}.sample.json)
if [[ $SMALL == 1 ]]; then
    sums[samples]=$(cat "${samples[@]}" | cksum)
else
    sums[data]=$(cksum <"$DATA") sums[validation]=$(cksum <"$VALIDATION")
    sums[teacher]=$(fingerprint "$TEACHER" | cksum) sums[student]=$(fingerprint "$STUDENT" | cksum)
fi
if [[ -n $EVAL_SETS ]]; then
    sums[sets]=$(for set in $EVAL_SETS; do cat "$DATA_DIR/$set"/{,11_/}valid.jsonl 2>/dev/null || :; done | cksum)
fi

counting=0   # 1: all_steps only counts them
all_steps() {
    local method seed set tuned=teacher
    if [[ $SMALL == 1 ]]; then
        step data "samples" "$VALIDATION" "Rows: 45 of each sample file to train, 5 held out" \
            student_models split --data "${samples[@]}" --output "${DATA%/*}"
        sums[validation]=${sums[data]:-}
        step teacher "data" "$TEACHER/config.json" "Teacher: SmolLM2-135M-Instruct" \
            student_models teacher --output "$TEACHER" --downloads "$OUTPUT/downloads" --held_out "$VALIDATION"
        step student "data" "$STUDENT/config.json" "Student: a small Llama, and a tokenizer of its own" \
            student_models student --output "$STUDENT" --train_file "$DATA" \
            --vocab_size 2048 --hidden 256 --layers 4 --heads 4 --seed 42
    fi
    if [[ -z $EVAL_SETS ]]; then
        step sets "validation" "$sets_dir/held-out/valid.jsonl" "The held-out rows as an evaluation set" \
            run "$PYTHON" "$here/compare_methods.py" rows --data "$VALIDATION" \
            --output "$sets_dir/held-out/valid.jsonl"
    fi

    measure "${teacher_names[0]}" teacher "" "$references/${teacher_names[0]}" "The teacher as it comes" \
        "$TEACHER" held_out run_clm_sft.py "$TEACHER" "$references/${teacher_names[0]}"
    if [[ $TEACHER_READY != 1 ]]; then
        tuned=tuning
        step tuning "teacher data" "$teacher/train_results.json" "The teacher is fine-tuned on the data" train_teacher
        measure teacher_tuned tuning "" "$references/teacher_tuned" "The teacher, fine-tuned" \
            "$teacher" held_out run_clm_sft.py "$teacher" "$references/teacher_tuned"
    fi

    step em "teacher student" "$mappers/em/mapper.safetensors" "Vocabulary mapper: exact matches" \
        mapper em "$mappers/em/mapper.safetensors"
    if [[ " ${methods[*]} " == *" MinED "* ]]; then
        step MinED "teacher student" "$mappers/MinED/mapper.safetensors" "Vocabulary mapper: nearest strings" \
            mapper MinED "$mappers/MinED/mapper.safetensors"
    fi

    measure student_untrained student "$tuned em" "$references/student_untrained" "The student before training" \
        "$STUDENT" held_out_student "$STUDENT" "$references/student_untrained"
    for seed in "${seeds[@]}"; do
        for method in "${methods[@]}"; do
            local id=${method}_seed_$seed run=$runs/$method/seed_$seed builds_on="student data"
            case $method in
                SFT) ;;
                CDM) builds_on+=" $tuned em" ;;
                MinED) builds_on+=" $tuned MinED" ;;
                *) builds_on+=" $tuned" ;;
            esac
            step "$id" "$builds_on" "$run/train_results.json" "$method, seed $seed: training" \
                train_student "$method" "$seed"
            measure "$id" "$id" "$tuned em" "$run" "$method, seed $seed" "$run" held_out_student "$run" "$run"
        done
    done
}

say_left_out() { [[ -z $left_out ]] || printf '\n%s%s\n' "${1:-}" "$left_out"; }

comment=
[[ ${DRY_RUN:-0} != 1 ]] || comment='# '
printf '%sDevice: %s, precision: %s. Methods: %s. Seeds: %s. Output: %s\n' "$comment" "$DEVICE" "$PRECISION" \
    "${methods[*]}" "${seeds[*]}" "$OUTPUT"
say_left_out "$comment"

counting=1 steps=0
all_steps
counting=0
all_steps

# ------------------------------------------------------------------------------------------------------ the summary

[[ $comment ]] && printf '\n# The summary\n' || printf '\n'
folders=()
for method in "${methods[@]}"; do
    for seed in "${seeds[@]}"; do folders+=("$runs/$method/seed_$seed"); done
done
run "$PYTHON" "$CDM_ROOT/script_eval/summarize.py" "${folders[@]}" --output "$OUTPUT/summary" \
    --references "${teacher_names[@]/#/$references/}" "$references/student_untrained"
say_left_out "$comment"
[[ -n $comment ]] || printf '\n%d s in all. The table and the pictures: %s\n' $((SECONDS - started)) "$OUTPUT/summary"
}; exit
