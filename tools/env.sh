# Sourced by run_all.sh, run_tests.sh and tools/ablate.sh, in the repository's root. Uses the active
# virtual or conda environment, or makes .venv; installs requirements.txt into it, once.
# REQUIREMENTS=FILE installs another file's packages instead.
ours=""
if [ -z "${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" ]; then
  [ -x .venv/bin/python ] || python3 -m venv .venv
  . .venv/bin/activate
  ours=1
fi
environment="${VIRTUAL_ENV:-$CONDA_PREFIX}"
requirements="${REQUIREMENTS:-requirements.txt}"
# each file has a stamp of its own, which holds the files that it names by -r as well
stamp="$environment/.diga-${requirements//\//_}"
wanted="$(cat "$requirements"; sed -n 's/^-r //p' "$requirements" |
  while read -r file; do cat "$(dirname "$requirements")/$file"; done)"
if [ ! -f "$stamp" ] || [ "$wanted" != "$(cat "$stamp")" ]; then
  python -m pip install --quiet --disable-pip-version-check -r "$requirements"
  printf '%s\n' "$wanted" > "$stamp"
fi
# PyPI's package typing is for Python 2 and 3.4. The worker processes of torch.compile import it in
# place of Python's own module, and crash.
if compgen -G "$environment/lib/python3*/site-packages/typing.py" > /dev/null; then
  if [ -n "$ours" ]; then
    python -m pip uninstall --quiet --yes typing
  else
    echo "$environment: holds PyPI's typing, which breaks torch.compile; pip uninstall typing" >&2
  fi
fi
# Where OpenCV lacks the system's libGL, its build without windows takes its place.
if ! python -c "import cv2" 2> /dev/null; then
  python -m pip uninstall --quiet --yes opencv-python
  python -m pip install --quiet --disable-pip-version-check opencv-python-headless
fi
