#!/usr/bin/env bash
# Another name of eval_code_task.sh.
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/eval_code_task.sh" "$@"
