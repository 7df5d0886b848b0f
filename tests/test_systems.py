"""Other operating systems, as far as one machine shows them; start methods; tools/run_all.py."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import types

import psutil
import pytest
from conftest import ROOT, log, ok, picture, same, save, state

from engine import files
from engine.config import UserError

COMMANDS = [
    "translate_cyclegan", "warmup", "selftrain", "evaluate", "tools.run_all", "tools.own_data",
    "tools.pack", "tools.report", "tools.bench", "tools.gpu_hour", "tools.make_demo_data",
]  # fmt: skip
# what not all systems have -> the one file that uses it, behind a question whether it is there
ON_SOME_SYSTEMS = {
    "mallopt": "engine/images.py", "ctypes": "engine/images.py",
    "sched_getaffinity": "engine/processes.py", "/sys/fs": "engine/processes.py",
    "/proc/": "engine/device.py", "SIGHUP": "tools/run_all.py",
    "start_new_session": "tools/run_all.py",
}  # fmt: skip
NOWHERE = (
    r"import fcntl|import resource\b|import pwd|import grp|import termios|import pty\b|os\.fork\b|"
    r"os\.wait|killpg|os\.getpgid|os\.setsid|os\.getuid|os\.uname|SIGKILL|SIGUSR|SIGALRM|"
    r"get_context\(.fork|set_start_method"
)
# Python without what Windows or macOS lack; found by every process, those of a loader as well
LACKING = """
import os, signal
for name in ("fork", "forkpty", "killpg", "sched_getaffinity", "wait4", "getpgid", "setsid"):
    delattr(os, name)
for name in ("SIGKILL", "SIGUSR1", "SIGALRM", "SIGHUP"):
    delattr(signal, name)
"""


def sources():
    for path in (*ROOT.glob("*.py"), *ROOT.glob("engine/*.py"), *ROOT.glob("tools/*.py")):
        yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def test_what_not_all_systems_have_stands_in_one_place():
    for word, place in ON_SOME_SYSTEMS.items():
        assert {path for path, text in sources() if word in text} == {place}, word
    for path, text in sources():
        assert not re.search(NOWHERE, text), path


@pytest.fixture
def elsewhere(tmp_path):
    """Return the environment of a Python without fcntl, resource and other things of Unix."""
    folder = tmp_path / "lacking"
    for name in ("fcntl", "resource", "pwd", "grp", "termios"):
        save_text(folder / f"{name}.py", f"raise ModuleNotFoundError('no {name} here')\n")
    save_text(folder / "sitecustomize.py", LACKING)
    paths = f"{folder}{os.pathsep}{ROOT}"
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def save_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


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


def test_without_what_unix_alone_has_the_demo_trains(elsewhere, tmp_path):
    for i in range(4):
        image, label = picture(i, (192, 384))
        save(tmp_path / f"game/images/{i}.png", image)
        save(tmp_path / f"game/labels/{i}.png", label)
    options = [f"source.root={tmp_path}/game", f"output={tmp_path}/runs", "bn_images=2"]
    options += ["warmup.steps=5", "warmup.crdomix=false", "bn_recalibrate=[source]", "workers=0"]
    options += ["pictures_every=5", "save_every=2", "device=cpu"]
    done = python(elsewhere, "warmup.py", "--cfg", "configs/demo.yaml", *options)
    assert done.returncode == 0, done.stderr
    assert log(tmp_path / "runs/demo")[-1]["finished"] == 5
    assert (tmp_path / "runs/demo/warmup.pth").is_file()


def test_a_locked_file_that_windows_lets_nobody_read_is_not_read(tmp_path, monkeypatch):
    """One handle alone reads and writes there while a lock is held."""
    windows = types.SimpleNamespace(name="nt", getpid=os.getpid)
    monkeypatch.setattr(files, "os", windows)
    files.lock(tmp_path / "run", "warmup")
    assert (tmp_path / "run/.lock").read_bytes() == b""
    held = dict(files.locks)
    files.locks.clear()
    with pytest.raises(UserError, match="another process is at work here"):
        files.lock(tmp_path / "run", "warmup")
    files.locks.update(held)
    files.unlock_all()
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- start methods


@pytest.fixture(params=["fork", "spawn", "forkserver"])
def start_method(request):
    """The method by which DataLoader workers start; Linux forked them up to Python 3.13."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(before, force=True)


def test_a_run_is_the_same_under_every_start_method(dataset, run, start_method):
    options = ("warmup.crdomix=false", "warmup.steps=3", "save_every=2")
    ok(run("warmup", *options, "name=none"))
    ok(run("warmup", *options, "name=started", "workers=1"))
    a, b = (state(dataset / f"runs/{name}/warmup.pth") for name in ("none", "started"))
    assert same(a["student"], b["student"])
    assert same(a["teacher"], b["teacher"])


