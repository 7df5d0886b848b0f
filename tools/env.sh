# Sourced by run_all.sh and run_tests.sh: the active virtual or conda environment, or else .venv, with requirements.txt in it
# (REQUIREMENTS=FILE: with another file's packages).
ours=""
if [ -z "${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" ]; then
  [ -x .venv/bin/python ] || python3 -m venv .venv
  . .venv/bin/activate
  ours=1
fi
environment="${VIRTUAL_ENV:-$CONDA_PREFIX}"
requirements="${REQUIREMENTS:-requirements.txt}"
if ! cmp -s "$requirements" "$environment/.diga-requirements.txt"; then
  python -m pip install --quiet --disable-pip-version-check -r "$requirements"
  cp "$requirements" "$environment/.diga-requirements.txt"
fi
# PyPI's typing is for Python 2 and 3.4; torch.compile's processes import it in place of Python's own, and end.
if compgen -G "$environment/lib/python3*/site-packages/typing.py" > /dev/null; then
  if [ -n "$ours" ]; then
    python -m pip uninstall --quiet --yes typing
  else
    echo "PyPI's typing is installed in $environment, and breaks torch.compile: pip uninstall typing" >&2
  fi
fi
