#!/usr/bin/env bash
# Run all stages of a configuration, evaluate them and write the report:
#   bash run_all.sh [CONFIG] [key.sub=value ...]
# Finished stages are not run again; a stage that was interrupted resumes.
# NPROC=N bash run_all.sh ... runs each stage in N processes, on a GPU each if there are any.
set -euo pipefail
# Paths are relative to the folder where the user stands, which may be another one than this file's.
user="$PWD"
here="$(cd "$(dirname "$0")" && pwd)"
cd "$here"
. tools/env.sh
cd "$user"
exec python "$here/tools/run_all.py" "$@"
