"""Every shipped configuration at its own sizes, on the CPU, as a user runs it: LONG=1 and hours.

The other tests make each configuration small. What goes wrong at real sizes alone (memory, tiles,
files of the real layouts) shows here, on two made-up files of each split and with one step a stage.
"""

import fnmatch
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
from conftest import LONG, ROOT, SHIPPED, log, paletted_png, save, state

from engine.images import read_image, read_label
from settings import CITYSCAPES, classes, load_config

pytestmark = pytest.mark.skipif(
    not LONG, reason="real sizes take hours and 16 GB of memory: set LONG=1"
)
# the demo makes data of its own size, and run_all.sh runs it as it is
CONFIGS = [path for path in SHIPPED if path.name != "demo.yaml"]
# what a user types after `python`, by the name of the stage
COMMANDS = {
    "translate": ["translate_cyclegan.py"],
    "source_only": ["warmup.py", "--as", "source_only", "warmup.distill=0", "warmup.crdomix=false",
                    "bn_recalibrate=[source]"],
    "warmup": ["warmup.py"],
    "selftrain": ["selftrain.py"],
    "evaluate": ["evaluate.py"],
    "report": ["-m", "tools.report"],
}  # fmt: skip
# beside these, everything is as the configuration has it; where the data lies, too
OVERRIDES = [
    "device=cpu", "workers=1", "model.weights=null", "translation.steps=1", "warmup.steps=1",
    "selftrain.steps=1", "bn_images=4", "evaluation.pictures=2",
]  # fmt: skip
# views that a network is trained on at once, for 16 GB of memory; a step's batch is worked through
# in as many equal parts as that takes, which changes no number of the method
VIEWS = {"deeplab_v2_resnet101": 6, "mobilenet_v2": 12}
LARGE = (2160, 3840)  # larger than every configuration's tile
# architectures that cannot be written for images of any size, and what is said of them
NOT_EXPORTED = {"UPerNet": "any size"}

# the label value of a class in each dataset, and one that stands for no class
CITYSCAPES_IDS = [ids[1] for ids in CITYSCAPES.values()], 4
SYNTHIA_IDS = [ids[2] for ids in CITYSCAPES.values()], 0
MAPILLARY_IDS = [ids[3][0] for ids in CITYSCAPES.values()], 65
TRAIN_IDS = list(range(19)), 255
CAMVID_IDS = list(range(11)), 11


# ---------------------------------------------------------------- files in the real layouts


