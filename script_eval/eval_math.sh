#!/usr/bin/env bash
# Math: exact match on GSM8K, through lm-evaluation-harness: its own task, asked in the training template.
#
#     MODEL=outputs/student bash script_eval/eval_math.sh
#
# Both of the harness's figures are reported: strict-match wants the answer behind "####", flexible-extract takes the
# last number of the response (and gives points to chance). Every setting can be given in front of the command, and any
# further argument of `lm_eval run` behind it. Interrupted, it resumes at the first missing answer (with one process).
# Environment and devices: see common.sh.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh" requirements-eval.txt
require_model
require_module lm_eval

DATA_DIR=${DATA_DIR:-}                                      # holds gsm8k/{train,test}.jsonl; empty = from the hub
LIMIT=${LIMIT:-}                                            # the first so many questions; none = all 1,319
OUTPUT=${OUTPUT:-$(output_folder math)}                     # results.json, and the generations

NUM_FEWSHOT=${NUM_FEWSHOT:-0}                               # solved examples in front: none, as in training
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-256}                       # of a response (the harness's own: 256)
BATCH_SIZE=${BATCH_SIZE:-}                                  # prompts a device and forward; none = 16 on a CPU, else 128
DTYPE=${DTYPE:-auto}                                        # of the weights; auto = as saved
CHAT=${CHAT:-0}                                             # 1: asked in the model's chat template, with
SYSTEM=${SYSTEM:-}                                          # this system message in front, and
TEMPLATE_KWARGS=${TEMPLATE_KWARGS:-}                        # what the template is given besides, a JSON object
TRUST_REMOTE_CODE=${TRUST_REMOTE_CODE:-0}                   # 1 runs Python code that a hub model carries

chat_arguments
[[ $CHAT != 1 ]] || set -- --apply_chat_template ${SYSTEM:+--system_instruction "$SYSTEM"} "$@"
[[ $TRUST_REMOTE_CODE != 1 ]] || set -- --trust_remote_code "$@"

if [[ -n $DATA_DIR && ! (-f $DATA_DIR/gsm8k/train.jsonl && -f $DATA_DIR/gsm8k/test.jsonl) ]]; then
    die "DATA_DIR=$DATA_DIR has no gsm8k/train.jsonl and gsm8k/test.jsonl."
fi
choose_devices
[[ $DEVICE == cpu ]] && default_batch=16 || default_batch=128
BATCH_SIZE=${BATCH_SIZE:-$default_batch}
# Also refuses a folder that was started with other settings.
run "$PYTHON" "$EVAL_DIR/math_task.py" --folder "$OUTPUT" --model "$MODEL" --dtype "$DTYPE" \
    --num_fewshot "$NUM_FEWSHOT" --max_new_tokens "$MAX_NEW_TOKENS" --batch_size "$BATCH_SIZE" \
    ${LIMIT:+--limit "$LIMIT"} ${DATA_DIR:+--data_dir "$DATA_DIR/gsm8k"} "${chat[@]}" --further_arguments="$*"

if [[ ! -e $OUTPUT/results.json ]]; then
    device=$DEVICE
    if [[ $DEVICE == cpu ]]; then NPROC=1; else device+=:0; fi
    [[ ${DRY_RUN:-0} == 1 ]] || model_args=$(<"$OUTPUT/model_args.json")
    over_devices "$EVAL_DIR/harness.py" run --model cdm --model_args "${model_args:-…}" --device "$device" \
        --include_path "$OUTPUT/tasks" --tasks gsm8k_training_template --num_fewshot "$NUM_FEWSHOT" \
        --gen_kwargs "max_gen_toks=$MAX_NEW_TOKENS" --batch_size "$BATCH_SIZE" ${LIMIT:+--limit "$LIMIT"} \
        --log_samples --output_path "$OUTPUT/harness" --use_cache "$OUTPUT/answers" "$@"
fi
run "$PYTHON" "$EVAL_DIR/collect_results.py" math --folder "$OUTPUT" --model "$MODEL"
