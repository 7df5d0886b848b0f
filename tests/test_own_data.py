"""datasets.py --init: a configuration from nothing but folders, that the checks and the stages take."""

import shutil
import sys

import numpy as np
import pytest
from conftest import CLASSES, IDS, paletted_png, picture, save
from test_datasets import as_classes
from test_pipeline import ok

from datasets import Images
from settings import load_config
from tools import own_data


@pytest.fixture
def init(dataset, monkeypatch, capsys):
    """init(source, target) runs the command in the data's folder: (exit code, stdout, stderr)."""
    import datasets
    import engine

    monkeypatch.chdir(dataset)

    def call(source, target, out="my.yaml"):
        monkeypatch.setattr(sys, "argv", ["datasets.py", "--init", source, target, "--out", out])
        capsys.readouterr()
        code = 0
        try:
            engine.command(datasets.main)
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


def named(path, **classes):
    """As somebody goes through it: the names of the classes, null for a value without one."""
    text = path.read_text()
    for value in {0, *IDS.values()} - set(classes.values()):
        text = text.replace(f"{value}: class_{value} ", f"{value}: null ").replace(
            f"  class_{value}: [", "  # ["
        )
    for name, value in classes.items():
        text = text.replace(f"class_{value} ", f"{name} ").replace(f"class_{value}:", f"{name}:")
    path.write_text(text)


def test_folders_of_a_game_and_of_cityscapes(dataset, init, run):
    out = ok(init("game", "camera"))
    assert (
        "source: 6 images, 6 labels" in out
        and "target: 4 images, 4 labels" in out
        and "val: 2 images, 2 labels" in out
    )
    cfg = load_config(dataset / "my.yaml")
    assert cfg.source.layout == "folder" and (
        cfg.target.layout,
        cfg.target.split,
        cfg.val.split,
    ) == (
        "cityscapes",
        "train",
        "val",
    )
    assert cfg.source.ids == {0: "class_0", 7: "class_7", 23: "class_23", 26: "class_26"}
    assert cfg.source.sizes == [[38, 51], [48, 64]] and cfg.crop == [16, 32]
    labels = np.stack([picture(i)[1] for i in (*range(6), 104, 105)])
    for value in (0, 7, 23, 26):
        assert (
            f"{value}: class_{value}     # {100 * (labels == value).mean():.2f}% of the pixels"
            in (dataset / "my.yaml").read_text()
        )

    named(dataset / "my.yaml", **IDS)
    cfg = load_config(dataset / "my.yaml")
    order = [list(cfg.classes).index(name) for name in CLASSES] + [255] * 253
    for i in range(6):
        assert np.array_equal(
            Images(cfg, "source", True).label(i),
            np.array(order, np.uint8)[as_classes(picture(i)[1])],
        )

    # and on to a report, with nothing but smaller numbers
    small = [
        "model.weights=null",
        "model.channels=32",
        "workers=0",
        "translation.steps=1",
        "translation.blocks=1",
        "translation.filters=4",
        "translation.crop=[32,32]",
        "bn_images=4",
        "warmup.steps=2",
        "selftrain.steps=2",
        "precision=fp32",
    ]
    given = ("--cfg", "my.yaml", *small)
    ok(run("tools.own_data", "--check", *given))
    assert (dataset / "runs/my/contact_sheet_source.png").exists()
    ok(run("translate_cyclegan", *given))
    ok(run("warmup", *given))
    ok(run("selftrain", *given))
    ok(run("evaluate", *given))
    ok(run("tools.report", "runs/my"))
    assert (dataset / "runs/my/report.html").exists()


def test_colours_that_can_be_told_apart():
    colours = np.array(own_data.distinct_colours(12))
    distance = np.linalg.norm(colours[:, None] - np.vstack([colours, [[0, 0, 0]]])[None], axis=2)
    assert np.sort(distance)[:, 1].min() > 60
    assert len({tuple(colour) for colour in own_data.distinct_colours(255)}) == 255


def test_a_bare_folder_of_images_and_labels_with_a_palette(dataset, init):
    palette = np.arange(256)[:, None] * [1, 0, 0] + [0, 50, 90]
    for i in range(6):
        (dataset / f"game/labels/{i:05d}.png").write_bytes(
            paletted_png(np.where(picture(i)[1] == 0, 255, picture(i)[1]), palette)
        )
    for i in range(3):
        save(dataset / f"photos/trip/{i}.jpg", picture(i, (200, 100 + 10 * i))[0])
    out = ok(init("game", "photos"))
    assert "target: 3 images, 0 labels" in out and "val: nothing with labels" in out
    cfg = load_config(dataset / "my.yaml")
    assert (cfg.target.layout, cfg.target.split, cfg.val.root) == ("flat", None, None)
    assert cfg.target.sizes == [[160, 88], [200, 110]]
    assert (
        cfg.classes == {f"class_{value}": [value, 50, 90] for value in (7, 23, 26)}
        and cfg.source.ids[255] is None
    )
    assert len(Images(cfg, "target", False)) == 3


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda d: (d / "my.yaml").write_text(""), "my.yaml: is there already"),
        (lambda d: shutil.rmtree(d / "game/labels"), "no label has a name like"),
        (lambda d: [shutil.rmtree(d / "camera" / part) for part in ("leftImg8bit", "gtFine")], "camera: no images"),
        (lambda d: [save(p, np.zeros((48, 64), np.uint8)) for p in (d / "game/labels").iterdir()] + [shutil.rmtree(d / "camera/gtFine")], "1 values"),
        (lambda d: save(d / "game/labels/00000.png", np.arange(48 * 64, dtype=np.uint16).reshape(48, 64)), "values"),
        (lambda d: save(d / "game/labels/00000.png", picture(0)[0]), "convert it"),
    ],
)  # fmt: skip
def test_folders_that_do_not_tell(dataset, init, change, part):
    change(dataset)
    before = sorted(dataset.rglob("*"))
    code, _, error = init("game", "camera")
    assert (code, part in error, error.count("\n")) == (2, True, 1), error
    assert sorted(dataset.rglob("*")) == before
