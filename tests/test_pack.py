"""tools.pack: the packed files give the samples of the files as downloaded."""

import numpy as np
import pytest
import yaml
from conftest import Killed, files, ok, paletted_png, picture, refused
from test_datasets import crops, equal_samples

from datasets import Crops, Images
from engine.images import read_image, read_label, resize
from settings import load_config
from tools import pack

LARGER = ("source.sizes=[[32, 44], [36, 48]]", "crop=[24, 32]")


@pytest.fixture
def packed(dataset, run):
    """packed("key=value", ...) packs the dataset into its folder `packed`; returns the stdout."""
    return lambda *options: ok(run("tools.pack", "--out", dataset / "packed", *options))


def configured(dataset, out, *overrides):
    """Write the lines that pack printed into a configuration, and return it."""
    tree = yaml.safe_load((dataset / "test.yaml").read_text())
    for domain, keys in yaml.safe_load(out[out.index("source: ") :]).items():
        tree[domain] |= keys
    (dataset / "packed.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return load_config(dataset / "packed.yaml", overrides)


def test_files_of_the_training_size_give_the_same_samples(dataset, packed, config):
    for i in range(6):  # paletted labels, as GTA5's
        palette = np.zeros((35, 3))
        (dataset / f"game/labels/{i:05d}.png").write_bytes(paletted_png(picture(i)[1], palette))
    (dataset / "list.txt").write_text("00004.png\n00001.png\n00002.png\n")
    narrowed = f"source.list={dataset}/list.txt"
    cfg = configured(dataset, packed(narrowed))
    ours, originals = crops(cfg), crops(config(narrowed))
    assert all(equal_samples(ours[n], originals[n]) for n in range(16))
    assert not list((dataset / "packed").rglob("*.partial"))
    target, original = (
        Crops(c, "test", "target", Images(c, "target", True), [1, 1], 8) for c in (cfg, config())
    )
    assert all(equal_samples(target[n], original[n]) for n in range(16))


def test_larger_files_are_scaled_as_training_scales_them(dataset, packed, config):
    cfg = configured(dataset, packed(*LARGER), *LARGER)
    image, label = picture(3)
    root = dataset / "packed/source/game"
    assert np.array_equal(read_image(root / "images/00003.ppm"), resize(image, (36, 48)))
    expected = resize(label, (36, 48), labels=True)
    assert np.array_equal(read_label(root / "labels/00003.png"), expected)
    ours, originals = crops(cfg), crops(config(*LARGER))
    shapes = [[{k: v.shape for k, v in c[n].items()} for n in range(16)] for c in (ours, originals)]
    assert shapes[0] == shapes[1]
    # where the crop is the whole image, its place is no question of pixels: all is equal
    whole = ("source.sizes=[[36, 48], [36, 48]]", "crop=[36, 48]")
    ours, originals = crops(configured(dataset, packed(*whole), *whole)), crops(config(*whole))
    assert all(equal_samples(ours[n], originals[n]) for n in range(16))


def test_an_interrupted_copy_goes_on_and_ends_as_an_uninterrupted_one(
    dataset, run, packed, monkeypatch
):
    ok(run("tools.pack", "--out", dataset / "at_once"))
    written = []

    def interrupted(path, array, write=pack.write_image):
        if len(written) == 7:
            raise Killed
        written.append(path)
        write(path, array)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(pack, "write_image", interrupted)
        run("tools.pack", "--out", dataset / "packed")
    assert "6 images, 6 of them written now" not in packed().splitlines()[0]
    assert files(dataset / "packed") == files(dataset / "at_once")
    assert packed().count(" 0 of them written now") == 2
    (dataset / "packed/source/game/labels/00002.png").unlink()
    assert "6 images, 1 of them written now" in packed()
    assert packed(*LARGER).count("6 images, 6 of them written now") == 1


def test_faults_end_with_one_line(dataset, run, monkeypatch):
    out = ("--out", dataset / "packed")
    with monkeypatch.context() as patch:
        patch.setattr(pack, "read_image", lambda path: np.zeros((48, 64, 3), np.uint8))
        refused(run("tools.pack", *out), "read back with other values")
    with monkeypatch.context() as patch:
        patch.setattr(pack.shutil, "disk_usage", lambda _: type("", (), {"free": 1000}))
        refused(run("tools.pack", *out), "are free; set --out")
    (dataset / "packed").rename(dataset / "other")
    (dataset / "packed").write_text("in the way")
    refused(run("tools.pack", *out))
    (dataset / "game/images/00003.png").write_bytes(b"no image")
    refused(run("tools.pack", "--out", dataset / "other"), "00003.png: is broken")
