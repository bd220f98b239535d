#!/usr/bin/env bash
# Another name of eval_dolly.sh.
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/eval_dolly.sh" "$@"
