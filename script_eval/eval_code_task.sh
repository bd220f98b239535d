#!/usr/bin/env bash
# Code: pass@1 of greedy solutions on HumanEval(+) and MBPP(+), through EvalPlus.
#
#     MODEL=outputs/student bash script_eval/eval_code_task.sh
#
# The model is asked in the training template. The solutions come from generate.py, so that every device that torch
# knows will do, and are then run by EvalPlus. They are code that nobody has read: EvalPlus's sandbox and limits stay
# on, and are no full protection; use a container or a machine that may be lost.
#
# EvalPlus 0.3.1 lets no solution of HumanEval/32 pass, not even its own: 163 of 164, 99.39, is the most.
#
# Every setting can be given in front of the command, and any further argument of generate.py behind it. Interrupted, it
# resumes at the first missing solution. Environment and devices: see common.sh.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh" requirements-eval.txt
require_model
require_module evalplus

DATA_DIR=${DATA_DIR:-}                                      # holds HumanEvalPlus.jsonl.gz and MbppPlus.jsonl.gz, itself
                                                            # or in evalplus/; empty = EvalPlus downloads them
DATASETS=${DATASETS:-humaneval mbpp}
LIMIT=${LIMIT:-}                                            # the first so many tasks of each; none = all
OUTPUT=${OUTPUT:-$(output_folder code)}                     # results.json, and the generations

MAX_LENGTH=${MAX_LENGTH:-1024}                              # tokens of prompt and response in all
MAX_PROMPT_LENGTH=${MAX_PROMPT_LENGTH:-$((MAX_LENGTH / 2))} # the rest is for the response
BATCH_SIZE=${BATCH_SIZE:-}                                  # prompts a device and forward; none = 16 on a CPU, else 128
DTYPE=${DTYPE:-auto}                                        # of the weights; auto = as saved
CHAT=${CHAT:-0}                                             # 1: asked in the model's chat template, with
SYSTEM=${SYSTEM:-}                                          # this system message in front, and
TEMPLATE_KWARGS=${TEMPLATE_KWARGS:-}                        # what the template is given besides, a JSON object
PARALLEL=${PARALLEL:-}                                      # solutions run at a time; none = half the cores
MIN_TIME_LIMIT=${MIN_TIME_LIMIT:-1}                         # seconds that a test may take at least (EvalPlus's own: 1)

read -ra datasets <<<"$DATASETS"

for dataset in "${datasets[@]}"; do
    case $dataset in   # the variable in which EvalPlus takes a local file, and the file's name
        humaneval) variable=HUMANEVAL_OVERRIDE_PATH name=HumanEvalPlus.jsonl ;;
        mbpp) variable=MBPP_OVERRIDE_PATH name=MbppPlus.jsonl ;;
        *) die "DATASETS: $dataset is none of humaneval, mbpp." ;;
    esac
    if [[ -n $DATA_DIR ]]; then
        for file in "$DATA_DIR"/{evalplus/,}"$name"{,.gz}; do
            [[ ! -f $file ]] || export "$variable=$file"
        done
        if [[ -z ${!variable:-} ]]; then
            printf '%s: missing, it is not in %s\n' "$dataset" "$DATA_DIR" >&2
            continue
        fi
    fi
    folder=$OUTPUT/$dataset
    samples=$folder/samples.jsonl
    results=$folder/samples_eval_results.json
    run "$PYTHON" "$EVAL_DIR/code_task.py" prompts --dataset "$dataset" --output "$folder/prompts.jsonl" \
        ${LIMIT:+--limit "$LIMIT"}
    generate --data "$folder/prompts.jsonl" --output "$folder/generations.jsonl" --greedy "$@"
    run "$PYTHON" "$EVAL_DIR/code_task.py" samples --dataset "$dataset" --prompts "$folder/prompts.jsonl" \
        --generations "$folder/generations.jsonl" --output "$samples"
    # EvalPlus takes results that are there already, whatever the samples.
    [[ ! $samples -nt $results ]] || run rm -f "$results"
    if [[ ! -e $results ]]; then
        run "$PYTHON" -m evalplus.evaluate --dataset "$dataset" --samples "$samples" \
            --min_time_limit "$MIN_TIME_LIMIT" ${PARALLEL:+--parallel "$PARALLEL"}
    fi
done
run "$PYTHON" "$EVAL_DIR/collect_results.py" code --folder "$OUTPUT" --model "$MODEL" --sets "${datasets[@]}" \
    --min_time_limit "$MIN_TIME_LIMIT"
