"""Every shipped configuration at its own sizes, on the CPU, as a user runs it: LONG=1 and hours.

The other tests make each configuration small. What goes wrong at real sizes alone (memory, tiles,
files of the real layouts) shows here, on two made-up files of each split and with one step a stage.
A table of seconds and memory follows, a row per command.
"""

import fnmatch
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, paletted_png, save

from engine.images import read_image, read_label
from layouts import CITYSCAPES, classes
from settings import load_config

pytestmark = pytest.mark.skipif(
    not os.environ.get("LONG"), reason="real sizes take hours and 16 GB of memory: set LONG=1"
)

# the demo makes data of its own size, and run_all.sh runs it as it is
CONFIGS = ["config.yaml", *sorted(f"configs/{path.name}" for path in ROOT.glob("configs/*.yaml"))]
CONFIGS.remove("configs/demo.yaml")

# what a user types after `python`, by the name of the stage
COMMANDS = {
    "translate": ["translate_cyclegan.py"],
    "source_only": ["warmup.py", "--as", "source_only", "warmup.distill=0", "warmup.crdomix=false",
                    "bn_recalibrate=[source]"],
    "warmup": ["warmup.py"],
    "selftrain": ["selftrain.py"],
    "evaluate": ["evaluate.py"],
    "pictures": ["evaluate.py"],
    "export": ["evaluate.py"],
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
    """An image and its label map: a patchwork in which every class is, under a void strip."""
    values, void = ids
    rng = np.random.default_rng(seed)
    cells = (
        rng.permutation(np.resize(np.arange(len(values)), 8 * 12)).reshape(8, 12).astype(np.uint8)
    )
    cells = cv2.resize(cells, size[::-1], interpolation=cv2.INTER_NEAREST)
    colours = np.array([row[0] for row in CITYSCAPES.values()], np.uint8)[: len(values)]
    image = colours[cells] // 2 + rng.integers(0, 96, (*size, 3), dtype=np.uint8)
    label = np.array(values, np.uint8)[cells]
    label[: size[0] // 32] = void
    return image, label


def paletted(path, label):
    path.parent.mkdir(parents=True, exist_ok=True)
    palette = np.random.default_rng(0).integers(0, 256, (256, 3))
    path.write_bytes(paletted_png(label, palette))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder to work in, with data/ where configurations look for it, and one large picture."""
    world = tmp_path_factory.mktemp("real_size")
    data = world / "data"
    for i in range(2):
        image, label = scene(i, (1052, 1914), CITYSCAPES_IDS)
        save(data / f"gta5/images/{i + 1:05d}.png", image)
        paletted(data / f"gta5/labels/{i + 1:05d}.png", label)

        image, label = scene(i, (760, 1280), SYNTHIA_IDS)
        coded = np.zeros((*label.shape, 3), np.uint16)  # class, instance, nothing
        coded[..., 0], coded[..., 1] = label, i
        save(data / f"synthia/RGB/{i:07d}.png", image)
        save(data / f"synthia/GT/LABELS/{i:07d}.png", coded)

    for n, name in enumerate(("train/aachen", "train/bochum", "val/lindau", "val/lindau")):
        image, label = scene(10 + n, (1024, 2048), CITYSCAPES_IDS)
        stem = f"{name}/{name.split('/')[1]}_{n:06d}_000019"
        save(data / f"cityscapes/leftImg8bit/{stem}_leftImg8bit.png", image)
        save(data / f"cityscapes/gtFine/{stem}_gtFine_labelIds.png", label)

    for n, condition in enumerate(("fog", "night", "rain", "snow")):
        for split in ("train", "val"):
            image, label = scene(60 + n, (1080, 1920), TRAIN_IDS)
            stem = f"{condition}/{split}/GOPR0001/GOPR0001_frame_{n:06d}"
            save(data / f"acdc/rgb_anon/{stem}_rgb_anon.png", image)
            save(data / f"acdc/gt/{stem}_gt_labelTrainIds.png", label)

    for i, size in enumerate(((1536, 2048), (2448, 3264))):  # Mapillary's differ
        image, label = scene(20 + i, (720, 1280), TRAIN_IDS)
        save(data / f"bdd100k/images/val/{i:08x}-0000.jpg", image)
        save(data / f"bdd100k/labels/val/{i:08x}-0000_train_id.png", label)
        image, label = scene(30 + i, size, MAPILLARY_IDS)
        save(data / f"mapillary/validation/images/{i}.jpg", image)
        paletted(data / f"mapillary/validation/labels/{i}.png", label)

    for n, name in enumerate(("source", "target/train", "target/val") * 2):
        image, label = scene(40 + n, (360, 480), CAMVID_IDS)
        save(data / f"camvid_day2dusk/{name}/images/{n:04d}.png", image)
        save(data / f"camvid_day2dusk/{name}/labels/{n:04d}.png", label)

    names = sorted((data / "cityscapes/leftImg8bit/train").rglob("*.png"))
    for i, name in enumerate(("labeled", "unlabeled")):
        path = data / f"cityscapes/splits/1_16/{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "\n".join(x.relative_to(data / "cityscapes").as_posix() for x in names[i::2])
        )

    save(world / "large/picture.png", scene(50, LARGE, CITYSCAPES_IDS)[0])
    yield world
    shutil.rmtree(world)


# ---------------------------------------------------------------- commands, timed


@pytest.fixture(scope="module")
def table(request):
    """table(*cells) prints a row about a command at once, and all of them at the end."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    rows = []

    def say(*lines):
        with capture.global_and_fixture_disabled():
            print(*lines, sep="\n", flush=True)

    def add(*cells):
        rows.append(f"| {' | '.join(cells)} |")
        say("", rows[-1])

    yield add
    head = "| configuration | command | seconds | of the processors | GiB of the largest process |"
    say("", "", head, "|---|---|---|---|---|", *rows)


class Shipped:
    """A configuration, and its commands as processes in a folder of the test."""

    def __init__(self, path, world, table):
        self.name, self.world, self.table = path.split("/")[-1].removesuffix(".yaml"), world, table
        self.overrides = ["--cfg", str(ROOT / path), *OVERRIDES]
        self.cfg = load_config(ROOT / path, OVERRIDES)
        self.folder = world / self.cfg.output / self.cfg.name
        training = [stage for stage in self.cfg.stages if stage != "translate"]
        rounds = range(1, self.cfg.selftrain.rounds)
        before = [f"selftrain_round{n}" for n in rounds] if "selftrain" in training else []
        self.networks = [*training[:-1], *before, training[-1]]

    def parts(self, stage):
        """The override by which a stage's step fits into memory."""
        section, views = ("selftrain", 3) if stage == "selftrain" else ("warmup", 2)
        images, most = sum(self.cfg[section].batch), VIEWS.get(self.cfg.model.network, 3)
        fits = (n for n in range(1, images) if images % n == 0 and views * images / n <= most)
        return f"accumulate={next(fits, images)}"

    def call(self, stage, *arguments):
        """Exit code, stdout and stderr of a stage's command."""
        script, *given = COMMANDS[stage]
        script = [script] if script == "-m" else [str(ROOT / script)]
        out, err = (self.world / f"{name}.txt" for name in ("stdout", "stderr"))
        began = time.perf_counter()
        with out.open("w") as stdout, err.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, *script, *given, *map(str, arguments)],
                cwd=self.world, stdout=stdout, stderr=stderr, stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            )  # fmt: skip
        try:
            # of this one child, where getrusage keeps the largest of all children so far
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
        figures = (time.perf_counter() - began, usage.ru_utime + usage.ru_stime)
        gib = usage.ru_maxrss / 2**20
        self.table(self.name, stage, *(f"{seconds:.0f}" for seconds in figures), f"{gib:.1f}")
        return process.returncode, out.read_text(), err.read_text()

    def run(self, stage, *arguments):
        """stdout of a command that must do without errors and warnings."""
        code, out, err = self.call(stage, *arguments)
        assert (code, err) == (0, ""), (
            f"{self.name}, {stage}: exit code {code}\n{out[-2000:]}\n{err[-4000:]}"
        )
        return out


