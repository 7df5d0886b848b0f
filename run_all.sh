#!/usr/bin/env bash
# All stages of a configuration, then their evaluation and report:  bash run_all.sh [CONFIG] [key.sub=value ...]
# Stages that are finished are not run again; one that was interrupted goes on where it was.
set -euo pipefail
cd "$(dirname "$0")"
. ./env.sh

config="config.yaml"
if [ $# -gt 0 ] && [[ "$1" != *=* ]]; then config="$1"; shift; fi
plan=$(python -c 'import sys; from config import load_config; from engine import command
def plan(cfg): print(cfg.output, cfg.name, sep="/"); print(*cfg.stages)
command(lambda: plan(load_config(sys.argv[1], sys.argv[2:])))' "$config" "$@")
{ IFS= read -r folder; read -r stages; } <<< "$plan"

for stage in $stages; do
  echo "== $stage"
  case $stage in
    demo_data)   python make_demo_data.py --cfg "$config" "$@" ;;
    translate)   python translate_cyclegan.py --cfg "$config" "$@" ;;
    source_only) python warmup.py --cfg "$config" --as source_only "$@" \
                   warmup.distill=0 warmup.crdomix=false bn_recalibrate=[source] ;;
    warmup)      python warmup.py --cfg "$config" "$@" ;;
    selftrain)   python selftrain.py --cfg "$config" "$@" ;;
    oracle)      python warmup.py --cfg "$config" --as oracle "$@" \
                   warmup.labels_from=target warmup.distill=0 warmup.crdomix=false bn_recalibrate=[target] ;;
  esac
done

echo "== evaluate"
python evaluate.py --cfg "$config" "$@"
python report.py "$folder"
