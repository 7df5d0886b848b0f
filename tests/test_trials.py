"""Trials: damaged configurations, checkpoints, logs, images and surroundings, by a seeded generator.

Each is a command in a process of its own, forked from one that has imported everything, with its
stderr in a file. It ends with exit code 0, 2, 130 or 143, with one line where it fails, and nothing
finished is lost. LONG=1 runs 1,000 and more of them.
"""

import importlib
import json
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
from conftest import ROOT, state

from engine.command import command

LONG = bool(os.environ.get("LONG"))
FORKS = multiprocessing.get_context("forkserver")
SCRIPTS = ["translate_cyclegan", "warmup", "selftrain", "evaluate"]
FORKS.set_forkserver_preload([*SCRIPTS, "torch.utils.tensorboard", "tools.report"])
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
    import conftest

    folder = tmp_path_factory.mktemp("trials") / "template"
    folder.mkdir()
    conftest.dataset.__wrapped__(folder) if hasattr(conftest.dataset, "__wrapped__") else None
    case = Case.__new__(Case)
    case.folder, case.run = folder, folder / "runs/test"
    for script in ("warmup", "selftrain", "evaluate"):
        code, _, err = case.call(script)
        assert code == 0, err
    code, _, err = case.call("tools.report", case.run)
    assert code == 0, err
    return folder
