# shellcheck shell=bash # it is sourced, and has no #! line
# Sourced by the training scripts: finds the devices, and starts a Python script on them, with the flags that all
# trainings have in common. Called, it runs one of its functions:
#
#     source script_train/launch.sh
#     launch modeling/run_clm_sft.py --model_name_or_path …     # relative to the project, or an absolute path
#     bash script_train/launch.sh evaluate run_clm_sft.py outputs/student
#
# Read from the environment, each with what it is by default:
#   DEVICE       npu, cuda or cpu                       what torch sees
#   NPROC        processes on each machine              one an accelerator; with HOSTFILE its slots; 1 on cpu
#   HOSTFILE     DeepSpeed hostfile: several machines   this machine alone
#   NNODES       machines, on each of which the same    Slurm's (srun) or torchrun's (PET_NNODES), else 1
#                command is started: no ssh is needed
#   NODE_RANK    which of them this one is, from 0      Slurm's or torchrun's (PET_NODE_RANK)
#   MASTER_ADDR  the first of them                      Slurm's or torchrun's (PET_MASTER_ADDR)
#   MASTER_PORT  port of rank 0                         torchrun's (PET_MASTER_PORT), else 29500
#   ZERO         2 or 3: the file in config/            2
#   PRECISION    bf16, fp16 or fp32                     bf16 on an accelerator, fp32 on cpu
#   PYTHON       the interpreter                        .venv/bin/python, else python3
#   DRY_RUN      1 prints commands, and runs none       0
# and by train:
#   WORKERS        processes that tokenise the data     4
#   REPORT_TO      tensorboard, wandb or none           tensorboard
#   LOGGING_STEPS  steps, or below 1 the share of all   10
#   CHECKPOINTS    epoch, steps or no                   epoch

CDM_ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

# Mappers are named after the last parts of these, which a slash at the end would hide.
TEACHER=${TEACHER:-} STUDENT=${STUDENT:-}
TEACHER=${TEACHER%/} STUDENT=${STUDENT%/}

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# Runs a command, or prints it as it could be pasted into a shell.
run() {
    if [[ ${DRY_RUN:-0} == 1 ]]; then
        printf '%q ' "$@"
        printf '\n'
    else
        "$@"
    fi
}

# Runs a training in a process group of its own, and passes SIGTERM and Ctrl-C on to all of it: a scheduler may tell
# this script alone, and DeepSpeed's launcher would end without its processes. Then waits for the last of them, since a
# container or a batch job ends with its script.
supervise() {
    if [[ ${DRY_RUN:-0} == 1 ]]; then
        run "$@"
        return
    fi
    local group status=0 signal=0
    set -m   # a group of its own, in which Ctrl-C is not ignored
    "$@" &
    group=$!
    set +m
    trap 'signal=15; kill -TERM -- "-$group" 2>/dev/null' TERM
    trap 'signal=2; kill -INT -- "-$group" 2>/dev/null' INT
    wait "$group" || status=$?
    while ((signal)) && kill -0 -- "-$group" 2>/dev/null; do
        sleep 0.2
    done
    trap - TERM INT
    ((!signal)) || exit $((128 + signal))
    return "$status"
}

if [[ -z ${PYTHON:-} ]]; then
    PYTHON=$CDM_ROOT/.venv/bin/python
    [[ -x $PYTHON ]] || PYTHON=python3
