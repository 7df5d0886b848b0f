"""tools.own_data: a configuration from nothing but folders, which the stages take; its checks."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import CLASSES, IDS, ok, paletted_png, picture, refused, save

from datasets import Crops, Images
from engine.images import read_image, resize
from settings import load_config


@pytest.fixture
def init(run):
    """init(source, target) writes my.yaml in the data's folder; returns what `run` does."""
    options = ("--out", "my.yaml")
    return lambda source, target: run("tools.own_data", "--init", source, target, *options)


def named(path, **classes):
    """Edit my.yaml as a user does: name the classes, and write null for a value without one."""
    text = path.read_text()
    for value in {0, *IDS.values()} - set(classes.values()):
        text = text.replace(f"{value}: class_{value} ", f"{value}: null ")
        text = text.replace(f"  class_{value}: [", "  # [")
    for name, value in classes.items():
        text = text.replace(f"class_{value} ", f"{name} ").replace(f"class_{value}:", f"{name}:")
    path.write_text(text)


def test_folders_of_a_game_and_of_cityscapes(dataset, init, run):
    out = ok(init("game", "camera"))
    for domain, count in (("source", 6), ("target", 4), ("val", 2)):
        assert f"{domain}: {count} images, {count} labels" in out
    cfg = load_config(dataset / "my.yaml")
    assert cfg.source.layout == "gta5"
    assert (cfg.target.layout, cfg.target.split) == ("cityscapes", "train")
    assert cfg.val.split == "val"
    assert cfg.source.ids == {0: "class_0", 7: "class_7", 23: "class_23", 26: "class_26"}
    assert cfg.source.sizes == cfg.target.sizes == [[76, 102], [96, 128]]  # twice
    labels = np.stack([picture(i)[1] for i in (*range(6), 104, 105)])
    for value in (0, 7, 23, 26):
        share = f"{100 * (labels == value).mean():.2f}% of the pixels"
        assert f"{value}: class_{value}     # {share}" in (dataset / "my.yaml").read_text()

    named(dataset / "my.yaml", **IDS)
    cfg = load_config(dataset / "my.yaml")
    order = np.full(256, 255, np.uint8)
    for name, value in IDS.items():
        order[value] = list(cfg.classes).index(name)
    for i in range(6):
        expected = order[picture(i)[1]]
        assert np.array_equal(Images(cfg, "source", True).label(i), expected)

    # and on to a report, with nothing but smaller numbers
    small = ["translation.steps=1", "translation.blocks=1", "translation.filters=4"]
    small += ["model.weights=null", "model.channels=32", "workers=0", "precision=fp32"]
    small += ["bn_images=4", "warmup.steps=2", "selftrain.steps=2"]
    given = ("--cfg", "my.yaml", *small)
    ok(run("tools.own_data", "--check", *given))
    assert (dataset / "runs/my/contact_sheet_source.png").exists()
    ok(run("tools.run_all", *given[1:]))
    assert (dataset / "runs/my/report.html").exists()


def test_a_bare_folder_of_images_and_labels_with_a_palette(dataset, init):
    palette = np.arange(256)[:, None] * [1, 0, 0] + [0, 50, 90]
    for i in range(6):
        label = picture(i)[1]
        data = paletted_png(np.where(label == 0, 255, label), palette)
        (dataset / f"game/labels/{i:05d}.png").write_bytes(data)
    for i in range(3):
        save(dataset / f"photos/trip/{i}.jpg", picture(i, (500, 350 + 10 * i))[0])
    out = ok(init("game", "photos"))
    assert "target: 3 images, 0 labels" in out and "val: nothing with labels" in out
    cfg = load_config(dataset / "my.yaml")
    assert (cfg.target.layout, cfg.target.split, cfg.val.root) == ("flat", None, None)
    # shapes 500:360 and 48:64, of one number of pixels, have 0.73 of them in common: both grow
    assert cfg.target.sizes == [[466, 335], [583, 419]]
    assert cfg.source.sizes == [[342, 457], [685, 914]]
    assert cfg.classes == {f"class_{value}": [value, 50, 90] for value in (7, 23, 26)}
    assert cfg.source.ids[255] is None
    assert len(Images(cfg, "target", False)) == 3


def one_value():
    for path in Path("game/labels").iterdir():
        save(path, np.zeros((48, 64), np.uint8))
    shutil.rmtree("camera/gtFine")


LABEL = Path("game/labels/00000.png")
FAULTS = {
    "my.yaml: exists already": lambda: Path("my.yaml").write_text(""),
    "no labels of those names": lambda: shutil.rmtree("game/labels"),
    "camera: no images there": lambda: [shutil.rmtree(path) for path in Path("camera").iterdir()],
    "hold 1 values": one_value,
    "hold 3072 values": lambda: save(LABEL, np.arange(3072, dtype=np.uint16).reshape(48, 64)),
    "is a colour image": lambda: save(LABEL, picture(0)[0]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_folders_that_cannot_be_used(dataset, init, fault):
    FAULTS[fault]()
    before = sorted(dataset.rglob("*"))
    refused(init("game", "camera"), fault)
    assert sorted(dataset.rglob("*")) == before


def test_the_check_counts_what_is_there(dataset, run):
    out = ok(run("tools.own_data", "--check", "selftrain.diagnose=false"))
    assert [line for line in out.splitlines() if "images in" in line] == [
        "source: 6 images in game/images",
        "target: 4 images in camera/leftImg8bit/train, labels not read",
        "val: 2 images in camera/leftImg8bit/val",
    ]
    assert "sizes: 6 of 64x48" in out
    labels = np.stack([picture(i)[1] for i in range(6)])
    for name, value in (("road", 7), ("car", 26), ("sky", 23), ("ignored", 0)):
        assert f"{name} {100 * (labels == value).mean():.2f}%" in out
    sheet = read_image(dataset / "runs/test/contact_sheet_source.png")
    assert sheet.shape == (2 * 160 + 24, 3 * 2 * 213, 3)
    swatches = sheet[-12, 6 : 4 * 150 : 150].tolist()
    assert swatches == [*CLASSES.values(), [0, 0, 0]]
    difference = sheet[:160, :213].astype(int) - resize(picture(0)[0], (160, 213))
    assert np.abs(difference).max() == 0

    cfg = load_config(dataset / "test.yaml")
    crops, batch = read_image(dataset / "runs/test/crops.png"), cfg.warmup.batch
    count = 2 * sum(batch)
    assert crops.shape == (2 * cfg.crop[0], count * cfg.crop[1], 3)
    for row, domain in zip(np.vsplit(crops, 2), ("source", "target"), strict=True):
        images = Images(cfg, domain, labelled=False)
        last = Crops(cfg, "warmup", domain, images, batch, 2)[count - 1]
        assert np.array_equal(row[:, -cfg.crop[1] :], last["image"])
