#!/usr/bin/env bash
# Which method suits this teacher, this student and this data? Fine-tunes the teacher on the data, trains the student by
# every method that fits the pair, with one budget and over several seeds, measures all of them in the same way, and
# makes one table and two pictures. The plan is in compare.py.
#
#     TEACHER=microsoft/Phi-3-mini-4k-instruct STUDENT=Qwen/Qwen2-0.5B DATA=train.jsonl VALIDATION=dev.jsonl \
#         bash script_train/compare_methods.sh
#     SMALL=1 bash script_train/compare_methods.sh        # on a CPU, with models and data of its own
#     PAIR=transfer TEACHER=… STUDENT_TOKENIZER=… DATA=… VALIDATION=… bash script_train/compare_methods.sh
#
# With PAIR=transfer the student is made: it is the teacher, before that is fine-tuned, with another tokenizer.
#
# Before the trainings, a few steps of every method are tried, so that what would fail fails at once, and the time that
# all of it will take is printed.
#
# Every setting can be given in front of the command, and behind it any further argument that all training scripts have,
# for the students' trainings. Interrupted, it resumes where it stopped: a training at its last checkpoint. What was made
# with other settings is named, and nothing is run: another OUTPUT keeps both, FRESH=1 starts over.
#
# DEVICE, NPROC, HOSTFILE, PRECISION, PYTHON and DRY_RUN: see launch.sh; VENV and BASE_PYTHON: see setup_env.sh;
# TEMPERATURE, TOP_P, TOP_K, DSKD_COMPAT, ROUGE_TOKENIZER and DTYPE of the generations: see script_eval/eval_dolly.sh.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
source "$here/setup_env.sh"
[[ ${DRY_RUN:-0} == 1 ]] || setup_env requirements.txt
source "$here/launch.sh"

set -a                                                 # exported: the scripts that it runs read the same names
SMALL=${SMALL:-0}                                      # 1: a budget for a CPU, and PAIR=transfer unless STUDENT is given
STUDENT=${STUDENT:-}                                   # hub name or folder
PAIR=${PAIR:-}                                         # transfer: STUDENT is made of TEACHER
if [[ $SMALL == 1 ]]; then                             # what is another default there
    [[ -n $STUDENT ]] || PAIR=transfer
    OUTPUT=${OUTPUT:-$CDM_ROOT/outputs/comparison_small} SEEDS=${SEEDS:-1 2}
    TEACHER_EPOCHS=${TEACHER_EPOCHS:-1} TEACHER_LEARNING_RATE=${TEACHER_LEARNING_RATE:-5e-5}
    TEACHER_BATCH_SIZE=${TEACHER_BATCH_SIZE:-4} TEACHER_ACCUMULATION=${TEACHER_ACCUMULATION:-1}
    EPOCHS=${EPOCHS:-1} LEARNING_RATE=${LEARNING_RATE:-2e-4} WARMUP=${WARMUP:-0.1}
    BATCH_SIZE=${BATCH_SIZE:-4} ACCUMULATION=${ACCUMULATION:-1} BLOCK_SIZE=${BLOCK_SIZE:-320}
    CHECKPOINTS=${CHECKPOINTS:-no} WORKERS=${WORKERS:-1} NPROC=${NPROC:-1}
    EVAL_SEEDS=${EVAL_SEEDS:-10} MAX_LENGTH=${MAX_LENGTH:-288} MAX_PROMPT_LENGTH=${MAX_PROMPT_LENGTH:-192}
    VOCAB_SIZE=${VOCAB_SIZE:-4096} ALPHAS=${ALPHAS-} KD_ALPHA=${KD_ALPHA:-0.9}
fi

TEACHER=${TEACHER:-}                                   # hub name or folder; with PAIR=transfer SmolLM2-135M-Instruct
DATA=${DATA:-}                                         # rows to learn, see data/README.md; with PAIR=transfer the samples
VALIDATION=${VALIDATION:-}                             # held-out rows of the same form
OUTPUT=${OUTPUT:-$CDM_ROOT/outputs/comparison}         # runs/METHOD/seed_N, references, summary and what they need
FRESH=${FRESH:-0}                                      # 1: deletes first what earlier calls have made in OUTPUT
SEEDS=${SEEDS:-1 2 3}                                  # each method is trained once with each
METHODS=${METHODS:-all}                                # or names, as methods.py prints them, also with a setting of its own
                                                       # as in CDM:ALIGNMENT=byte; left out is what does not fit the pair