@pytest.fixture(scope="module", params=CONFIGS)
def shipped(request, world, table):
    """A configuration that has been through its stages."""
    shipped = Shipped(request.param, world, table)
    for stage in shipped.cfg.stages:
        more = [] if stage == "translate" else [shipped.parts(stage)]
        shipped.run(stage, *shipped.overrides, *more)
    yield shipped
    shutil.rmtree(shipped.folder)  # several GB


# ---------------------------------------------------------------- what must have come of them


def names(folder):
    """The files below a folder without their extensions."""
    return sorted(
        str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*") if p.is_file()
    )


def shape(path):
    return read_image(path).shape[:2]


FOLDERS = {
    "gta5": "images", "synthia": "RGB", "cityscapes": "leftImg8bit/{split}",
    "acdc": "rgb_anon/{split}", "bdd100k": "images/{split}", "folder": "{split}/images",
}  # fmt: skip


def originals(world, spec):
    """A split's folder, up to the first * in it, and its images' names without extensions."""
    folder, star, rest = FOLDERS[spec.layout].format(split=spec.split or ".").partition("*")
    folder = world / spec.root / folder
    return folder, fnmatch.filter(names(folder), f"{star}{rest}/*" if star else "*")


def shape_of(folder, name):
    """The (H, W) of the image with this name and any extension."""
    return shape(next((folder / name).parent.glob(f"{Path(name).name}.*")))


