#!/usr/bin/env bash
# Each part of DiGA off in turn, on a run that is finished:  bash ablate.sh [CONFIG [PART ...]]     (default: all parts)
# Leaves runs/NAME_PART beside runs/NAME and prints one table.
set -euo pipefail
cd "$(dirname "$0")"
. ./env.sh

config="${1:-configs/demo.yaml}"
shift || true
run=$(python -c 'import sys; from config import load_config; from engine import command
command(lambda: print(*map(load_config(sys.argv[1]).get, ("output", "name")), sep="/"))' "$config")

declare -A parts=(
  [no_edge]="translation.edge=0"
  [no_crdomix]="warmup.crdomix=false selftrain.crdomix=false"
  [no_distillation]="warmup.distill=0 selftrain.distill=0"
  [weak_to_strong_only]="warmup.strong_to_weak=0 selftrain.strong_to_weak=0"
  [no_augmentation]="warmup.strong=0 selftrain.strong=0"
  [no_bn_recalibration]="bn_recalibrate=[]"
  [bn_source]="bn_recalibrate=[source]"
  [bn_target]="bn_recalibrate=[target]"
  [probability_labels]="selftrain.labels=probability"
  [feature_labels]="selftrain.labels=feature"
  [target_centroids]="selftrain.centroids=target"
  [fixed_centroids]="selftrain.momentum=0"
  [no_class_mixing]="selftrain.class_mixing=false"
)
names=("$@")
[ $# -gt 0 ] || names=("${!parts[@]}")
for part in "${names[@]}"; do
  changes="${parts[$part]}"
  folder="${run}_$part"
  mkdir -p "$folder"
  stages="[warmup,selftrain]"
  case "$changes" in
    translation.*) stages="[translate,warmup,selftrain]" ;;
    *) changes+=" translation.images=$run/translated" ;;
  esac
  case "$changes" in selftrain.*) cp -n "$run/warmup.pth" "$folder/" ;; esac # the same warm-up goes into it
  bash run_all.sh "$config" "name=$(basename "$folder")" "stages=$stages" $changes
done

python - "$run" <<'PYTHON'
import json, sys
from pathlib import Path

run = Path(sys.argv[1])
print("| | warm-up | round 1 | self-training |\n| --- | --- | --- | --- |")
for path in (run, *sorted(run.parent.glob(f"{run.name}_*"))):
    if (path / "results.json").exists():
        results = json.loads((path / "results.json").read_text())
        figures = [results[stage]["miou"] for stage in ("warmup", "selftrain_round1", "selftrain")]
        print("|", path.name.removeprefix(run.name).removeprefix("_") or "all of DiGA", "|", " | ".join(f"{x:.1f}" for x in figures), "|")
PYTHON
