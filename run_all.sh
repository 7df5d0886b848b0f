#!/usr/bin/env bash
# Run all stages of a configuration, evaluate them and write the report:
#   bash run_all.sh [CONFIG] [key.sub=value ...]
# Finished stages are not run again; a stage that was interrupted resumes.
# NPROC=N bash run_all.sh ... runs each stage in N processes, on a GPU each if there are any.
set -euo pipefail
# a configuration may lie where the user stands
if [[ "${1:-}" != /* && -f "${1:-}" ]]; then set -- "$PWD/$1" "${@:2}"; fi
cd "$(dirname "$0")"
. tools/env.sh
exec python -m tools.run_all "$@"
