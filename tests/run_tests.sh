#!/usr/bin/env bash
# Installs what the tests need and runs them. Arguments go to pytest, paths relative to the project:
#
#     bash tests/run_tests.sh tests/unit -k mapper
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/../script_train/setup_env.sh"
setup_env requirements-dev.txt
cd "$CDM_ROOT"
exec "$PYTHON" -m pytest "$@"