def test_the_stages_of_a_configuration_end_with_networks_and_finite_losses(shipped):
    for stage in shipped.networks:
        saved = torch.load(shipped.folder / f"{stage}.pth", weights_only=True)
        for network in ("student", "teacher"):
            assert all(torch.isfinite(value).all() for value in saved[network].values())
    assert not list(shipped.folder.glob("*.unfinished.pth"))
    lines = map(json.loads, (shipped.folder / "log.jsonl").read_text().splitlines())
    losses = {line["stage"]: line["loss"] for line in lines if "finished" not in line}
    translator = ["translator"] if "translate" in shipped.cfg.stages else []
    assert sorted(losses) == sorted([*translator, *shipped.networks])
    assert all(map(math.isfinite, losses.values()))
    for stage in shipped.networks:
        picture = "mixed_image" if stage.startswith("selftrain") else "source_image"
        assert shape(shipped.folder / f"samples/{stage}/{picture}.png") == tuple(shipped.cfg.crop)


def test_translated_images_have_the_names_and_sizes_of_the_source(shipped):
    if "translate" not in shipped.cfg.stages:
        pytest.skip("this configuration translates nothing")
    translated = shipped.folder / "translated"
    folder, wanted = originals(shipped.world, shipped.cfg.source)
    assert names(translated) == wanted
    for name in wanted:
        assert shape(translated / f"{name}.jpg") == shape_of(folder, name)


def test_pseudo_labels_have_the_names_and_sizes_of_the_target_and_hold_classes(shipped):
    if "selftrain" not in shipped.cfg.stages:
        pytest.skip("this configuration labels nothing")
    target = shipped.cfg.target
    folder, wanted = originals(shipped.world, target)
    if target.list:
        wanted = [name for name in wanted if name in (shipped.world / target.list).read_text()]
        assert len(wanted) == 1
    for n in range(shipped.cfg.selftrain.rounds):
        labels = shipped.folder / f"pseudo_labels/round{n + 1}"
        assert names(labels) == wanted
        for name in wanted:
            label = read_label(labels / f"{name}.png")
            assert (label.shape, label.dtype) == (shape_of(folder, name), np.uint8)
            assert label.max() < len(classes(shipped.cfg))


def test_every_network_is_scored_and_the_report_shows_it(shipped):
    cfg = shipped.cfg
    shipped.run("evaluate", *shipped.overrides)
    results = json.loads((shipped.folder / "results.json").read_text())
    wanted = dict.fromkeys(shipped.networks, cfg.val)
    wanted |= {
        f"{s}_on_{key}": spec for key, spec in cfg.more_val.items() for s in shipped.networks
    }
    assert set(results) == set(wanted)
    for entry in results.values():
        # every class is in the labels, so that each has an IoU
        assert list(entry["iou"]) == list(classes(cfg))
        figures = [entry[key] for key in entry if "miou" in key or key == "pixel_accuracy"]
        assert len(figures) == 3 + len(cfg.evaluation.subsets)
        assert all(math.isfinite(x) and 0 <= x <= 100 for x in [*figures, *entry["iou"].values()])

    for stage, spec in wanted.items():
        folder, images = originals(shipped.world, spec)
        for kind in ("predictions", "overlays"):
            made = shipped.folder / kind / stage
            assert len(names(made)) == min(cfg.evaluation.pictures, len(images))
            for path in made.rglob("*.png"):
                name = path.relative_to(made).with_suffix("")
                assert shape(path) == shape_of(folder, name)
    assert (shipped.folder / "comparison.png").is_file()

    shipped.run("report", shipped.folder)
    page = (shipped.folder / "report.html").read_text(encoding="utf-8")
    assert all(f"{entry['miou']:.1f}" in page for entry in results.values())


def test_a_picture_larger_than_a_tile_is_segmented_at_its_own_size(shipped):
    out = shipped.world / "pictures"
    weights = shipped.folder / f"{shipped.networks[-1]}.pth"
    given = ["--images", shipped.world / "large", "--out", out, "val.size=null"]
    shipped.run("pictures", "--weights", weights, *given)
    for kind in ("predictions", "overlays", "ids"):
        assert shape(out / kind / shipped.networks[-1] / "picture.png") == LARGE
    shutil.rmtree(out)


def test_a_network_is_exported_or_says_in_one_line_that_it_cannot_be(shipped):
    file = shipped.world / "network.onnx"
    weights = shipped.folder / f"{shipped.networks[-1]}.pth"
    code, out, err = shipped.call("export", "--weights", weights, "--export", file)
    reason = next(
        (why for part, why in NOT_EXPORTED.items() if part in shipped.cfg.model.network), None
    )
    if reason is None:
        assert (code, err) == (0, ""), (
            f"{shipped.name}: exit code {code}\n{out[-2000:]}\n{err[-4000:]}"
        )
        assert file.stat().st_size > 1e6
        file.unlink()
    else:
        assert (code, len(err.splitlines())) == (2, 1), f"exit code {code}\n{err[-4000:]}"
        assert reason in err
        assert not file.exists()
