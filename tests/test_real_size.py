"""Every shipped configuration at its own sizes, on the CPU, as a user runs it: LONG=1 and hours.

The other tests make each configuration small. What goes wrong at real sizes alone (memory) shows
here, on two made-up files of each dataset and with one step a stage.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
from conftest import LONG, ROOT, SHIPPED, log, save, state

from engine.images import read_image, read_label
from layouts import classes
from settings import load_config

pytestmark = pytest.mark.skipif(
    not LONG, reason="real sizes take hours and 16 GB of memory: set LONG=1"
)
# the demo makes data of its own size, and run_all.sh runs it as it is
CONFIGS = [path for path in SHIPPED if path.name != "demo.yaml"]
STAGES = {
    "translate": ["translate_cyclegan.py"],
    "source_only": ["tools/baselines.py", "--method", "source_only"],
    "oracle": ["tools/baselines.py", "--method", "oracle"],
    "warmup": ["warmup.py"],
    "selftrain": ["selftrain.py"],
}  # fmt: skip
# views that a network is trained on at once, for 16 GB of memory; a step's batch is worked through
# in as many equal parts as that takes, which changes no number of the method
VIEWS = {"deeplab_v2_resnet101": 6, "mobilenet_v2": 12}
LARGE = (2160, 3840)  # larger than every configuration's images


def scene(seed, size, count):
    """Return an image and its label map: a patchwork of `count` classes, under an ignored strip."""
    rng = np.random.default_rng(seed)
    cells = rng.permutation(np.resize(np.arange(count), 8 * 12)).reshape(8, 12).astype(np.uint8)
    label = cv2.resize(cells, size[::-1], interpolation=cv2.INTER_NEAREST)
    colours = rng.integers(0, 160, (count, 3), dtype=np.uint8)
    image = colours[label] + rng.integers(0, 96, (*size, 3), dtype=np.uint8)
    label[: size[0] // 32] = 255
    return image, label


def shapes(folder, read=read_image):
    """Return the (H, W) of the images in a folder by their names without extensions."""
    return {path.stem: read(path).shape[:2] for path in folder.iterdir()}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_configuration_at_its_own_sizes(tmp_path, path, capsys):
    cfg = load_config(path)
    options = ["device=cpu", "workers=1", "model.weights=null", "bn_images=4"]
    options += [f"{stage}.steps=1" for stage in ("translation", "warmup", "selftrain")]
    for domain in ("source", "target", "val"):
        size = cfg.val.size if domain == "val" else cfg[domain].sizes[-1]
        for i in range(2):
            image, label = scene(i, tuple(size), len(classes(cfg)))
            save(tmp_path / domain / f"images/{i}.png", image)
            save(tmp_path / domain / f"labels/{i}.png", label)
        keys = {"root": domain, "layout": "folder", "split": "null", "ids": "index", "list": "null"}
        options += [f"{domain}.{key}={value}" for key, value in keys.items()]
    for name in cfg.more_val:  # the same images once more
        options += [f"more_val.{name}.{key}={value}" for key, value in keys.items()]
    save(tmp_path / "large/picture.png", scene(2, LARGE, 9)[0])
    given = ["--cfg", str(path), *options]
    cfg = load_config(path, options)
    folder = tmp_path / cfg.output / cfg.name

    def command(script, *arguments):
        """Run a command, which must end with 0 and without a warning; print its time."""
        line = [sys.executable, str(ROOT / script), *map(str, arguments)]
        began = time.perf_counter()
        how = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}, "text": True}
        done = subprocess.run(line, capture_output=True, check=False, **how)
        with capsys.disabled():
            print(f"\n{path.stem} {script}: {time.perf_counter() - began:.0f} s")
        assert (done.returncode, done.stderr) == (0, "")

    def parts(stage):
        """Return the override by which a stage's step fits into memory."""
        section, views = ("selftrain", 3) if stage == "selftrain" else ("warmup", 2)
        images, most = sum(cfg[section].batch), VIEWS.get(cfg.model.network, 3)
        fits = (n for n in range(1, images) if images % n == 0 and views * images / n <= most)
        return f"accumulate={next(fits, images)}"

    for stage in cfg.stages:
        script, *more = STAGES[stage]
        command(script, *given, *more, *([] if stage == "translate" else [parts(stage)]))

    # networks and losses are finite, pictures and pseudo-labels have the images' sizes
    networks = [stage for stage in cfg.stages if stage != "translate"]
    if "selftrain" in networks:
        networks[-1:-1] = [f"selftrain_round{n}" for n in range(1, cfg.selftrain.rounds)]
    for stage in networks:
        saved = state(folder / f"{stage}.pth")
        for part in ("student", "teacher"):
            assert all(value.isfinite().all() for value in saved[part].values())
        sample = {"warmup": "source_image", "source_only": "image", "oracle": "image"}
        assert shapes(folder / f"samples/{stage}")[sample.get(stage, "mixed_image")] == tuple(
            cfg.crop
        )
    losses = {line["stage"]: line["loss"] for line in log(folder) if "finished" not in line}
    assert {*networks} <= {*losses}
    assert all(map(math.isfinite, losses.values()))
    if "translate" in cfg.stages:
        assert shapes(folder / "translated") == shapes(tmp_path / "source/images")
    if "selftrain" in cfg.stages and cfg.selftrain.labels != "online":
        for n in range(cfg.selftrain.rounds):
            labels = folder / f"pseudo_labels/round{n + 1}"
            assert shapes(labels, read_label) == shapes(tmp_path / "target/images")

    # scores, the report, a larger picture
    command("evaluate.py", *given)
    results = json.loads((folder / "results.json").read_text())
    assert {stage for stage in results if "_on_" not in stage} == set(networks)
    for stage, entry in results.items():
        # every class is in the labels, so that each has an IoU
        assert all(0 <= x <= 100 for x in [entry["miou"], *entry["iou"].values()])
        assert shapes(folder / "predictions" / stage) == shapes(tmp_path / "val/images")
    command("tools/report.py", folder)
    large = ("--images", "large", "--out", "pictures", "val.size=null")
    command("evaluate.py", "--weights", folder / f"{networks[-1]}.pth", *large)
    for kind in ("predictions", "overlays", "ids"):
        assert shapes(tmp_path / "pictures" / kind / networks[-1]) == {"picture": LARGE}
    shutil.rmtree(tmp_path)  # several GB
