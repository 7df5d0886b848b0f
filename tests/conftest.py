"""Small datasets in the real layouts, a configuration for them, and scripts run in this process.

START=spawn (or forkserver) bash run_tests.sh -m core: with DataLoader workers that start so.
"""

import importlib
import json
import multiprocessing
import os
import runpy
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

from engine.command import command
from settings import load_config

ROOT = Path(__file__).parent.parent
START = os.environ.get("START")
if START:
    multiprocessing.set_start_method(START, force=True)  # a spawned process imports this again
# a process that is forked from one that has imported everything starts at once
FORKS = multiprocessing.get_context("forkserver")
SCRIPTS = ["translate_cyclegan", "warmup", "selftrain", "evaluate"]
OTHERS = ["torch.utils.tensorboard", "tools.own_data", "tools.report", "pytest", "psutil", "yaml"]
FORKS.set_forkserver_preload([*SCRIPTS, *OTHERS])
SIZE = (48, 64)
CLASSES = {"road": [128, 64, 128], "car": [0, 0, 142], "sky": [70, 130, 180]}
IDS = {"road": 7, "car": 26, "sky": 23}
# what makes of the warm-up the two stages that frame a result
PLAIN = ("warmup.distill=0", "warmup.crdomix=false")
SOURCE_ONLY = (*PLAIN, "bn_recalibrate=[source]")
ORACLE = (*PLAIN, "warmup.labels_from=target", "bn_recalibrate=[target]")


def paletted_png(indices, palette, depth=8):
    """Return the bytes of a paletted PNG, which OpenCV cannot write.

    indices: (H, W), below 2 ** depth. palette: (N, 3) RGB.
    """

    def chunk(kind, data):
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    height, width = indices.shape
    bits = np.unpackbits(indices[..., None].astype(np.uint8), axis=2)[..., 8 - depth :]
    packed = np.packbits(bits.reshape(height, -1), axis=1)
    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    header = struct.pack(">IIBBBBB", width, height, depth, 3, 0, 0, 0)
    body = chunk(b"PLTE", palette.astype(np.uint8).tobytes()) + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def picture(seed, size=SIZE):
    """Return an RGB image and its label map in Cityscapes' ids.

    There are a road, a sky, some cars and an unlabelled corner.
    """
    rng = np.random.default_rng(seed)
    label = np.full(size, IDS["sky"], np.uint8)
    label[size[0] // 2 :] = IDS["road"]
    for _ in range(3):
        top, left = rng.integers(10, size[0] - 14), rng.integers(0, size[1] - 16)
        label[top : top + 12, left : left + 16] = IDS["car"]
    label[:4, :4] = 0
    colours = np.zeros((256, 3))
    for name, colour in CLASSES.items():
        colours[IDS[name]] = colour
    image = np.clip(colours[label] + rng.normal(0, 12, (*size, 3)), 0, 255).astype(np.uint8)
    return image, label


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), array[..., ::-1] if array.ndim == 3 else array)


def into_files(out, stdout=None):
    """Be a process whose stdout and stderr are the files out.1 and out.2, of one thread."""
    for stream in (1, 2):
        path = stdout if stdout and stream == 1 else f"{out}.{stream}"
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream)
    encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False, encoding=encoding)  # noqa: SIM115
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
    """`python SCRIPT ARGUMENTS` as a forked process in a session of its own, like a Popen."""

    count = 0

    def __init__(self, script, *arguments, cwd, out):
        Command.count += 1
        self.out = out / f"out.{Command.count}"
        name = script if script.startswith("tools.") else str(ROOT / f"{script}.py")
        given = name, [*map(str, arguments)], cwd, self.out
        self.process = FORKS.Process(target=_interpret, args=given)
        self.process.start()
        self.pid, self.kill = self.process.pid, self.process.kill

    def poll(self):
        return self.process.exitcode

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


def state(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    """Return whether two checkpoints are equal bit for bit, configuration and log included."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def dataset(tmp_path):
    """Two datasets, game and camera, and a configuration for them, test.yaml: return their folder.

    Each has 6 images; the camera has 4 for training and 2 for validation.
    """
    for i in range(6):
        image, label = picture(i)
        save(tmp_path / f"game/images/{i:05d}.png", image)
        save(tmp_path / f"game/labels/{i:05d}.png", label)
        split, name = ("train", f"a/a_{i}") if i < 4 else ("val", f"b/b_{i}")
        image, label = picture(100 + i)
        save(tmp_path / f"camera/leftImg8bit/{split}/{name}_leftImg8bit.png", image // 2 + 20)
        save(tmp_path / f"camera/gtFine/{split}/{name}_gtFine_labelIds.png", label)
    config = {
        "base": str(ROOT / "config.yaml"),
        "name": "test",
        "output": str(tmp_path / "runs"),
        "device": "cpu",
        "precision": "fp32",
        "workers": 1 if START else 0,
        "classes": CLASSES,
        "source": {"root": str(tmp_path / "game"), "sizes": [[40, 56], [48, 64]]},
        "target": {"root": str(tmp_path / "camera"), "sizes": [[40, 56], [48, 64]]},
        "val": {"root": str(tmp_path / "camera"), "size": [48, 64]},
        "crop": [32, 40],
        "model": {"network": "mobilenet_v2", "output_stride": 8, "channels": 32, "weights": None},
        "bn_images": 4,
        "translation": {"steps": 4, "batch": [0, 1], "crop": [32, 32], "filters": 4, "blocks": 1},
        "warmup": {"steps": 6, "batch": [1, 1]},
        "selftrain": {"steps": 4, "batch": [1, 1], "diagnose": True},
        "log_every": 2,
        "save_every": 2,
    }
    path = tmp_path / "test.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return tmp_path


@pytest.fixture
def run(dataset, monkeypatch, capsys):
    """run("warmup", "key=value", ...) runs a script's main() as its command line would.

    A script is named as a module: "warmup", "tools.report". It runs in this process. Returns the
    exit code, stdout and stderr.
    """
    threads = torch.get_num_threads()

    def call(script, *arguments):
        without = script == "tools.report" or (script == "tools.own_data" and "--init" in arguments)
        cfg = [] if without or "--cfg" in arguments else ["--cfg", str(dataset / "test.yaml")]
        name = script.rpartition(".")[2]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *cfg, *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            command(importlib.import_module(script).main)
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    yield call
    torch.set_num_threads(threads)


@pytest.fixture
def config(dataset):
    return lambda *overrides: load_config(dataset / "test.yaml", overrides)
