"""Trials: damaged configurations, checkpoints, logs, images, surroundings; a seeded generator.

Each is a command in a process of its own, forked from one that has imported everything, with its
stderr in a file. It ends with exit code 0, 2, 130 or 143, with one line where it fails, and nothing
finished is lost. LONG=1 runs 1,000 and more of them.
"""

import importlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from conftest import dataset as make_dataset
from conftest import same, state

from engine.command import command

LONG = bool(os.environ.get("LONG"))
FORKS = multiprocessing.get_context("forkserver")
SCRIPTS = ["translate_cyclegan", "warmup", "selftrain", "evaluate"]
OTHERS = ["torch.utils.tensorboard", "tools.report", "pytest", "psutil", "yaml"]
FORKS.set_forkserver_preload([*SCRIPTS, *OTHERS])
FAST = ("selftrain.crdomix=false", "warmup.crdomix=false", "selftrain.rounds=1", "log_every=1")
FAST += ("save_every=1", "warmup.steps=3", "selftrain.steps=2", "bn_images=2")
VALUES = [None, 3, -1, "x", "", [], {}, [1, [2]], {"a": {}}, 1e300, True, "\n", torch.zeros(2)]


def _child(script, arguments, folder, out):
    os.setsid()
    for stream in (1, 2):
        os.dup2(os.open(f"{out}.{stream}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", closefd=False)  # noqa: SIM115
    os.chdir(folder)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)
    sys.argv = [f"{script}.py", *arguments]
    command(importlib.import_module(script).main)


class Case:
    """One trial: a copy of the finished run, and commands in it."""

    def __init__(self, template, folder):
        self.folder, self.run = folder, folder / "runs/test"
        shutil.copytree(template, folder, symlinks=True)
        text = (folder / "test.yaml").read_text().replace(str(template), str(folder))
        (folder / "test.yaml").write_text(text)

    def start(self, script, *arguments, cfg="test.yaml"):
        own = [] if script == "tools.report" else ["--cfg", str(self.folder / cfg), *FAST]
        arguments = (script, [*own, *map(str, arguments)], self.folder, self.folder / "out")
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
    folder = tmp_path_factory.mktemp("trials") / "template"
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
    yield folder
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
def test_trial(template, tmp_path, seed):
    rng = random.Random(seed)
    trial = [t for t, count in TRIALS.items() for _ in range(count)][seed % 64]
    case = Case(template, tmp_path / "case")
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
    shutil.rmtree(tmp_path / "case")