fi
# DeepSpeed calls the ninja that is installed beside the interpreter.
if [[ $PYTHON == */* ]]; then
    PATH=$(cd -- "$(dirname -- "$PYTHON")" && pwd):$PATH
fi

# Prints "DEVICE COUNT" as torch sees them. torch loads installed backends such as torch-npu by itself.
detect_devices() {
    "$PYTHON" - <<'EOF'
import sys

try:
    import torch
except Exception as error:
    causes = dict.fromkeys(str(e).strip() for e in (error, error.__cause__) if e is not None)
    sys.exit(
        "error: torch cannot be imported: " + "\n".join(causes) + "\n"
        "If torch-npu is named there: source the set_env.sh of its Ascend toolkit, or, where there is no NPU, "
        "uninstall torch-npu. transformers imports it too, so that no training could start."
    )
device = torch.accelerator.current_accelerator(check_available=True)
print(*(("cpu", 1) if device is None else (device.type, torch.accelerator.device_count())))
EOF
}

# Sets DEVICE, and DEVICE_COUNT where it was not NPROC that was given. Looks only once.
choose_devices() {
    if [[ -z ${DEVICE:-} || (-z ${NPROC:-} && -z ${DEVICE_COUNT:-} && $DEVICE != cpu) ]]; then
        local found wanted=${DEVICE:-}
        found=$(detect_devices) || exit 1
        read -r DEVICE DEVICE_COUNT <<<"$found"
        if [[ -n $wanted && $wanted != "$DEVICE" ]]; then
            die "DEVICE=$wanted, but torch sees: $DEVICE. Give NPROC too, to start it all the same."
        fi
    fi
    case $DEVICE in
        npu | cuda) PRECISION=${PRECISION:-bf16} ;;
        cpu)
            PRECISION=${PRECISION:-fp32} DEVICE_COUNT=1
            export DS_ACCELERATOR=cpu   # or DeepSpeed looks for itself, and warns that it finds nothing
            # Threads that wait must not spin: a tenth slower on an idle machine, several times faster on a busy one.
            export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
            ;;
        *) die "DEVICE=$DEVICE is none of npu, cuda, cpu." ;;
    esac
}

# The devices that the user allows, "2,3"; empty where all are.
visible_devices() {
    case $DEVICE in
        npu) printf '%s' "${ASCEND_RT_VISIBLE_DEVICES:-}" ;;
        cuda) printf '%s' "${CUDA_VISIBLE_DEVICES:-}" ;;
    esac
}

# Sets NNODES, and where there are several machines NODE_RANK and MASTER_ADDR, as they are given, or by who started this.
choose_nodes() {
    NNODES=${NNODES:-${SLURM_STEP_NUM_NODES:-${PET_NNODES:-1}}}
    [[ $NNODES =~ ^[1-9][0-9]*$ ]] || die "NNODES=$NNODES is not a number of machines."
    ((NNODES > 1)) || return 0
    [[ -z ${HOSTFILE:-} ]] || die "HOSTFILE and NNODES=$NNODES: give one of them. With NNODES, start each machine yourself."
    NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-${PET_NODE_RANK:-}}}
    if [[ -z ${MASTER_ADDR:-${PET_MASTER_ADDR:-}} && -n ${SLURM_STEP_NODELIST:-} ]]; then
        MASTER_ADDR=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)
    fi
    MASTER_ADDR=${MASTER_ADDR:-${PET_MASTER_ADDR:-}}
    if [[ ! ${NODE_RANK:-} =~ ^[0-9]+$ ]] || ((NODE_RANK >= NNODES)); then
        die "NNODES=$NNODES, and NODE_RANK=${NODE_RANK:-} is none of 0 to $((NNODES - 1)). Give each machine its own."
    fi
    [[ -n $MASTER_ADDR ]] || die "NNODES=$NNODES needs MASTER_ADDR, the first machine as the others reach it."
}

# launch SCRIPT ARGUMENTS…: an argument that stands here too overrides what is chosen for the device.
launch() {
    local script=$1
    shift
    [[ $script == /* ]] || script=$CDM_ROOT/$script
    choose_devices
    choose_nodes

    local -a command=("$PYTHON") flags=()
    local processes=${NPROC:-$DEVICE_COUNT} visible nodes='' status=0
    [[ $processes =~ ^[1-9][0-9]*$ ]] || die "NPROC=$processes is not a number of processes."
    [[ $DEVICE != cpu ]] || flags+=(--use_cpu true)
    case $PRECISION in
        bf16 | fp16) flags+=("--$PRECISION" true) ;;
        fp32) ;;
        *) die "PRECISION=$PRECISION is none of bf16, fp16, fp32." ;;
    esac

    # One process on the CPU is plain Python; everything else DeepSpeed starts.
    if [[ $DEVICE != cpu || $processes -gt 1 || -n ${HOSTFILE:-} || $NNODES -gt 1 ]]; then
        command+=(-m deepspeed.launcher.runner --master_port "${MASTER_PORT:-${PET_MASTER_PORT:-29500}}")
        if ((NNODES > 1)); then
            # DeepSpeed wants a list of machines: their names do not matter without ssh.
            nodes=$(mktemp)
            for ((node = 0; node < NNODES; node++)); do
                printf 'node%d slots=%d\n' "$node" "$processes"
            done >"$nodes"
            command+=(--hostfile "$nodes" --no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR")
        elif [[ -n ${HOSTFILE:-} ]]; then
            # DeepSpeed would go on with this machine alone.
            [[ -f $HOSTFILE ]] || die "HOSTFILE=$HOSTFILE: there is no such file."
            command+=(--hostfile "$HOSTFILE")
            [[ -z ${NPROC:-} ]] || command+=(--num_gpus "$NPROC")
        elif visible=$(visible_devices) && [[ -n $visible ]]; then
            # With --num_gpus, DeepSpeed would take the first devices instead of the visible ones.
            local -a ids
            IFS=, read -r -a ids <<<"$visible"
            ((processes <= ${#ids[@]})) || die "NPROC=$processes, but only the devices $visible are visible."
            visible=$(IFS=, && printf '%s' "${ids[*]:0:processes}")
            command+=(--include "localhost:$visible")
        else
            command+=(--num_gpus "$processes")
        fi
        case ${ZERO:-2} in
            2) flags+=(--deepspeed "$CDM_ROOT/config/deepspeed_config.json") ;;
            3) flags+=(--deepspeed "$CDM_ROOT/config/deepspeed_zero3_config.json") ;;
            *) die "ZERO=$ZERO is none of 2, 3." ;;
        esac
        # Otherwise each process takes all cores.
        if [[ $DEVICE == cpu && -z ${OMP_NUM_THREADS:-} ]]; then
            local cores
            cores=$(nproc)
            export OMP_NUM_THREADS=$((cores > processes ? cores / processes : 1))
        fi
    fi
    supervise "${command[@]}" "$script" "${flags[@]}" "$@" || status=$?
    [[ -z $nodes || ${DRY_RUN:-0} == 1 ]] || rm -f "$nodes"
    return "$status"
}

# train ARGUMENTS…: trains STUDENT by SCRIPT, with the settings of the script that calls it. The arguments are the method's
# own; one that stands here too overrides it.
train() {
    local -a given=(--model_name_or_path "$STUDENT" --output_dir "$OUTPUT" --do_train true --train_file "$DATA")
    [[ $PAIR == none ]] || given+=(--teacher_path "$TEACHER" --kd_alpha "$KD_ALPHA" --kd_temperature "$KD_TEMPERATURE")
    [[ -z $VALIDATION ]] || given+=(--do_eval true --validation_file "$VALIDATION" --eval_strategy epoch)
    launch "modeling/${SCRIPT:?}" "${given[@]}" \
        --block_size "$BLOCK_SIZE" \
        --preprocessing_num_workers "${WORKERS:-4}" \
        --num_train_epochs "$EPOCHS" \
        --learning_rate "$LEARNING_RATE" \
        --lr_scheduler_type "$SCHEDULER" \
        --warmup_steps "$WARMUP" \
        --per_device_train_batch_size "$BATCH_SIZE" \
        --per_device_eval_batch_size "$BATCH_SIZE" \
        --gradient_accumulation_steps "$ACCUMULATION" \
        --logging_steps "${LOGGING_STEPS:-10}" \
        --save_strategy "${CHECKPOINTS:-epoch}" \
        --seed "$SEED" \
        --report_to "${REPORT_TO:-tensorboard}" \
        "$@"
}

# evaluate SCRIPT MODEL ARGUMENTS…: measures a model on the rows of VALIDATION, into OUTPUT.
evaluate() {
    # DeepSpeed evaluates without training under ZeRO-3 alone.
    ZERO=3 launch "modeling/$1" --model_name_or_path "$2" --output_dir "$OUTPUT" --do_eval true \
        --validation_file "$VALIDATION" --block_size "$BLOCK_SIZE" --preprocessing_num_workers "${WORKERS:-4}" \
        --per_device_eval_batch_size "$BATCH_SIZE" --report_to none "${@:3}"
}

# evaluate_student MODEL ARGUMENTS…: beside TEACHER, by CDM's divergence, however the student was trained.
evaluate_student() {
    evaluate run_clm_distill_CDM.py "$1" --teacher_path "$TEACHER" --teacher_to_student_id_mapping "$MAPPER" \
        --kd_temperature "$KD_TEMPERATURE" --topk "${TOPK:-100}" --simi_threshold "$SIMI_THRESHOLD" \
        --alignment "$ALIGNMENT" "${@:2}"
}

# Builds MAPPER, the vocabulary mapper of the kind MAPPER_KIND, for the tokenizers of TEACHER and STUDENT.
build_mapper() {
    local kind
    case ${MAPPER_KIND,,} in
        em) kind=em ;;
        mined) kind=MinED ;;
        prefixem) kind=prefixEM ;;
        *) die "MAPPER_KIND=$MAPPER_KIND is none of em, MinED, prefixEM." ;;
    esac
    run "$PYTHON" "$CDM_ROOT/get_vocab_mapper/get_${kind}_mapper.py" --teacher "$TEACHER" --student "$STUDENT" \
        ${SIMI_THRESHOLD:+--simi_threshold "$SIMI_THRESHOLD"} --output "$MAPPER"
}

# For small models on a CPU, unless PRECISION is given: bf16 where the processor multiplies bfloat16 matrices.
choose_small_precision() {
    local wanted=${PRECISION:-}
    choose_devices
    [[ $DEVICE == cpu && -z $wanted ]] || return 0
    ! grep -qsE 'amx_bf16|avx512_bf16' /proc/cpuinfo || PRECISION=bf16
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    set -euo pipefail
    "$@"
fi
