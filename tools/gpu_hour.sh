#!/usr/bin/env bash
# The first hour on a GPU, see tools/gpu_hour.py:  bash tools/gpu_hour.sh [--all] [--minutes N]
# Uses the active environment, or .venv, or python3 as it is. Installs nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-}"
if [ -z "$python" ]; then
  python=python3
  if [ -n "${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" ]; then python=python; fi
  if [ "$python" = python3 ] && [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
fi
exec "$python" -m tools.gpu_hour "$@"
