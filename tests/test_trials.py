"""Trials: damaged configurations, checkpoints, logs, images, surroundings; a seeded generator.

Each is a command in a process of its own, forked from one that has imported everything, with its
stderr in a file. It ends with exit code 0, 2, 130 or 143, with one line where it fails, and nothing
finished is lost. LONG=1 runs 1,000 and more of them.
"""

import importlib
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from conftest import FORKS, ROOT, into_files, same, state
from conftest import dataset as make_dataset

from engine import folders
from engine.command import command
from engine.config import UserError

LONG = bool(os.environ.get("LONG"))
FAST = ("selftrain.crdomix=false", "warmup.crdomix=false", "selftrain.rounds=1", "log_every=1")
FAST += ("save_every=1", "warmup.steps=3", "selftrain.steps=2", "bn_images=2")
VALUES = [None, 3, -1, "x", "", [], {}, [1, [2]], {"a": {}}, 1e300, True, "\n", torch.zeros(2)]


def _child(script, arguments, folder, out, env, stdout, chatty):
    os.setsid()
    os.environ |= env
    into_files(out, stdout)
    os.chdir(folder)
    sys.argv = [f"{script}.py", *arguments]
    if chatty:
        folders.read_image = read_chattily
    command(importlib.import_module(script).main)


def read_chattily(path):
    """Fail as a library does."""
    os.write(2, b"libpng error: CRC\n")
    warnings.warn("of a library", stacklevel=1)
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    raise UserError(f"{path}: is broken")


