#!/usr/bin/env bash
# Installs what the tests need and runs them. Arguments go to pytest, paths relative to the project:
#
#     bash tests/run_tests.sh tests/unit -k mapper
#
# WORKERS processes share the test files (3: on two cores too, where ranks often wait for each other); 0 runs them in
# this process, for a debugger.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/../script_train/setup_env.sh"
setup_env requirements-dev.txt
cd "$CDM_ROOT"
exec "$PYTHON" -m pytest -n "${WORKERS:-3}" --dist loadfile --no-loadscope-reorder "$@"
