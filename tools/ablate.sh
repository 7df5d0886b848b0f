#!/usr/bin/env bash
# Train a finished run again with one part of DiGA off, for each part in turn (default: all parts):
#   bash tools/ablate.sh [CONFIG [PART ...]]
# Leaves runs/NAME_PART beside runs/NAME and prints one table.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/env.sh

config="${1:-configs/demo.yaml}"
shift || true
run=$(python -c 'import sys
from engine.command import command
from settings import load_config
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
  # a change of the self-training alone starts from the run's own warm-up
  case "$changes" in selftrain.*) cp -n "$run/warmup.pth" "$folder/" ;; esac
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
        scores = [results[stage]["miou"] for stage in ("warmup", "selftrain_round1", "selftrain")]
        name = path.name.removeprefix(run.name).removeprefix("_") or "all of DiGA"
        print("|", name, "|", " | ".join("-" if x is None else f"{x:.1f}" for x in scores), "|")
PYTHON
