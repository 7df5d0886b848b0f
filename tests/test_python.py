"""What users do from Python: load and predict, the losses, a network of their own."""

import os
import re
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from conftest import CLASSES, LONG, ROOT, changed, ok, picture, refused, state
from torch import nn

import settings
from engine.config import UserError
from engine.images import paint, read_image
from models import build_segmenter, load, load_segmenter, register

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text("utf-8"), re.S)
PREDICT, LOSSES, NETWORK, SCRIPT = BLOCKS


@pytest.fixture
def own_networks(monkeypatch):
    """The registry; what a test registers is gone after it."""
    monkeypatch.setattr(settings, "OWN_NETWORKS", {})
    monkeypatch.setattr("models.OWN_NETWORKS", settings.OWN_NETWORKS)
    return settings.OWN_NETWORKS


def python(folder, text):
    """Run a script that lies in a folder, from there, in a process of its own."""
    (folder / "script.py").write_text(text, encoding="utf-8")
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "script.py"]
    return subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_a_loaded_network_predicts_what_evaluation_does(dataset, finished, run, config):
    path = finished / "warmup.pth"
    model = load(path)
    assert model.classes == list(CLASSES)
    assert model.colours == {name: tuple(colour) for name, colour in CLASSES.items()}
    assert not model.training
    segmenter = load_segmenter(path, config())[0]
    for size in ((48, 64), (33, 71), (97, 40)):
        images = torch.rand(2, 3, *size)
        logits = model(images)
        assert (logits.shape, logits.dtype) == ((2, 3, *size), torch.float32)
        with torch.no_grad():
            expected = nn.functional.interpolate(
                segmenter.eval()(images)[0], size, mode="bilinear", align_corners=True
            )
        torch.testing.assert_close(logits, expected)
    folder = dataset / "camera/leftImg8bit/val"
    changed(path, lambda saved: saved["config"]["val"].update(size=[24, 40]))
    model = load(path)  # predicts at about this size, whatever that of the image
    out = ("--images", folder, "--out", dataset / "out", "val.size=[24,40]")
    ok(run("evaluate", "--weights", path, *out))
    for name in sorted(folder.rglob("*.png")):
        image = read_image(name)
        labels = model.predict(image)
        assert (labels.shape, labels.dtype) == (image.shape[:2], np.uint8)
        written = dataset / "out/predictions/warmup" / name.relative_to(folder)
        # evaluation computes in channels-last, which rounds otherwise
        same = paint(labels, model.colours) == read_image(written)
        assert same.mean() > 0.999
        assert np.array_equal(model.predict(image[:, ::-1][:, ::-1]), labels)  # a view


def test_the_examples_of_the_documentation_run(dataset, finished):
    """Prediction with the network that self-training left; the losses in a loop."""
    finished.rename(dataset / "runs/demo")
    image, _ = picture(7)
    cv2.imwrite(str(dataset / "street.png"), image[..., ::-1])
    done = python(dataset, f"{PREDICT}\n{LOSSES}")
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in CLASSES)
    assert len(PREDICT.splitlines()) + len(LOSSES.splitlines()) < 40


def test_a_network_of_ones_own_goes_through_all_stages(dataset):
    """By the documentation's three lines; then in another process, with and without its module.

    LONG=1: with spawned workers, each of which imports the script and PyTorch.
    """
    (dataset / "my_network.py").write_text(NETWORK, encoding="utf-8")
    (dataset / "test.yaml").rename(dataset / "my.yaml")
    script = SCRIPT.replace('tiny")', f'tiny", "workers={int(LONG)}")')
    assert len(SCRIPT.split("\n")) == 5  # three lines, and a blank one between
    spawn = "import multiprocessing\nmultiprocessing.set_start_method('spawn', force=True)\n"
    done = python(dataset, spawn * LONG + script)
    assert done.returncode == 0, done.stderr
    folder = dataset / "runs/test"
    assert (folder / "report.html").is_file()
    for name in ("warmup", "selftrain"):
        student = state(folder / f"{name}.pth")["student"]
        assert student["backbone.0.weight"].shape == (32, 3, 3, 3)
        assert student["classifier.weight"].shape == (3, 32, 1, 1)
    use = "from models import load\nprint(load('runs/test/selftrain.pth').classes)"
    assert "road" in python(dataset, f"import my_network\n{use}").stdout
    unknown = "model.network = 'tiny' must be "
    assert unknown in python(dataset, use).stderr


def test_a_name_that_nobody_registered_is_refused_and_nothing_imported(dataset, run, own_networks):
    """Neither a module's name nor a path makes the project import anything."""
    (dataset / "evil.py").write_text("raise SystemExit('imported')", encoding="utf-8")
    for name in ("evil", "evil:tiny", "tiny", str(dataset / "evil.py"), "os.system", "[a]", "{}"):
        outcome = run("warmup", "warmup.crdomix=false", f"model.network={name}")
        refused(outcome, "model.network = ", " must be ")
    with pytest.raises(UserError, match="evil: unknown"):
        build_segmenter("evil", 3)
    for name in ("resnet18", "smp/UPerNet/resnet18"):
        with pytest.raises(UserError, match="in use"):
            register(name)


def test_the_network_of_an_imported_file_and_a_file_that_is_not_there(dataset, run, own_networks):
    (dataset / "my_network.py").write_text(NETWORK, encoding="utf-8")
    given = ("model.network=tiny", "warmup.crdomix=false", "warmup.steps=1")
    ok(run("warmup", "--import", "my_network.py", *given))
    assert "| warmup |" in ok(run("evaluate", "--import", "my_network.py", *given))
    refused(run("warmup", "--import", "none.py", *given), "none.py: No such file")


CELL = """
from tools.run_all import run_all
run_all("test.yaml", "stages=[warmup]", "warmup.steps=2", "warmup.crdomix=false")
"""


def test_run_all_in_the_cell_of_a_notebook(dataset):
    manager = pytest.importorskip("jupyter_client").KernelManager()
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    manager.start_kernel(cwd=str(dataset), env=env)
    client = manager.client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=60)
        told = []
        reply = client.execute_interactive(CELL, timeout=120, output_hook=told.append)["content"]
        assert reply["status"] == "ok", reply
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    text = "".join(message["content"].get("text", "") for message in told)
    assert "warmup: wrote runs/test/warmup.pth" in text
    assert (dataset / "runs/test/report.html").is_file()
