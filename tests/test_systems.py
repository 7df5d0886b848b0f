"""Other operating systems, as far as one machine shows them; start methods; tools/run_all.py."""

import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, ok, same_networks, state

from engine.log import write_log
from tools.run_all import minutes_left

COMMANDS = [
    "translate_cyclegan", "warmup", "selftrain", "evaluate", "tools.run_all", "tools.own_data",
    "tools.export", "tools.convert", "tools.report", "tools.bench", "tools.baselines",
    "tools.make_demo_data",
]  # fmt: skip
# Python without what Windows or macOS lack; found by every process, those of a loader as well
LACKING = """
import os, signal
for name in ("fork", "forkpty", "killpg", "sched_getaffinity", "wait4", "getpgid", "setsid"):
    delattr(os, name)
for name in ("SIGKILL", "SIGUSR1", "SIGALRM", "SIGHUP"):
    delattr(signal, name)
"""


@pytest.fixture
def elsewhere(tmp_path):
    """Return the environment of a Python without fcntl, resource and other things of Unix."""
    folder = tmp_path / "lacking"
    folder.mkdir()
    for name in ("fcntl", "resource", "pwd", "grp", "termios"):
        (folder / f"{name}.py").write_text(f"raise ModuleNotFoundError('no {name} here')\n")
    (folder / "sitecustomize.py").write_text(LACKING)
    paths = f"{folder}{os.pathsep}{ROOT}"
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def python(env, *arguments, cwd=ROOT):
    line = [sys.executable, *map(str, arguments)]
    done = {"cwd": cwd, "env": env, "capture_output": True, "text": True, "check": False}
    return subprocess.run(line, **done)


HELP = """
import importlib, sys
for name in sys.argv[1:]:
    module = importlib.import_module(name)
    sys.argv = [name, "--help"]
    try:
        module.main()
    except SystemExit as end:
        assert end.code == 0, name
"""


def test_without_what_unix_alone_has_every_command_says_its_help(elsewhere):
    lacks = python(elsewhere, "-c", "import fcntl")
    assert "no fcntl here" in lacks.stderr
    done = python(elsewhere, "-c", HELP, *COMMANDS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage:") == len(COMMANDS)


# ---------------------------------------------------------------- start methods


@pytest.fixture(params=["fork", "spawn", "forkserver"])
def start_method(request):
    """The method by which DataLoader workers start; Linux forked them up to Python 3.13."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(before, force=True)


def test_a_run_is_the_same_under_every_start_method(finished, run, start_method):
    ok(run("warmup", "name=new", f"translation.images={finished}/translated", "workers=1"))
    assert same_networks(finished / "warmup.pth", finished.parent / "new/warmup.pth")


# ---------------------------------------------------------------- run_all


def run_all(*arguments, **environment):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return python(env, "-m", "tools.run_all", *arguments, cwd=None)


def test_run_all_from_any_folder_with_a_relative_configuration(dataset):
    options = ["stages=[warmup,oracle]", "warmup.steps=2", "warmup.crdomix=false", "output=out"]
    line = ["bash", ROOT / "run_all.sh", "test.yaml", *options]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, check=False, cwd=dataset, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    heads = [line for line in done.stdout.splitlines() if line.startswith("== ")]
    left = re.search(r": \d\.\d min of training networks left", heads[1])[0]
    assert heads == ["== warmup (1 of 3)", f"== oracle (2 of 3){left}", "== evaluate (3 of 3)"]
    folder = dataset / "out/test"
    assert (folder / "report.html").is_file()
    assert not same_networks(folder / "warmup.pth", folder / "oracle.pth")


def test_the_time_that_is_left_of_a_run(config):
    """By a warm-up of 16 minutes: 6 steps of 2 images that pass the network 8 times."""
    cfg = config()
    Path("runs/test").mkdir(parents=True)
    write_log(Path("runs/test"), "warmup", finished=6, seconds=960)
    expected = (4 * 2 * 12 * 2 + 6 * 2 * 3) / (6 * 2 * 8) * 16
    assert f": {expected:.1f} min of" in minutes_left(cfg, ["selftrain", "oracle"])


def test_run_all_ends_with_the_first_stage_that_fails(dataset):
    done = run_all("test.yaml", "stages=[warmup]", "source.root=nowhere")
    assert (done.returncode, "== evaluate" in done.stdout) == (2, False)
    assert done.stderr.count("\n") == 1
    done = run_all("none.yaml")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("run_all.py: ")


@pytest.mark.parametrize("code", [143, 130])
def test_run_all_ends_by_a_signal_after_the_step_with_a_checkpoint(dataset, code):
    """SIGTERM to run_all alone, which passes it on; a terminal's SIGINT to the whole group."""
    options = ["stages=[warmup]", "warmup.crdomix=false", "warmup.steps=3000", "log_every=1"]
    line = [sys.executable, "-m", "tools.run_all", "test.yaml", *options]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(line, env=env, start_new_session=True, **pipes)
    for text in process.stdout:
        if text.startswith("warmup 2/"):
            break
    send = os.kill if code == 143 else os.killpg
    send(process.pid, code - 128)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in err) == (code, False), err
    assert f"stopped by signal {code - 128}" in err
    assert 0 < state(dataset / "runs/test/warmup.unfinished.pth")["step"] < 3000
