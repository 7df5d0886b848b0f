"""Small datasets in the real layouts, their configuration, one finished run; commands to run.

START=spawn (or forkserver) bash run_tests.sh -m core: with DataLoader workers that start so.
LONG=1 bash run_tests.sh: more random trials, and the shapes of every shipped configuration.
"""

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import filelock
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from engine.command import command
from engine.loop import Run
from settings import load_config

ROOT = Path(__file__).parent.parent
SHIPPED = [ROOT / "config.yaml", *sorted((ROOT / "configs").glob("*.yaml"))]
START = os.environ.get("START")
LONG = bool(os.environ.get("LONG"))
if START:
    multiprocessing.set_start_method(START, force=True)  # a spawned process imports this again
# a process that is forked from one that has imported everything starts at once
FORKS = multiprocessing.get_context("forkserver")
SCRIPTS = ["translate_cyclegan", "warmup", "selftrain", "evaluate"]
OTHERS = ["torch.utils.tensorboard", "tools.own_data", "tools.report", "pytest", "yaml"]
FORKS.set_forkserver_preload([*SCRIPTS, *OTHERS])
SIZE = (48, 64)
CLASSES = {"road": [128, 64, 128], "car": [0, 0, 142], "sky": [70, 130, 180]}
IDS = {"road": 7, "car": 26, "sky": 23}
PALETTE = np.zeros((256, 3), np.uint8)  # the colour of each id
PALETTE[list(IDS.values())] = list(CLASSES.values())
# the two stages that frame a result, as commands
SOURCE_ONLY = ("tools.baselines", "--method", "source_only")
ORACLE = ("tools.baselines", "--method", "oracle")


def paletted_png(indices, palette, depth=8):
    """Return the bytes of a paletted PNG, which OpenCV cannot write.

    indices: (H, W), below 2 ** depth. palette: (N, 3) RGB.
    """
    image = Image.frombytes("P", indices.shape[::-1], indices.astype(np.uint8).tobytes())
    image.putpalette(palette.astype(np.uint8).tobytes())
    data = io.BytesIO()
    image.save(data, "PNG", bits=depth)
    return data.getvalue()


def picture(seed, size=SIZE):
    """Return an image and its label: road, sky, some cars and an unlabelled corner."""
    rng = np.random.default_rng(seed)
    label = np.full(size, IDS["sky"], np.uint8)
    label[size[0] // 2 :] = IDS["road"]
    for _ in range(3):
        top, left = rng.integers(10, size[0] - 14), rng.integers(0, size[1] - 16)
        label[top : top + 12, left : left + 16] = IDS["car"]
    label[:4, :4] = 0
    image = np.clip(PALETTE[label] + rng.normal(0, 12, (*size, 3)), 0, 255).astype(np.uint8)
    return image, label


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), array[..., ::-1] if array.ndim == 3 else array)


