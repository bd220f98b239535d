#!/usr/bin/env bash
# Which method suits this teacher, this student and this data? Fine-tunes the teacher on the data, trains the student by
# every method that fits the pair, with one budget and over several seeds, measures all of them in the same way, and
# makes one table and two pictures. The plan is in compare.py.
#
#     TEACHER=microsoft/Phi-3-mini-4k-instruct STUDENT=Qwen/Qwen2-0.5B DATA=train.jsonl VALIDATION=dev.jsonl \
#         bash script_train/compare_methods.sh
#     SMALL=1 bash script_train/compare_methods.sh        # on a CPU, with models and data of its own
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
DATA=${DATA:-}                                         # rows to learn; see data/README.md
VALIDATION=${VALIDATION:-}                             # held-out rows of the same form
OUTPUT=${OUTPUT:-$CDM_ROOT/outputs/comparison}         # runs/METHOD/seed_N, references, summary and what they need
FRESH=${FRESH:-0}                                      # 1: deletes first what earlier calls have made in OUTPUT
SEEDS=${SEEDS:-1 2 3}                                  # each method is trained once with each
METHODS=${METHODS:-all}                                # or names, as methods.py prints them; left out is what does not fit

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
KD_ALPHA=${KD_ALPHA:-0.5}                              # share of cross-entropy in the loss, 0 to 1
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

[[ $OUTPUT == /* ]] || OUTPUT=$PWD/$OUTPUT
if [[ $SMALL == 1 ]]; then
    [[ -z $TEACHER$STUDENT$DATA$VALIDATION ]] ||
        die "SMALL=1 brings TEACHER, STUDENT, DATA and VALIDATION of its own. Leave them out, or leave out SMALL."
    TEACHER=$OUTPUT/teacher_base STUDENT=$OUTPUT/student
    DATA=$OUTPUT/data/train.json VALIDATION=$OUTPUT/data/held_out.json
    choose_small_precision
fi
choose_devices
export PYTHON TOKENIZERS_PARALLELISM=false
exec "$PYTHON" "$here/compare.py" "$@"
