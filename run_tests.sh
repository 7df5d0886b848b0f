#!/usr/bin/env bash
# Lint, format and all tests:  bash run_tests.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")"
REQUIREMENTS="${REQUIREMENTS:-tests/requirements.txt}"
. tools/env.sh
# The scores are compared with those of cityscapesscripts. Its requirements stay out, for one of them
# is PyPI's typing: see tools/env.sh.
python -c "import cityscapesscripts" 2> /dev/null ||
  python -m pip install --quiet --disable-pip-version-check --no-deps cityscapesscripts==2.3.0
# The tensors of the tests are small: threads would wait for each other, on a busy machine for long.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
ruff check .
ruff format --check .
# Two processes share the tests; with LONG=1 one has the memory and the table of a file for itself.
python -m pytest --numprocesses "$([ -n "${LONG:-}" ] && echo 0 || echo 2)" --dist worksteal "$@"