def into_files(out):
    """Be a process whose stdout and stderr are the files out.1 and out.2, of one thread."""
    for stream in (1, 2):
        os.dup2(os.open(f"{out}.{stream}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", closefd=False)  # noqa: SIM115
    torch.set_num_threads(1)
    # of the loaders, as in a command's own process
    multiprocessing.set_start_method(START or "fork", force=True)


def _interpret(script, arguments, folder, out):
    os.setsid()
    os.chdir(folder)
    into_files(out)
    sys.argv = [script, *arguments]
    if script.endswith(".py"):
        runpy.run_path(script, run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)


class Command:
    """`python SCRIPT --cfg test.yaml ARGUMENTS` in a folder, forked, in a session of its own."""

    count = 0

    def __init__(self, folder, script, *arguments):
        Command.count += 1
        self.out = folder / f"out.{Command.count}"
        name = script if script.startswith("tools.") else str(ROOT / f"{script}.py")
        given = ["--cfg", "test.yaml", *map(str, arguments)]
        self.process = FORKS.Process(target=_interpret, args=(name, given, folder, self.out))
        self.process.start()
        self.pid = self.process.pid
        self.kill = self.process.kill

    def wait_for(self, condition, seconds=120):
        """Wait until a condition holds or the process has ended."""
        for _ in range(seconds * 50):
            if condition() or self.process.exitcode is not None:
                return
            time.sleep(0.02)

    def end(self, seconds=300):
        """Return the exit code, stdout and stderr. Raises TimeoutExpired."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            os.killpg(self.pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(str(self.out), seconds)
        files = (Path(f"{self.out}.{n}") for n in (1, 2))
        words = [file.read_text(errors="replace") if file.exists() else "" for file in files]
        return self.process.exitcode, *words


def ok(outcome):
    """Return the stdout of `run`'s outcome, whose exit code must be 0."""
    code, out, err = outcome
    assert code == 0, err
    return out


def refused(outcome, *parts):
    """Assert exit code 2 and one line on stderr that has these parts."""
    code, _, err = outcome
    assert (code, len(err.strip().splitlines())) == (2, 1), err
    assert "Traceback" not in err
    for part in parts:
        assert str(part) in err


def state(path):
    return torch.load(path, weights_only=True)


def changed(path, change):
    """Let a function change the tree of a file of tensors."""
    tree = state(path)
    change(tree)
    torch.save(tree, path)


def same(a, b):
    """Return whether two checkpoints are equal bit for bit, configuration and log included."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def same_networks(first, second):
    """Return whether the networks in two checkpoints are equal bit for bit."""
    trees = state(first), state(second)
    parts = [part for part in ("student", "teacher", "generator") if part in trees[0]]
    return parts != [] and all(same(trees[0][part], trees[1][part]) for part in parts)


def files(folder):
    """Return the bytes of each file below a folder, by its path."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- data and a finished run


def make_data(folder):
    """Write two datasets, game and camera, and a configuration for them, test.yaml.

    Each has 6 images; the camera has 4 for training and 2 for validation. Paths are relative.
    """
    for i in range(6):
        image, label = picture(i)
        save(folder / f"game/images/{i:05d}.png", image)
        save(folder / f"game/labels/{i:05d}.png", label)
        split, name = ("train", f"a/a_{i}") if i < 4 else ("val", f"b/b_{i}")
        image, label = picture(100 + i)
        save(folder / f"camera/leftImg8bit/{split}/{name}_leftImg8bit.png", image // 2 + 20)
        save(folder / f"camera/gtFine/{split}/{name}_gtFine_labelIds.png", label)
    config = {
        "base": str(ROOT / "config.yaml"),
        "name": "test",
        "output": "runs",
        "device": "cpu",
        "precision": "fp32",
        "workers": 1 if START else 0,
        "classes": CLASSES,
        "source": {"root": "game", "sizes": [[40, 56], [48, 64]]},
        "target": {"root": "camera", "sizes": [[40, 56], [48, 64]]},
        "val": {"root": "camera", "size": [48, 64]},
        "crop": [32, 40],
        "model": {"network": "mobilenet_v2", "output_stride": 8, "channels": 32, "weights": None},
        "bn_images": 4,
        "translation": {"steps": 4, "batch": [0, 1], "crop": [32, 32], "filters": 4, "blocks": 1},
        "warmup": {"steps": 6, "batch": [1, 1]},
        "selftrain": {"steps": 4, "batch": [1, 1], "diagnose": True},
        "log_every": 2,
        "save_every": 2,
    }
    (folder / "test.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def main(script, *arguments):
    """Run a script's main() in this process, as its command line would. Raises SystemExit."""
    without = script == "tools.report" or (script == "tools.own_data" and "--init" in arguments)
    cfg = [] if without or "--cfg" in arguments else ["--cfg", "test.yaml"]
    with pytest.MonkeyPatch.context() as patch:
        name = script.rpartition(".")[2]
        patch.setattr(sys, "argv", [f"{name}.py", *cfg, *map(str, arguments)])
        command(importlib.import_module(script).main)


def outcome(capsys, script, *arguments):
    """Run main(); return the exit code, stdout and stderr."""
    capsys.readouterr()
    code = 0
    try:
        main(script, *arguments)
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


class Killed(BaseException):
    """Ends a run in this process, as SIGKILL ends a process."""


@contextlib.contextmanager
def killed_after(steps):
    """Context manager: the command in it is killed when it fetches a batch after `steps` ones."""
    fetched = 0

    def fetch(self, batch, original=Run.fetch):
        nonlocal fetched
        if isinstance(batch, dict):
            sample = batch if "image" in batch else next(iter(batch.values()))
            fetched += "draws" in sample
            if fetched > steps:
                raise Killed
        return original(self, batch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "fetch", fetch)
        yield


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    """A folder with the data, runs/test of all stages, and warmup.unfinished.pth of 2 steps.

    It is made once for all processes of pytest-xdist. Tests get copies.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / "template"
    folder.mkdir(exist_ok=True)
    with filelock.FileLock(folder / "lock"), pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        if not (folder / "done").exists():
            make_data(folder)
            main("translate_cyclegan")
            main(*SOURCE_ONLY)
            main("warmup", "pictures_every=4")
            main("selftrain")
            main(*ORACLE)
            main("evaluate", "--ids", "evaluation.scales=[1.0, 0.5]")
            main("tools.report", "runs/test")
            with killed_after(3):
                main("warmup", "warmup.crdomix=false", "name=half")
            shutil.move("runs/half/warmup.unfinished.pth", folder)
            shutil.rmtree("runs/half")
            (folder / "done").touch()
    return folder


@pytest.fixture
def dataset(tmp_path, template, monkeypatch):
    """Return a folder with the data of make_data; it is the working directory."""
    for name in ("game", "camera"):
        shutil.copytree(template / name, tmp_path / name)
    shutil.copy(template / "test.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def finished(dataset, template):
    """Return a copy of the finished run's folder, runs/test of `dataset`."""
    return Path(shutil.copytree(template / "runs/test", dataset / "runs/test"))


@pytest.fixture
def run(dataset, capsys):
    """run("warmup", "key=value", ...) runs a script's main() as its command line would.

    A script is named as a module: "warmup", "tools.report". It runs in this process. Returns the
    exit code, stdout and stderr.
    """
    return lambda script, *arguments: outcome(capsys, script, *arguments)


@pytest.fixture
def process(dataset):
    """process("warmup", "key=value", ...) starts a script as a process; returns its Command."""
    return lambda script, *arguments: Command(dataset, script, *arguments)


@pytest.fixture
def config(dataset):
    return lambda *overrides: load_config(dataset / "test.yaml", overrides)