class Case:
    """One trial: a copy of the finished run, and commands in it."""

    def __init__(self, template, folder):
        self.folder, self.run = folder, folder / "runs/test"
        shutil.rmtree(folder, ignore_errors=True)  # always the same: a checkpoint knows its data
        shutil.copytree(template, folder, symlinks=True)

    def start(self, script, *arguments, cfg="test.yaml", env=None, stdout=None, chatty=False):
        own = [] if script == "tools.report" else ["--cfg", str(self.folder / cfg), *FAST]
        arguments = (script, [*own, *map(str, arguments)], self.folder, self.folder / "out")
        arguments += (env or {}, stdout, chatty)
        self.process = FORKS.Process(target=_child, args=arguments)
        self.process.start()
        return self.process

    def end(self, seconds=120):
        """Return the exit code, stdout and stderr of what was started."""
        self.process.join(seconds)
        hangs = self.process.exitcode is None
        if hangs:
            os.kill(self.process.pid, signal.SIGKILL)
        assert not hangs, f"hangs: {self.words()}"
        return self.process.exitcode, *self.words()

    def words(self):
        files = (Path(f"{self.folder}/out.{n}") for n in (1, 2))
        return [f.read_text(errors="replace") if f.exists() else "" for f in files]

    def call(self, *arguments, **options):
        self.start(*arguments, **options)
        return self.end()


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A folder with data and one finished run, made once."""
    folder = tmp_path_factory.mktemp("trials") / "case"
    folder.mkdir()
    make_dataset.__wrapped__(folder)
    case = Case.__new__(Case)
    case.folder, case.run = folder, folder / "runs/test"
    for script in ("warmup", "selftrain", "evaluate"):
        code, _, err = case.call(script)
        assert code == 0, err
    code, _, err = case.call("tools.report", case.run)
    assert code == 0, err
    # a checkpoint that was written between two steps
    case.start("warmup", "name=half", "warmup.steps=3")
    half = folder / "runs/half/warmup.unfinished.pth"
    wait_until(case, half.exists)
    os.kill(case.process.pid, signal.SIGKILL)
    case.process.join()
    half.rename(folder / "unfinished.pth")
    shutil.rmtree(folder / "runs/half")
    template = folder.rename(folder.with_name("template"))
    yield template
    print(*(f"{name} {code}: {n}" for (name, code), n in sorted(OUTCOMES.items())), sep="\n")


# ---------------------------------------------------------------- damages


def damage_bytes(path, rng, others=("folder", "pipe")):
    """Cut a file, empty it, change some of its bytes, or put something else in its place."""
    data = bytearray(path.read_bytes())
    kind = rng.choice(["cut", "cut", "empty", "flip", "noise", *others])
    if kind == "flip":
        for _ in range(rng.randint(1, 20)):
            data[rng.randrange(len(data))] ^= rng.randint(1, 255)
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        data = rng.randbytes(200) if kind == "noise" else data
        size = rng.randrange(len(data)) if kind == "cut" else 0 if kind == "empty" else len(data)
        path.write_bytes(data[:size])
    return kind


def damage_checkpoint(path, rng):
    if rng.random() < 0.4:
        return damage_bytes(path, rng)
    saved = state(path)
    keys = [key for key in (*saved, "config", "student", "step", "classes") if key in saved]
    key, value = rng.choice(keys), rng.choice(VALUES)
    tree = saved
    if isinstance(saved[key], dict) and saved[key] and rng.random() < 0.5:
        tree, key = saved[key], rng.choice(list(saved[key]))
    tree[key] = value
    torch.save(rng.choice([saved, saved, saved, [saved], value]), path)
    return key


def trial_configuration(case, rng):
    path = case.folder / "test.yaml"
    tree = yaml.safe_load(path.read_text())
    kind = rng.choice(["bytes", "value", "value", "value", "bomb", "unknown", "merge", "newline"])
    if kind == "bytes":
        damage_bytes(path, rng)
    elif kind in ("bomb", "merge"):
        many = "[" + ", ".join(["*a{0}"] * 9) + "]"
        form = "  k{1}: &a{1} " + ("{{<<: %s}}" if kind == "merge" else "%s") % many
        lines = [form.format(n, n + 1) for n in range(12)]
        first = "  k0: &a0 {x: 1}"
        path.write_text("\n".join([path.read_text(), "bomb:", first, *lines]) + "\n")
    else:
        node, key = tree, rng.choice(list(tree))
        while isinstance(node[key], dict) and rng.random() < 0.8:
            node, key = node[key], rng.choice(list(node[key]))
        value = rng.choice(VALUES[:-1])
        node[key + "x" * (kind == "unknown")] = "a\nb" if kind == "newline" else value
        path.write_text(yaml.safe_dump(tree))
    return case.call("warmup", "--as", "other", "warmup.steps=1")


def trial_checkpoint(case, rng):
    path = case.run / rng.choice(["warmup.pth", "selftrain.pth"])
    damage_checkpoint(path, rng)
    case.damaged.add(path)
    commands = [("evaluate", "--weights", path), ("evaluate",), ("selftrain", "--init", path)]
    return case.call(
        *rng.choice([*commands, ("warmup",), ("warmup", "model.weights=" + str(path))])
    )


def trial_unfinished(case, rng):
    path = case.run / "warmup.unfinished.pth"
    shutil.copy(case.folder / "unfinished.pth", path)
    (case.run / "warmup.pth").rename(case.folder / "expected.pth")
    damage_checkpoint(path, rng)
    return case.call("warmup")


def trial_log(case, rng):
    path = case.run / rng.choice(["log.jsonl", "results.json", "environment.json", "config.yaml"])
    damage_bytes(path, rng)
    if rng.random() < 0.3:
        return case.call("evaluate")
    return case.call("tools.report", case.run)


def trial_image(case, rng):
    folder = case.folder / rng.choice(["game/images", "game/labels", "camera/leftImg8bit"])
    path = rng.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
    if rng.random() < 0.3:
        path.unlink()
    else:
        damage_bytes(path, rng, ["folder"])
    return case.call("warmup", "--force", "warmup.steps=1")


def trial_arguments(case, rng):
    choices = [
        ("evaluate", "--weights", "a\nb.pth"), ("evaluate", "--weights", b"\xff.pth"),
        ("evaluate", "--images", case.folder / "test.yaml"), ("evaluate", "--nonsense"),
        ("warmup", "--as", "a b"), ("warmup", "--as"), ("warmup", "no equals"),
        ("warmup", f"output={case.folder}/test.yaml"), ("warmup", "output=/proc/none"),
        ("warmup", "source.root=~/none"), ("selftrain", "--init", "~/none.pth", "--force"),
        ("selftrain", "--init", case.folder), ("tools.report", case.folder / "none"),
        ("tools.report",), ("evaluate", "--out", case.folder / "test.yaml"),
        ("warmup", "--force", "workers=x"), ("selftrain", "--force", "crop=[8,8]"),
    ]  # fmt: skip
    choice = [os.fsdecode(x) if isinstance(x, bytes) else x for x in rng.choice(choices)]
    return case.call(*choice)


def wait_until(case, condition, seconds=60):
    for _ in range(seconds * 50):
        if condition() or case.process.exitcode is not None:
            return
        time.sleep(0.02)


def trial_surroundings(case, rng):
    """Disturb a forced training; then the same command must end as if undisturbed."""
    kind = rng.choice(["signal", "signal", "repeated", "kill", "worker", "vanish", "disk"])
    steps = 4 if kind in ("vanish", "disk") else 12
    arguments = ("warmup", "--force", f"warmup.steps={steps}", f"workers={int(kind == 'worker')}")
    if kind == "disk":
        mount = ["mount", "-t", "tmpfs", "-o", f"size={rng.randint(1, 90)}m", "tmpfs"]
        if subprocess.run([*mount, case.folder / "runs"], check=False).returncode:
            pytest.skip("tmpfs cannot be mounted here")
    try:
        case.start(*arguments)
        begun = case.run / "tensorboard/warmup"
        before = set(begun.iterdir()) if begun.is_dir() else set()
        if kind not in ("disk", "signal"):
            wait_until(case, lambda: begun.is_dir() and set(begun.iterdir()) != before)
        time.sleep(rng.uniform(0, 1.5) if kind != "vanish" else 0)
        process = psutil.Process(case.process.pid) if case.process.exitcode is None else None
        try:
            if kind == "worker":
                wait_until(case, process.children)
                for child in process.children():
                    child.kill()
            elif kind in ("signal", "repeated", "kill") and process:
                numbers = [signal.SIGINT, signal.SIGTERM]
                number = signal.SIGKILL if kind == "kill" else rng.choice(numbers)
                for _ in range(rng.randint(2, 5) if kind == "repeated" else 1):
                    process.send_signal(number)
                    time.sleep(rng.uniform(0, 0.05))
            elif kind == "vanish":
                shutil.rmtree(case.run, ignore_errors=True)
        except psutil.NoSuchProcess:
            pass
        outcome = case.end()
        if kind in ("vanish", "disk"):
            case.damaged |= {case.run / "warmup.pth", case.run / "selftrain.pth"}
        else:
            case.again = arguments
        return (0, *outcome[1:]) if kind == "kill" and outcome[0] == -9 else outcome
    finally:
        if kind == "disk":
            subprocess.run(["umount", "-l", case.folder / "runs"], check=False)


# a trial and how often it is made
TRIALS = {
    trial_configuration: 14, trial_checkpoint: 14, trial_unfinished: 8, trial_log: 8,
    trial_image: 6, trial_arguments: 8, trial_surroundings: 6,
}  # fmt: skip
OUTCOMES = {}


@pytest.mark.parametrize("seed", range(1100 if LONG else 64))
def test_trial(template, seed):
    rng = random.Random(seed)
    trial = [t for t, count in TRIALS.items() for _ in range(count)][seed % 64]
    case = Case(template, template.with_name("case"))
    case.damaged, case.again = set(), None
    finished = {path: path.read_bytes() for path in case.run.glob("*.pth")}
    code, out, err = trial(case, rng)
    OUTCOMES[trial.__name__, code] = OUTCOMES.get((trial.__name__, code), 0) + 1
    assert code in (0, 2, 130, 143), err
    assert "Traceback" not in out + err, err
    lines = err.splitlines()
    if code == 2:
        assert len(lines) == 1, err
        assert err.count(": ") >= 1, err
    elif code:
        assert len(lines) == 1 and "stopped by" in err, err
    for path in finished.keys() - case.damaged:
        if trial is not trial_unfinished or path.name != "warmup.pth":
            assert path.read_bytes() == finished[path] or state(path)
    if case.again:
        code, _, err = case.call(*case.again)
        assert code == 0, err
        assert not list(case.run.rglob(".*.partial"))
        case.call("warmup", *case.again[2:], "name=whole")
        ours, whole = (state(case.folder / f"runs/{n}/warmup.pth") for n in ("test", "whole"))
        assert same(ours["student"], whole["student"])
        assert same(ours["teacher"], whole["teacher"])


# ---------------------------------------------------------------- one test for each cause


@pytest.fixture
def case(template):
    return Case(template, template.with_name("case"))


def refused(outcome, *parts):
    """Require exit code 2 and one line that has these parts."""
    code, _, err = outcome
    assert (code, len(err.splitlines())) == (2, 1), err
    assert all(str(part) in err for part in parts), err


def test_a_forced_run_replaces_a_result_only_by_a_finished_one(case):
    result, label = case.run / "warmup.pth", case.folder / "game/labels/00003.png"
    old, moved = result.read_bytes(), label.rename(case.folder / "label.png")
    refused(case.call("warmup", "--force"), "00003")
    refused(case.call("selftrain", "--force", "--init", "none.pth"), "none.pth")
    moved.rename(label)
    forced = "warmup", "--force", "warmup.steps=30", "seed=5"
    case.start(*forced)
    wait_until(case, (case.run / "warmup.unfinished.pth").exists)
    os.kill(case.process.pid, signal.SIGTERM)
    assert case.end()[0] == 143
    assert result.read_bytes() == old
    assert case.call("warmup")[0] == 0  # of the finished result, which is that of this command
    step = state(case.run / "warmup.unfinished.pth")["step"]
    log = (case.run / "log.jsonl").read_text()
    assert case.call(*forced)[0] == 0
    added = (case.run / "log.jsonl").read_text().removeprefix(log)
    assert f'"step": {step + 1},' in added
    assert f'"step": {step},' not in added
    assert case.call("warmup", *forced[2:], "name=whole")[0] == 0
    assert same(state(result)["student"], state(case.folder / "runs/whole/warmup.pth")["student"])
    # an unfinished checkpoint of a start without --force is not gone on from
    shutil.copy(case.folder / "unfinished.pth", case.run / "warmup.unfinished.pth")
    log = (case.run / "log.jsonl").read_text()
    assert case.call("warmup", "--force")[0] == 0
    assert '"step": 1,' in (case.run / "log.jsonl").read_text().removeprefix(log)


def test_what_libraries_write_to_stderr_is_not_seen(case):
    refused(case.call("warmup", "--as", "new", chatty=True), "is broken")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_imports(case, number):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, ROOT / "warmup.py", "--cfg", case.folder / "test.yaml"]
    process = subprocess.Popen(command, cwd=case.folder, **pipes)
    maps = Path(f"/proc/{process.pid}/maps")
    while "numpy" not in maps.read_text() and "libtorch" not in maps.read_text():
        time.sleep(0.01)
    process.send_signal(number)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert (len(err.splitlines()), "stopped by" in err) == (1, True), err


def test_a_lost_worker_a_full_disk_a_closed_pipe(case):
    train = "warmup", "warmup.steps=2000", "save_every=1000", "name=new"
    case.start(*train, "workers=1")
    process = psutil.Process(case.process.pid)
    wait_until(case, (case.folder / "runs/new/log.jsonl").exists)
    process.children()[0].kill()
    refused(case.end(), "workers=0", "--shm-size")
    refused(case.call(*train, stdout="/dev/full"), "stdout", "No space left")
    refused(case.call("warmup", f"output={case.folder}/test.yaml"), "test.yaml")
    case.start(*train)
    wait_until(case, lambda: '"step": 3,' in (case.folder / "runs/new/log.jsonl").read_text())
    shutil.rmtree(case.folder / "runs/new")
    refused(case.end(), "runs/new")


def test_files_whose_content_is_not_what_it_should_be(case):
    path, saved = case.run / "warmup.pth", state(case.run / "warmup.pth")
    for key, value in (("config", 3), ("student", [1]), ("step", "x"), ("inputs", None)):
        torch.save(saved | {key: value}, path)
        refused(case.call("evaluate", "--weights", path), path, key)
        refused(case.call("selftrain", "--force"), path, key)
    torch.save(saved | {"config": saved["config"] | {"classes": 7}}, path)
    refused(case.call("evaluate", "--weights", path), path, "classes")
    path.write_bytes(b"")
    refused(case.call("evaluate", "--weights", path), path, "restore")
    log, results = case.run / "log.jsonl", case.run / "results.json"
    whole = log.read_bytes()
    log.write_bytes(whole[:-9])
    assert case.call("tools.report", case.run)[0] == 0
    torch.save(saved, path)
    assert case.call("warmup", "--as", "second", "warmup.steps=1")[0] == 0
    assert log.read_bytes().startswith(whole[: whole[:-9].rfind(b"\n") + 1] + b'{"stage": "second"')
    results.write_bytes(results.read_bytes()[:-9])
    refused(case.call("tools.report", case.run), results, "remove")
    refused(case.call("evaluate"), results, "remove")


def test_paths_as_people_give_them(case, monkeypatch):
    monkeypatch.setenv("HOME", str(case.folder))
    text = (case.folder / "test.yaml").read_text().replace(f"{case.folder}/game", "~/game")
    (case.folder / "straße\n.yaml").write_text(text.replace("car:", "größe:"))
    env = {"HOME": str(case.folder), "PYTHONIOENCODING": "ascii"}
    new = "--as", "new", "warmup.steps=1", "name=new"
    more = {"cfg": "straße\n.yaml", "env": env}
    code, _, err = case.call("warmup", *new, "val.root=~/camera", "output=~/ü", **more)
    assert code == 0, err
    assert (case.folder / "ü/new/new.pth").is_file()
    refused(case.call("evaluate", "--weights", os.fsdecode(b"a\n\xff.pth"), **more), r"a\n\udcff")
    left = case.run / f"samples/.x.png.{platform.node()}.999999999.partial"
    other = case.run / "samples/.x.png.another-machine.999999999.partial"
    other.write_bytes(b"half")  # of a process that may be writing
    left.write_bytes(b"half")
    assert case.call("warmup")[0] == 0
    assert not left.exists()
    left.write_bytes(b"half")
    assert case.call("evaluate")[0] == 0
    assert not left.exists()
    assert other.exists()
    other.unlink()


def test_work_without_bound(case):
    many = ", ".join(["*a"] * 9)
    lines = ["bomb:", "  k0: &a [x, x]", *(f"  k{n}: &a [{many}]" for n in range(1, 30))]
    text = (case.folder / "test.yaml").read_text()
    (case.folder / "bomb.yaml").write_text("\n".join([text, *lines]))
    os.mkfifo(case.folder / "pipe")
    refused(case.call("warmup", cfg="bomb.yaml"), "bomb.yaml", "bomb")
    refused(case.call("warmup", cfg="pipe"), "pipe")
    refused(case.call("evaluate", "--weights", case.folder / "pipe"), "pipe")
    refused(case.call("warmup", f"output={case.folder}/pipe"), "pipe")
