# shellcheck shell=bash # it is sourced, and has no #! line
# Sourced by the evaluation scripts: the environment, the devices, and where results go.
#
#     source script_eval/common.sh requirements-eval.txt     # the dependencies that the script needs
#
# Read from the environment: PYTHON, VENV and BASE_PYTHON (see script_train/setup_env.sh); DEVICE, NPROC, MASTER_PORT
# and DRY_RUN (see script_train/launch.sh).

EVAL_DIR=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
source "$EVAL_DIR/../script_train/setup_env.sh"
[[ ${DRY_RUN:-0} == 1 ]] || setup_env "$1"
source "$EVAL_DIR/../script_train/launch.sh"
export TOKENIZERS_PARALLELISM=false

# require_model: MODEL is the one setting without a default.
require_model() {
    [[ -n ${MODEL:-} ]] || die "MODEL is not set. The shortest call: MODEL=outputs/student bash $0"
}

# require_module NAME: where PYTHON was given, nothing has been installed.
require_module() {
    [[ ${DRY_RUN:-0} == 1 ]] || "$PYTHON" -c "import $1" 2>/dev/null ||
        die "$PYTHON has no $1. Install requirements-eval.txt for it, or unset PYTHON."
}

# output_folder TASK: beside the model where it is a folder.
output_folder() {
    if [[ -d $MODEL ]]; then
        printf '%s' "${MODEL%/}/evaluation/$1"
    else
        printf '%s' "$CDM_ROOT/outputs/evaluation/${MODEL//\//--}/$1"
    fi
}

# over_devices ARGUMENTS…: Python with these, in one process a device. (After choose_devices.)
over_devices() {
    local processes=${NPROC:-$DEVICE_COUNT}
    [[ $processes =~ ^[1-9][0-9]*$ ]] || die "NPROC=$processes is not a number of processes."
    local -a command=("$PYTHON")
    if ((processes > 1)); then
        command+=(-m torch.distributed.run --nproc_per_node "$processes" --master_port "${MASTER_PORT:-29500}")
    fi
    run "${command[@]}" "$@"
}

# chat_arguments: CHAT=1, SYSTEM and TEMPLATE_KWARGS as arguments, in the array `chat`.
chat_arguments() {
    chat=()
    if [[ ${CHAT:-0} == 1 ]]; then
        chat=(--chat ${TEMPLATE_KWARGS:+--template_kwargs "$TEMPLATE_KWARGS"})
    elif [[ -n ${SYSTEM:-}${TEMPLATE_KWARGS:-} ]]; then
        die "SYSTEM and TEMPLATE_KWARGS go with CHAT=1."
    fi
}

# generate ARGUMENTS…: generate.py with these, and with the settings that all its callers have.
generate() {
    choose_devices
    [[ $DEVICE != cpu ]] || set -- --use_cpu "$@"
    chat_arguments
    set -- "${chat[@]}" ${SYSTEM:+--system "$SYSTEM"} "$@"
    over_devices "$EVAL_DIR/generate.py" --model "$MODEL" --max_length "$MAX_LENGTH" \
        --max_prompt_length "$MAX_PROMPT_LENGTH" ${BATCH_SIZE:+--batch_size "$BATCH_SIZE"} --dtype "$DTYPE" "$@"
}
