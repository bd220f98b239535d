# shellcheck shell=bash # it is sourced, and has no #! line
# Sourced by what must run on a bare machine: sets PYTHON to an interpreter that has the project's dependencies.
#
#     source script_train/setup_env.sh
#     setup_env requirements.txt
#
# Read from the environment:
#   PYTHON       an interpreter that has everything already: nothing is installed
#   VENV         the virtual environment to use, made if it is not there     (.venv of the project)
#   BASE_PYTHON  the interpreter that makes it, Python 3.10 to 3.13           (python3)

CDM_ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

setup_env() {
    [[ -z ${PYTHON:-} ]] || return 0
    local requirements=$1 base=${BASE_PYTHON:-python3}
    VENV=${VENV:-$CDM_ROOT/.venv}
    if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        "$base" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || {
            echo "error: $base is not Python 3.10 to 3.13: $("$base" --version 2>&1). Set BASE_PYTHON." >&2
            exit 1
        }
        echo "Making the virtual environment $VENV" >&2
        "$base" -m venv "$VENV"
    fi

    # Installing again what is there takes pip half a minute: only when a requirements file has changed.
    local sum stamp=$VENV/cdm_installed.txt
    sum=$(cat "$CDM_ROOT"/requirements*.txt "$CDM_ROOT/pyproject.toml" | cksum)
    if ! grep -qsxF "$sum $requirements" "$stamp"; then
        echo "Installing $requirements into $VENV" >&2
        # `-e .` in it means the folder that pip runs in.
        (cd "$CDM_ROOT" && "$VENV/bin/python" -m pip install --progress-bar off -r "$requirements") >&2
        grep -qsF "$sum " "$stamp" || : >"$stamp"
        # Every requirements file includes requirements.txt.
        printf '%s\n' "$sum requirements.txt" "$sum $requirements" >>"$stamp"
    fi
    PYTHON=$VENV/bin/python
}
