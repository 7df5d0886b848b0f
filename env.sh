# Sourced by run_all.sh and run_tests.sh: the active virtual or conda environment, or else .venv, with requirements.txt in it.
if [ -z "${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" ]; then
  [ -x .venv/bin/python ] || python3 -m venv .venv
  . .venv/bin/activate
fi
installed="${VIRTUAL_ENV:-$CONDA_PREFIX}/.diga-requirements.txt"
if ! cmp -s requirements.txt "$installed"; then
  python -m pip install --quiet --disable-pip-version-check -r requirements.txt
  cp requirements.txt "$installed"
fi
