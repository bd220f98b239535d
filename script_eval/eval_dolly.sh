#!/usr/bin/env bash
# Instruction following, by the protocol of DSKD (arXiv 2406.17328): ROUGE-L of sampled responses, mean over five seeds.
#
#     MODEL=outputs/student bash script_eval/eval_dolly.sh
#     MODEL=outputs/student SETS=dolly SEEDS="10 20" bash script_eval/eval_dolly.sh
#
# Every setting can be given in front of the command, and any further argument of generate.py behind it. Interrupted, it
# resumes at the first missing set, seed and row. Environment and devices: see common.sh.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh" requirements.txt
require_model

DATA_DIR=${DATA_DIR:-$CDM_ROOT/data}                        # holds SET/valid.jsonl, with prompt and output
SETS=${SETS:-dolly self-inst vicuna sinst uinst}            # a set without file is reported as missing
SEEDS=${SEEDS:-10 20 30 40 50}
LIMIT=${LIMIT:-}                                            # the first so many rows of each set; none = all
OUTPUT=${OUTPUT:-$(output_folder instructions)}             # results.json, and the generations

MAX_LENGTH=${MAX_LENGTH:-512}                               # tokens of prompt and response in all
MAX_PROMPT_LENGTH=${MAX_PROMPT_LENGTH:-$((MAX_LENGTH / 2))} # the rest is for the response, as in DSKD
TEMPERATURE=${TEMPERATURE:-1.0}
TOP_P=${TOP_P:-1.0}
TOP_K=${TOP_K:-0}                                           # 0 = off
GREEDY=${GREEDY:-0}                                         # 1: always the likeliest token; of SEEDS the first is taken
DSKD_COMPAT=${DSKD_COMPAT:-0}                               # 1: no 6-gram repeated, prompts cut on the right
ROUGE_TOKENIZER=${ROUGE_TOKENIZER:-rouge_score}             # or unicode, for text in other letters than a to z
BATCH_SIZE=${BATCH_SIZE:-}                                  # prompts a device and forward; none = 16 on a CPU, else 128
DTYPE=${DTYPE:-auto}                                        # of the weights; auto = as saved
CHAT=${CHAT:-0}                                             # 1: asked in the model's chat template, with
SYSTEM=${SYSTEM:-}                                          # this system message in front, and
TEMPLATE_KWARGS=${TEMPLATE_KWARGS:-}                        # what the template is given besides, a JSON object

read -ra sets <<<"$SETS"
read -ra seeds <<<"$SEEDS"
if [[ $GREEDY == 1 ]]; then
    seeds=("${seeds[0]}")
    set -- --greedy "$@"
fi
[[ $DSKD_COMPAT != 1 ]] || set -- --dskd_compat "$@"
[[ $ROUGE_TOKENIZER =~ ^(rouge_score|unicode)$ ]] ||
    die "ROUGE_TOKENIZER=$ROUGE_TOKENIZER is none of rouge_score, unicode."

for set in "${sets[@]}"; do
    data=$DATA_DIR/$set/valid.jsonl
    [[ -f $data ]] || data=$DATA_DIR/$set/11_/valid.jsonl   # where DSKD keeps those with long responses
    if [[ ! -f $data ]]; then
        printf '%s: missing, there is no %s\n' "$set" "$DATA_DIR/$set/valid.jsonl" >&2
        continue
    fi
    limit=$LIMIT
    # The first 10,000 of the 60,000.
    if [[ $set == uinst ]] && ((${limit:-10000} >= 10000)); then limit=10000; fi
    generate --data "$data" --output "$OUTPUT/$set/{seed}.jsonl" --seed "${seeds[@]}" --temperature "$TEMPERATURE" \
        --top_p "$TOP_P" --top_k "$TOP_K" ${limit:+--limit "$limit"} "$@"
    for seed in "${seeds[@]}"; do
        generations=$OUTPUT/$set/$seed.jsonl
        scores=$OUTPUT/$set/$seed.scores.json
        if [[ $generations -nt $scores ]] || ! grep -qs "\"rouge_tokenizer\": \"$ROUGE_TOKENIZER\"" "$scores"; then
            run "$PYTHON" "$EVAL_DIR/score_rouge.py" --data "$data" --generations "$generations" --output "$scores" \
                --rouge_tokenizer "$ROUGE_TOKENIZER" ${limit:+--limit "$limit"}
        fi
    done
done
run "$PYTHON" "$EVAL_DIR/collect_results.py" instructions --folder "$OUTPUT" --model "$MODEL" --sets "${sets[@]}" \
    --seeds "${seeds[@]}"
