#!/usr/bin/env bash
# Run all stages of a configuration, evaluate them and write the report:
#   bash run_all.sh [CONFIG] [key.sub=value ...]
# Finished stages are not run again; a stage that was interrupted resumes.
# NPROC=N bash run_all.sh ... runs each stage in N processes, on a GPU each if there are any.
set -euo pipefail
# Paths are relative to the folder of the user, who may be in another one than this file's.
here="$(cd "$(dirname "$0")" && pwd)"
user="$PWD"
cd "$here"
. tools/env.sh
cd "$user"
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"

config="config.yaml"
if [ $# -gt 0 ] && [[ "$1" != *=* ]]; then config="$1"; shift; fi
if [ ! -e "$config" ] && [ -e "$here/$config" ]; then config="$here/$config"; fi
plan=$(python -c '
import os
import sys

sys.path.pop(0)  # the folder of the user
del sys.argv[0]
from engine.command import command
from settings import load_config

def main():
    cfg = load_config(sys.argv[1], sys.argv[2:])
    folder = os.path.join(cfg.output, cfg.name)
    sys.stdout.buffer.write(os.fsencode(f"{folder}\n{chr(32).join(cfg.stages)}\n"))

command(main)' "$here/run_all.sh" "$config" "$@")
{ IFS= read -r folder; read -r stages; } <<< "$plan"

run=python
if [ "${NPROC:-1}" -gt 1 ]; then
  run="torchrun --standalone --nproc_per_node=$NPROC"
fi

for stage in $stages; do
  echo "== $stage"
  case $stage in
    demo_data)   python "$here/tools/make_demo_data.py" --cfg "$config" "$@" ;;
    translate)   $run "$here/translate_cyclegan.py" --cfg "$config" "$@" ;;
    source_only) $run "$here/warmup.py" --cfg "$config" --as source_only "$@" \
                   warmup.distill=0 warmup.crdomix=false bn_recalibrate=[source] ;;
    warmup)      $run "$here/warmup.py" --cfg "$config" "$@" ;;
    selftrain)   $run "$here/selftrain.py" --cfg "$config" "$@" ;;
    oracle)      $run "$here/warmup.py" --cfg "$config" --as oracle "$@" \
                   warmup.labels_from=target warmup.distill=0 warmup.crdomix=false bn_recalibrate=[target] ;;
  esac
done

echo "== evaluate"
$run "$here/evaluate.py" --cfg "$config" "$@"
python "$here/tools/report.py" "$folder"
