#!/usr/bin/env bash
# Run all stages of a configuration, evaluate them and write the report:
#   bash run_all.sh [CONFIG] [key.sub=value ...]
# Finished stages are not run again; a stage that was interrupted resumes.
# NPROC=N bash run_all.sh ... runs each stage in N processes, on a GPU each if there are any.
set -euo pipefail
cd "$(dirname "$0")"
. tools/env.sh

config="config.yaml"
if [ $# -gt 0 ] && [[ "$1" != *=* ]]; then config="$1"; shift; fi
plan=$(python -c '
import sys
from engine.command import command
from settings import load_config

def main():
    cfg = load_config(sys.argv[1], sys.argv[2:])
    print(cfg.output, cfg.name, sep="/")
    print(*cfg.stages)

command(main)' "$config" "$@")
{ IFS= read -r folder; read -r stages; } <<< "$plan"

run=python
if [ "${NPROC:-1}" -gt 1 ]; then
  run="torchrun --standalone --nproc_per_node=$NPROC"
fi

for stage in $stages; do
  echo "== $stage"
  case $stage in
    demo_data)   python -m tools.make_demo_data --cfg "$config" "$@" ;;
    translate)   $run translate_cyclegan.py --cfg "$config" "$@" ;;
    source_only) $run warmup.py --cfg "$config" --as source_only "$@" \
                   warmup.distill=0 warmup.crdomix=false bn_recalibrate=[source] ;;
    warmup)      $run warmup.py --cfg "$config" "$@" ;;
    selftrain)   $run selftrain.py --cfg "$config" "$@" ;;
    oracle)      $run warmup.py --cfg "$config" --as oracle "$@" \
                   warmup.labels_from=target warmup.distill=0 warmup.crdomix=false bn_recalibrate=[target] ;;
  esac
done

echo "== evaluate"
$run evaluate.py --cfg "$config" "$@"
python -m tools.report "$folder"
