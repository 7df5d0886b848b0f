#!/usr/bin/env bash
# Lint, format and all tests:  bash run_tests.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")"
. ./env.sh
ruff check .
ruff format --check .
python -m pytest "$@"
