#!/usr/bin/env bash
# Lint, format and all tests:  bash run_tests.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")"
. tools/env.sh
# The scores are compared with cityscapesscripts'. What it requires is left out: PyPI's typing is part of it (see env.sh).
python -c "import cityscapesscripts" 2> /dev/null ||
  python -m pip install --quiet --disable-pip-version-check --no-deps cityscapesscripts==2.3.0
ruff check .
ruff format --check .
python -m pytest "$@"
