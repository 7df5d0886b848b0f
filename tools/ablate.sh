#!/usr/bin/env bash
# Train a finished run again with one part of DiGA off, for each part in turn (default: all parts):
#   bash tools/ablate.sh [CONFIG [PART ...]]
# Leaves runs/NAME_PART beside runs/NAME and prints one table.
set -euo pipefail
user="$PWD"
here="$(cd "$(dirname "$0")/.." && pwd)"
cd "$here"
. tools/env.sh
cd "$user"

config="${1:-configs/demo.yaml}"
shift || true
[ -e "$config" ] || [ ! -e "$here/$config" ] || config="$here/$config"
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
  if [ -z "${parts[$part]:-}" ]; then
    echo "ablate.sh: $part: no such part; choose from ${!parts[*]}" >&2
    exit 2
  fi
done
run=$(PYTHONPATH="$here" python -c 'import sys
from engine.command import command
from settings import load_config
command(lambda: print(*map(load_config(sys.argv[1]).get, ("output", "name")), sep="/"))' "$config")
if [ ! -e "$run/results.json" ]; then
  echo "ablate.sh: $run: is no finished run; bash run_all.sh $config comes first" >&2
  exit 2
fi

for part in "${names[@]}"; do
  changes="${parts[$part]}"
  folder="${run}_$part"
  mkdir -p "$folder"
  stages="[warmup,selftrain]"
  case "$changes" in
    translation.*) stages="[translate,warmup,selftrain]" ;;
    *) [ ! -e "$run/translated" ] || changes+=" translation.images=$run/translated" ;;
  esac
  # a change of the self-training alone starts from the run's own warm-up
  case "$changes" in
    selftrain.*) [ -e "$folder/warmup.pth" ] || cp "$run/warmup.pth" "$folder/" ;;
  esac
  bash "$here/run_all.sh" "$config" "name=$(basename "$folder")" "stages=$stages" $changes
done

python - "$run" <<'PYTHON'
import json, sys
from pathlib import Path

run = Path(sys.argv[1])
print("| | warm-up | round 1 | self-training |\n| --- | --- | --- | --- |")
for path in (run, *sorted(run.parent.glob(f"{run.name}_*"))):
    if (path / "results.json").exists():
        results = json.loads((path / "results.json").read_text("utf-8"))
        stages = ("warmup", "selftrain_round1", "selftrain")
        scores = [results.get(stage, {}).get("miou") for stage in stages]
        name = path.name.removeprefix(run.name).removeprefix("_") or "all of DiGA"
        print("|", name, "|", " | ".join("-" if x is None else f"{x:.1f}" for x in scores), "|")
PYTHON