def scene(seed, size, ids):
    """Return an image and its label map: a patchwork of all classes, under an ignored strip."""
    values, void = ids
    cells = np.random.default_rng(seed).permutation(np.resize(np.arange(len(values)), 8 * 12))
    cells = cells.reshape(8, 12).astype(np.uint8)
    cells = cv2.resize(cells, size[::-1], interpolation=cv2.INTER_NEAREST)
    colours = np.array([row[0] for row in CITYSCAPES.values()], np.uint8)[: len(values)]
    noise = np.random.default_rng(seed).integers(0, 96, (*size, 3), dtype=np.uint8)
    label = np.array(values, np.uint8)[cells]
    label[: size[0] // 32] = void
    return colours[cells] // 2 + noise, label


def pair(image_path, label_path, seed, size, ids, palette=False):
    """Write an image and its label map."""
    image, label = scene(seed, size, ids)
    save(image_path, image)
    if palette:
        label_path.parent.mkdir(parents=True, exist_ok=True)
        colours = np.random.default_rng(0).integers(0, 256, (256, 3))
        label_path.write_bytes(paletted_png(label, colours))
    elif ids is SYNTHIA_IDS:
        coded = np.zeros((*size, 3), np.uint16)
        coded[..., 0] = label
        save(label_path, coded)
    else:
        save(label_path, label)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder to work in, with data/ where configurations look for it, and one large picture."""
    world = tmp_path_factory.mktemp("real_size")
    data = world / "data"
    for i in range(2):
        gta5, synthia = data / "gta5", data / "synthia"
        name = f"{i + 1:05d}.png"
        pair(gta5 / "images" / name, gta5 / "labels" / name, i, (1052, 1914), CITYSCAPES_IDS, True)
        name = f"{i:07d}.png"
        pair(synthia / "RGB" / name, synthia / "GT/LABELS" / name, i, (760, 1280), SYNTHIA_IDS)
        bdd, name = data / "bdd100k", f"val/{i:08x}-0000"
        label = bdd / f"labels/{name}_train_id.png"
        pair(bdd / f"images/{name}.jpg", label, 20 + i, (720, 1280), TRAIN_IDS)
        mapillary, size = data / "mapillary/validation", ((1536, 2048), (2448, 3264))[i]
        label = mapillary / f"labels/{i}.png"
        pair(mapillary / f"images/{i}.jpg", label, 30 + i, size, MAPILLARY_IDS, True)

    cityscapes, listed = data / "cityscapes", []
    for n, name in enumerate(("train/aachen", "train/bochum", "val/lindau", "val/lindau")):
        stem = f"{name}/{name.split('/')[1]}_{n:06d}_000019"
        image = cityscapes / f"leftImg8bit/{stem}_leftImg8bit.png"
        label = cityscapes / f"gtFine/{stem}_gtFine_labelIds.png"
        pair(image, label, 10 + n, (1024, 2048), CITYSCAPES_IDS)
        listed.append(image.relative_to(cityscapes).as_posix())
    for i, name in enumerate(("labeled", "unlabeled")):
        path = cityscapes / f"splits/1_16/{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(listed[i])

    for n, condition in enumerate(("fog", "night", "rain", "snow")):
        for split in ("train", "val"):
            stem = f"{condition}/{split}/GOPR0001/GOPR0001_frame_{n:06d}"
            label = data / f"acdc/gt/{stem}_gt_labelTrainIds.png"
            image = data / f"acdc/rgb_anon/{stem}_rgb_anon.png"
            pair(image, label, 60 + n, (1080, 1920), TRAIN_IDS)

    for n, name in enumerate(("source", "target/train", "target/val") * 2):
        folder = data / f"camvid_day2dusk/{name}"
        image, label = folder / f"images/{n:04d}.png", folder / f"labels/{n:04d}.png"
        pair(image, label, 40 + n, (360, 480), CAMVID_IDS)

    save(world / "large/picture.png", scene(50, LARGE, CITYSCAPES_IDS)[0])
    yield world
    shutil.rmtree(world)


FOLDERS = {
    "gta5": "images", "synthia": "RGB", "cityscapes": "leftImg8bit/{split}",
    "acdc": "rgb_anon/{split}", "bdd100k": "images/{split}", "folder": "{split}/images",
}  # fmt: skip


def names(folder):
    """Return the files below a folder without their extensions."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in paths)


def originals(world, spec):
    """Return the (H, W) of a split's images by their names without extensions."""
    folder, star, rest = FOLDERS[spec.layout].format(split=spec.split or ".").partition("*")
    folder = world / spec.root / folder
    wanted = fnmatch.filter(names(folder), f"{star}{rest}/*" if star else "*")
    if spec.list:
        listed = (world / spec.list).read_text()
        wanted = [name for name in wanted if name in listed]
    paths = {name: next(folder.glob(f"{name}.*")) for name in wanted}
    return {name: read_image(path).shape[:2] for name, path in paths.items()}


def shapes(folder, read=read_image):
    return {name: read(next(folder.glob(f"{name}.*"))).shape[:2] for name in names(folder)}


# ---------------------------------------------------------------- commands


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_configuration_at_its_own_sizes(world, path, capsys):
    cfg = load_config(path, OVERRIDES)
    folder = world / cfg.output / cfg.name

    def command(stage, *arguments):
        """Run a stage's command; return its exit code and stderr, and print its time."""
        script, *given = COMMANDS[stage]
        script = [script] if script == "-m" else [str(ROOT / script)]
        line = [sys.executable, *script, *given, *map(str, arguments)]
        began = time.perf_counter()
        options = {"cwd": world, "env": os.environ | {"PYTHONPATH": str(ROOT)}, "text": True}
        done = subprocess.run(line, capture_output=True, check=False, **options)
        with capsys.disabled():
            print(f"\n{path.stem} {stage}: {time.perf_counter() - began:.0f} s")
        return done.returncode, done.stderr

    def parts(stage):
        """Return the override by which a stage's step fits into memory."""
        section, views = ("selftrain", 3) if stage == "selftrain" else ("warmup", 2)
        images, most = sum(cfg[section].batch), VIEWS.get(cfg.model.network, 3)
        fits = (n for n in range(1, images) if images % n == 0 and views * images / n <= most)
        return f"accumulate={next(fits, images)}"

    given = ["--cfg", path, *OVERRIDES]
    for stage in cfg.stages:
        assert command(stage, *given, *([] if stage == "translate" else [parts(stage)])) == (0, "")

    # networks and losses
    networks = [stage for stage in cfg.stages if stage != "translate"]
    if "selftrain" in networks:
        networks[-1:-1] = [f"selftrain_round{n}" for n in range(1, cfg.selftrain.rounds)]
    for stage in networks:
        saved = state(folder / f"{stage}.pth")
        for part in ("student", "teacher"):
            assert all(value.isfinite().all() for value in saved[part].values())
        sample = "mixed_image" if stage.startswith("selftrain") else "source_image"
        assert shapes(folder / f"samples/{stage}")[sample] == tuple(cfg.crop)
    assert not list(folder.glob("*.unfinished.pth"))
    losses = {line["stage"]: line["loss"] for line in log(folder) if "finished" not in line}
    assert {*networks} <= {*losses}
    assert all(map(math.isfinite, losses.values()))

    # translated images and pseudo-labels have the names and sizes of the images
    if "translate" in cfg.stages:
        assert shapes(folder / "translated") == originals(world, cfg.source)
    if "selftrain" in cfg.stages:
        for n in range(cfg.selftrain.rounds):
            labels = folder / f"pseudo_labels/round{n + 1}"
            assert shapes(labels, read_label) == originals(world, cfg.target)
            assert all(read_label(p).max() < len(classes(cfg)) for p in labels.rglob("*.png"))

    # scores, pictures, the report
    assert command("evaluate", *given) == (0, "")
    results = json.loads((folder / "results.json").read_text())
    wanted = dict.fromkeys(networks, cfg.val)
    for key, spec in cfg.more_val.items():
        wanted |= {f"{stage}_on_{key}": spec for stage in networks}
    assert set(results) == set(wanted)
    for stage, entry in results.items():
        # every class is in the labels, so that each has an IoU
        assert list(entry["iou"]) == list(classes(cfg))
        assert all(0 <= x <= 100 for x in [entry["miou"], *entry["iou"].values()])
        made = shapes(folder / "predictions" / stage)
        assert len(made) == min(cfg.evaluation.pictures, len(originals(world, wanted[stage])))
        assert made.items() <= originals(world, wanted[stage]).items()
    assert command("report", folder) == (0, "")
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert all(f"{entry['miou']:.1f}" in page for entry in results.values())

    # a picture larger than a tile; a file for other frameworks
    weights = ("--weights", folder / f"{networks[-1]}.pth")
    large = ("--images", "large", "--out", "pictures", "val.size=null")
    assert command("evaluate", *weights, *large) == (0, "")
    for kind in ("predictions", "overlays", "ids"):
        assert shapes(world / "pictures" / kind / networks[-1]) == {"picture": LARGE}
    file = world / "network.onnx"
    code, err = command("evaluate", *weights, "--export", file)
    fault = [why for part, why in NOT_EXPORTED.items() if part in cfg.model.network]
    if fault:
        assert (code, len(err.splitlines()), fault[0] in err) == (2, 1, True)
    else:
        assert (code, err, file.stat().st_size > 1e6) == (0, "", True)
        file.unlink()
    shutil.rmtree(folder)  # several GB
    shutil.rmtree(world / "pictures")