def test_a_loader_that_ends_early_leaves_no_worker(dataset, run, start_method):
    code, _, err = run("warmup", "warmup.crdomix=false", "workers=1", "optimizer.lr_head=100",
                       "optimizer.lr_backbone=100", "warmup.steps=60", "log_every=1")  # fmt: skip
    assert code in (0, 2), err
    assert multiprocessing.active_children() == []


# a process that is killed by its own worker, before torch watches over the workers
KILLED = """
import multiprocessing, os, signal, sys, time, types
import datasets

set_up = datasets._set_up_worker

def kill_the_parent(number):
    with open(f"being_written{number}", "w") as file:
        file.write(str(os.getpid()))
    os.replace(f"being_written{number}", f"worker{number}")
    while not (os.path.exists("worker0") and os.path.exists("worker1")):
        time.sleep(0.01)
    if number == 1:
        os.kill(int(os.environ["LOADS"]), signal.SIGKILL)
    time.sleep(1)
    set_up(number)

datasets._set_up_worker = kill_the_parent
if __name__ == "__main__":
    os.environ["LOADS"] = str(os.getpid())
    multiprocessing.set_start_method(sys.argv[1])
    cpu = types.SimpleNamespace(type="cpu")
    run = types.SimpleNamespace(cfg=types.SimpleNamespace(workers=2), device=cpu)
    next(iter(datasets.loader(run, range(8), batch_size=1)))
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_no_worker_outlives_a_process_that_is_killed_while_they_start(tmp_path, method):
    save_text(tmp_path / "killed.py", KILLED)
    line = [sys.executable, "killed.py", method]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    loads = subprocess.Popen(line, cwd=tmp_path, env=env, **silent)
    assert loads.wait(timeout=120) == -signal.SIGKILL
    pids = {int((tmp_path / f"worker{number}").read_text()) for number in range(2)}
    alive = [process for process in psutil.process_iter() if process.pid in pids]
    _, alive = psutil.wait_procs(alive, timeout=15)
    for process in alive:
        process.kill()
    assert not alive


# ---------------------------------------------------------------- run_all


def run_all(dataset, *arguments, cwd=ROOT, **environment):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return python(env, "-m", "tools.run_all", *arguments, cwd=cwd)


def test_run_all_from_any_folder_with_a_relative_configuration(dataset):
    options = ["stages=[warmup,oracle]", "warmup.steps=2", "warmup.crdomix=false", "output=out"]
    line = ["bash", ROOT / "run_all.sh", "test.yaml", *options]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    more = {"cwd": dataset, "env": env, "capture_output": True, "text": True}
    done = subprocess.run(line, check=False, **more)
    assert done.returncode == 0, done.stderr
    heads = [line for line in done.stdout.splitlines() if line.startswith("== ")]
    assert heads == ["== warmup", "== oracle", "== evaluate"]
    folder = dataset / "out/test"
    assert (folder / "report.html").is_file()
    warmup, oracle = (state(folder / f"{name}.pth")["config"] for name in ("warmup", "oracle"))
    found = [(c["warmup"]["labels_from"], c["bn_recalibrate"]) for c in (warmup, oracle)]
    assert found == [("source", ["source", "target"]), ("target", ["target"])]


def test_run_all_ends_with_the_first_stage_that_fails(dataset):
    done = run_all(dataset, dataset / "test.yaml", "stages=[warmup]", "source.root=nowhere")
    assert (done.returncode, "== evaluate" in done.stdout) == (2, False)
    assert done.stderr.count("\n") == 1
    done = run_all(dataset, dataset / "none.yaml")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("run_all.py: ")


def test_run_all_in_two_processes(dataset):
    options = ["stages=[warmup]", "warmup.crdomix=false", "warmup.steps=2", "bn_images=2"]
    done = run_all(dataset, dataset / "test.yaml", *options, NPROC="2")
    assert done.returncode == 0, done.stderr
    environment = (dataset / "runs/test/environment.json").read_text(encoding="utf-8")
    assert '"processes": 2' in environment


@pytest.mark.skipif(os.name == "nt", reason="Windows has no process groups")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_run_all_passes_a_signal_on_once(dataset, number, code):
    """To the process alone and to its group: the stage ends after its step, with a checkpoint."""
    options = ["stages=[warmup]", "warmup.crdomix=false", "warmup.steps=3000", "log_every=1"]
    line = [sys.executable, "-m", "tools.run_all", dataset / "test.yaml", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*map(str, line)], cwd=ROOT, start_new_session=True, **pipes)
    for text in process.stdout:
        if text.startswith("warmup 2/"):
            break
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in err) == (code, False), err
    assert 0 < state(dataset / "runs/test/warmup.unfinished.pth")["step"] < 3000


def test_a_spawned_worker_that_reads_the_script_runs_no_stage(monkeypatch):
    from tools import run_all

    worker = types.SimpleNamespace(name="Process-1")
    monkeypatch.setattr(multiprocessing, "current_process", lambda: worker)
    assert run_all.run_all("no such file") is None
