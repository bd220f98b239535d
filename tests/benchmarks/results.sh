#!/usr/bin/env bash
# The comparison in the README's Results, from the files of Dolly and GSM8K to the table and the picture. It takes
# about two hours on two cores, and resumes.
#
#     DOLLY=databricks-dolly-15k.jsonl DOLLY_TEST=valid.jsonl GSM8K=train.jsonl bash tests/benchmarks/results.sh
#
# The teacher, the student and SFT come first. Then every other method is trained with three α, on few rows, and keeps
# the one with the fewest bits per byte on rows of their own; SFT has nothing to choose. Then all are compared.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
source "$root/script_train/setup_env.sh"
setup_env requirements.txt
export PYTHON

STUDENT_TOKENIZER=${STUDENT_TOKENIZER:-microsoft/Phi-3-mini-4k-instruct}   # hub name or folder
OUTPUT=${OUTPUT:-$root/outputs/results}
export JOBS=${JOBS:-2} SMALL=1 TRIAL_STEPS=0 GREEDY=1 BLOCK_SIZE=128 MAX_LENGTH=128 MAX_PROMPT_LENGTH=80
rows=$OUTPUT/rows main=$OUTPUT/comparison choice=$OUTPUT/choice
[[ -f $rows/held_out.jsonl ]] || "$PYTHON" "$root/tests/benchmarks/results_rows.py" --dolly "$DOLLY" \
    --dolly_test "$DOLLY_TEST" --gsm8k "$GSM8K" --output "$rows"

# compare_all NAME=VALUE…: a comparison of the transferred pair on all rows, with these settings.
compare_all() {
    env PAIR=transfer STUDENT_TOKENIZER="$STUDENT_TOKENIZER" SEEDS="1 2" ALPHAS= LIMIT=30 DATA="$rows/train.jsonl" \
        CHOICE="$rows/choice.jsonl" VALIDATION="$rows/held_out.jsonl" OUTPUT="$main" "$@" \
        bash "$root/script_train/compare_methods.sh"
}

compare_all METHODS=SFT
env STUDENT="$main/student" TEACHER="$main/teacher" TEACHER_READY=1 ALPHAS="0.5 0.8 0.9" SEEDS=1 LIMIT=2 \
    DATA="$rows/few.jsonl" CHOICE="$rows/choice.jsonl" VALIDATION="$rows/choice.jsonl" OUTPUT="$choice" \
    METHODS="ULD MinED CDM CDM:ALIGNMENT=byte Strict BPM ALM" bash "$root/script_train/compare_methods.sh"
cat "$choice/summary/choice.md"

# CDM's two alignments are compared with one α, that of the paper's.
mapfile -t alphas < <("$PYTHON" -c 'import json, sys
for name, alpha in json.load(open(sys.argv[1]))["α"].items():
    if ":" not in name:
        print(f"{name.upper()}_ALPHA={alpha}")' "$choice/summary/alphas.json")
compare_all METHODS="SFT ULD MinED CDM CDM:ALIGNMENT=byte Strict BPM ALM" "${alphas[@]}"
