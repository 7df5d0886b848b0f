#!/usr/bin/env bash
# All stages of a configuration, then their evaluation and report:  bash run_all.sh [CONFIG] [key.sub=value ...]
# Stages that are finished are not run again; one that was interrupted goes on where it was.
# NPROC=N bash run_all.sh ... runs each stage in N processes, a GPU each if there are any.
set -euo pipefail
cd "$(dirname "$0")"
. ./env.sh

config="config.yaml"
if [ $# -gt 0 ] && [[ "$1" != *=* ]]; then config="$1"; shift; fi
plan=$(python -c 'import sys; from config import load_config; from engine import command
def plan(cfg): print(cfg.output, cfg.name, sep="/"); print(*cfg.stages)
command(lambda: plan(load_config(sys.argv[1], sys.argv[2:])))' "$config" "$@")
{ IFS= read -r folder; read -r stages; } <<< "$plan"

run=python
if [ "${NPROC:-1}" -gt 1 ]; then
  run="torchrun --standalone --nproc_per_node=$NPROC"
fi

for stage in $stages; do
  echo "== $stage"
  case $stage in
    demo_data)   python make_demo_data.py --cfg "$config" "$@" ;;
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
python report.py "$folder"
