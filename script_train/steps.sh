# shellcheck shell=bash # it is sourced, and has no #! line
# Sourced by scripts of several steps, which go on where they stopped: each step leaves a mark when it is finished.
#
#     source script_train/steps.sh
#     steps=2
#     do_step "The rows" cp rows.json "$OUTPUT/rows.json"
#     do_step "Their number" count "$OUTPUT/rows.json"      # a command, or a function of the script
#
# Read from the script:
#   OUTPUT  the folder whose .done holds the marks
#   steps   how many there are in all
#   so_far  for do_step: what the first step depends on besides its command; set after sourcing

step=0
so_far=

# do_step NAME COMMAND…: runs the command, unless this very one, after the very same steps, was finished earlier.
do_step() {
    local name=$1
    shift
    so_far+="$*"$'\n'
    run_step $((step + 1)) "$(cksum <<<"$so_far")" "$name" "$@"
}

# run_step MARK SUM NAME COMMAND…: the same for steps that are no single chain. The mark is a name of the step's own,
# and SUM, a checksum of all that its result depends on, says whether the finished step was this one.
run_step() {
    local mark=$OUTPUT/.done/$1 sum=$2 name=$3 began=$SECONDS
    shift 3
    step=$((step + 1))
    if [[ -e $mark && $(<"$mark") == "$sum" ]]; then
        printf '\n[%d/%d] %s: done before\n' "$step" "${steps:?}" "$name"
        return
    fi
    printf '\n[%d/%d] %s\n' "$step" "$steps" "$name"
    mkdir -p "$OUTPUT/.done"
    rm -f "$mark"
    "$@"
    printf '%s\n' "$sum" >"$mark"
    printf '[%d/%d] %d s\n' "$step" "$steps" $((SECONDS - began))
}