JOBS=${JOBS:-1}                                        # so many trainings and evaluations at the same time, on the same devices
TRIAL_STEPS=${TRIAL_STEPS:-4}                          # of each method before all trainings; 0: none is tried

STUDENT_TOKENIZER=${STUDENT_TOKENIZER:-}               # of PAIR=transfer: hub name or folder; none = trained on DATA
VOCAB_SIZE=${VOCAB_SIZE:-8192}                         # of a tokenizer that is trained
LAYERS=${LAYERS:-}                                     # of the student of PAIR=transfer; none = all of the teacher's

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

# Of one method alone: METHOD_ALPHA and METHOD_TEMPERATURE, such as ULD_ALPHA=0.4 (CE + 1.5·ULD, as in its paper) or
# MINED_TEMPERATURE=1; without them KD_ALPHA, and the temperature of the method's own script.
[[ $PAIR != transfer ]] || ALPHAS=${ALPHAS-${KD_ALPHA:-0.5 0.8 0.9}}
KD_ALPHA=${KD_ALPHA:-0.5}                              # share of cross-entropy in the loss, 0 to 1
ALPHAS=${ALPHAS:-}                                     # or several, of which each method takes the best, with the first seed,
CHOICE=${CHOICE:-}                                     # on these rows; none = VALIDATION, which favours the methods over SFT
CDM_TEMPERATURE=${CDM_TEMPERATURE:-1.0}                # CDM's are also those with which the KD of all methods is measured
TOPK=${TOPK:-}                                         # tokens a side: of CDM and the KD of all (100), Strict (16)
SIMI_THRESHOLD=${SIMI_THRESHOLD:-0.3}                  # nearer strings count as similar, above 0, at most 1
ALIGNMENT=${ALIGNMENT:-dtw}                            # dtw (the paper's) or byte (exact, by byte positions)

EVAL_SETS=${EVAL_SETS:-}                               # for ROUGE-L: sets in DATA_DIR; none = the rows of VALIDATION
DATA_DIR=${DATA_DIR:-$CDM_ROOT/data}                   # holds SET/valid.jsonl, with prompt and output
LIMIT=${LIMIT:-}                                       # the first so many rows of each set; none = all
EVAL_SEEDS=${EVAL_SEEDS:-10 20 30 40 50}               # of the sampled responses
[[ $PAIR != transfer ]] || GREEDY=${GREEDY:-1}
GREEDY=${GREEDY:-0}                                    # 1: instead, one response of the likeliest tokens
MAX_LENGTH=${MAX_LENGTH:-512}                          # tokens of prompt and response in all
MAX_PROMPT_LENGTH=${MAX_PROMPT_LENGTH:-$((MAX_LENGTH / 2))}
EVAL_BATCH_SIZE=${EVAL_BATCH_SIZE:-16}                 # prompts a device and forward

[[ $OUTPUT == /* ]] || OUTPUT=$PWD/$OUTPUT
MADE=''                                                # of these settings, what compare.py makes itself
case $PAIR in
    transfer)
        [[ -z $STUDENT ]] || die "PAIR=transfer makes the student of TEACHER. Leave STUDENT out, or leave out PAIR."
        MADE=STUDENT STUDENT=$OUTPUT/student
        [[ -n $TEACHER ]] || MADE+=' TEACHER' TEACHER=$OUTPUT/teacher_base
        if [[ -z $DATA$VALIDATION ]]; then
            MADE+=' DATA VALIDATION' DATA=$OUTPUT/data/train.json VALIDATION=$OUTPUT/data/held_out.json
            [[ -n $CHOICE ]] || MADE+=' CHOICE' CHOICE=$OUTPUT/data/choice.json
        fi
        ;;
    '') [[ -z $STUDENT_TOKENIZER$LAYERS ]] || die "STUDENT_TOKENIZER and LAYERS are of PAIR=transfer. Give that too." ;;
    *) die "PAIR=$PAIR: give transfer, or leave it out." ;;
esac
[[ -n $STUDENT_TOKENIZER ]] || MADE+=' STUDENT_TOKENIZER'
CHOICE=${CHOICE:-$VALIDATION}
[[ $SMALL != 1 ]] || choose_small_precision
choose_devices
export PYTHON TOKENIZERS_PARALLELISM=false
exec "$PYTHON" "$here/compare.py" "$@"
