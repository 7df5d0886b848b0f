"""tools.own_data --init: folders as people have them, what their labels hold, and the check."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, ok, outcome, refused, save

from datasets import Images
from settings import load_config
from tools import own_data

COLOURS = np.uint8([[70, 130, 180], [128, 64, 128], [0, 0, 142], [0, 0, 0]])
NAMES = ["00007", "a", "b_1", "dog", "e5", "z"]
VALUES = np.uint8([0, 1, 2, 255])


def pictures(seed, size=(48, 64)):
    """Return a photo (H, W, 3) and a label (H, W) of the indices 0 to 3, with few pixels of 3."""
    rng = np.random.default_rng(seed)
    label = np.zeros(size, np.uint8)
    label[size[0] // 2 :] = 1
    label[10:22, 20:36] = 2
    label[:4, :4] = 3
    photo = np.clip(COLOURS[label] + rng.normal(40, 12, (*size, 3)), 0, 255)
    return photo.astype(np.uint8), label


def dataset(root, *patterns, size=(48, 64)):
    """Write 6 files per pattern: kind and path; p: photo, l: values, c: colours, v: overlay."""
    for i, name in enumerate(NAMES):
        photo, label = pictures(i, size)
        painted = COLOURS[label]
        made = {"p": photo, "l": VALUES[label], "c": painted, "v": photo // 2 + painted // 2}
        for kind, pattern in (pattern.split() for pattern in patterns):
            save(root / pattern.replace("#", name), made[kind])


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run("--init", ...) runs main() in tmp_path; returns the exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: outcome(capsys, "tools.own_data", *arguments)


FOLDERS = {  # files -> the patterns of images and labels, or the layout's name; then the split
    "p images/#.jpg, l labels/#.png, v labels/#_viz.png": "gta5",
    "p images/#.jpg, l labels/#_mask.png, v labels/#_viz.png": "images/* labels/*_mask",
    "p rgb/rgb_#.jpg, l gt/classgt_#.png": "rgb/rgb_* gt/classgt_*",
    "p image/image_#.png, c label/segmentation_#.png": "image/image_* label/segmentation_*",
    "p x/cam/rgb/#.png, l x/cam/seg/#.png": "*/rgb/* */seg/*",
    "p s1/rgb/#.jpg, p s2/rgb/#.jpg, l s2/seg/#.png": "*/rgb/* */seg/*",
    "p #.jpg, l #.png": "*.jpg *.png",
    "p #.png, l #_mask.png, v #_overlay.png": "* *_mask",
    "p f/#_rgb.png, c f/#_seg.png, l f/#_ids.png": "*_rgb *_ids",
    "p images/train/#.jpg, l labels/train/#.png, p images/val/#.jpg": (
        "images/{split}/* labels/{split}/*"
    ),
    "p train/rgb/#.jpg, l train/seg/#.png, p val/rgb/#.jpg": "{split}/rgb/* {split}/seg/*",
    "p leftImg8bit/train/a/#_leftImg8bit.png, l gtFine/train/a/#_gtFine_labelIds.png": "cityscapes",
}  # fmt: skip


@pytest.mark.parametrize("files", FOLDERS)
def test_photos_and_their_labels_are_found(tmp_path, run, files):
    dataset(tmp_path / "day", *files.split(", "))
    kind = "l" if ", l " in files else "c"
    dataset(tmp_path / "dusk", "p train/#.jpg", "p val/x/#.jpg", f"{kind} val/y/#.png")
    out = ok(run("--init", "day", "dusk"))
    assert ("day: left out: nothing" in out) == (files.count(",") == 1)
    cfg = load_config("my.yaml")
    layout = cfg.source.layout
    found = layout if isinstance(layout, str) else " ".join(layout.values())
    assert found == FOLDERS[files], out
    assert cfg.source.split == ("train" if "train" in files else None)
    images = Images(cfg, "source", True)  # the core finds the same ones
    for i, name in zip(range(len(images)), NAMES, strict=True):
        assert name in images.names[i] and name in images.label_paths[i].name
        assert images.image(i).std() > 30
    assert len(Images(cfg, "target", False)) == len(Images(cfg, "val", True)) == 6
    assert (cfg.target.split, cfg.val.split) == ("train", "val")


def test_what_cannot_be_used_writes_nothing(tmp_path, run):
    dataset(tmp_path / "good", "p images/#.jpg", "l labels/#.png")
    dataset(tmp_path / "photos", "p rgb/#.jpg")
    save(tmp_path / "photos/seg/frame.png", VALUES[pictures(0)[1]])
    dataset(tmp_path / "masks", "l #.png")
    dataset(tmp_path / "tiny", "p #.png", size=(18, 18))
    for source, target, part in [
        ("photos", "good", "layout: {images:"),
        ("good", "masks", "give the folder of the photos"),
        ("good", "tiny", "20x20 pixels"),
    ]:
        refused(run("--init", source, target), part)
        assert not list(tmp_path.glob("*.*"))


def test_a_simulator_from_another_folder(tmp_path):
    patterns = "p image/image_#.png", "c label/segmentation_#.png"
    dataset(tmp_path / "my sim", *patterns, size=(225, 300))  # over half of the photos' pixels
    for i, size in enumerate([(300, 400), (400, 300), (600, 800), (300, 400)]):
        save(tmp_path / f"photos/{i}.jpg", pictures(i, size)[0])

    def own_data(*arguments):
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        line = [sys.executable, str(ROOT / "tools/own_data.py"), *arguments]
        return subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True)

    done = own_data("--init", "my sim", "photos", "--out", "my robot.yaml")
    assert done.returncode == 0, done.stderr
    assert "name: my_robot" in done.stdout and "--cfg 'my robot.yaml'" in done.stdout
    cfg = load_config(tmp_path / "my robot.yaml")
    assert (cfg.name, cfg.source.ids) == ("my_robot", "colours")
    assert cfg.source.sizes == cfg.target.sizes == [[288, 384], [360, 480]]
    assert sorted(cfg.classes.values()) == sorted(COLOURS.tolist())
    path = tmp_path / "my robot.yaml"
    path.write_text(path.read_text().replace("  class_4: [0, 0, 0]", "  # "))
    done = own_data("--check", "--cfg", "my robot.yaml")
    assert done.returncode == 0, done.stderr
    assert "unknown colour [0, 0, 0]: 0.02% of the pixels, first in " in done.stdout


def test_unknown_values_are_all_named(tmp_path, run):
    dataset(tmp_path / "day", "p images/#.jpg", "l labels/#.png")
    ok(run("--init", "day", "day/images"))
    text = Path("my.yaml").read_text().replace(" 0: class_0", " #").replace(" 255: ", " #")
    Path("my.yaml").write_text(text)
    code, out, error = run("--check", "--cfg", "my.yaml")
    assert code == 2 and "source: 0, source: 255" in error
    assert "unknown value 255: 0.52% of the pixels, first in day/labels/00007.png" in out


@pytest.mark.parametrize(
    ("shares", "is_class"),
    [
        ({0: 0.99, 255: 0.01}, True),
        ({0: 0.5, 1: 0.49, 255: 0.01}, False),
        ({0: 0.5, 128: 0.4, 255: 0.1}, True),
        ({0: 0.5, 1: 0.2, 2: 0.2, 255: 0.1}, False),
    ],
)
def test_255(shares, is_class):
    assert own_data.is_class_255(shares) == is_class
