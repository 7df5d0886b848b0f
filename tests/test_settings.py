"""The settings that the authors published, more datasets, other networks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import IDS, ROOT, SIZE, ok, paletted_png, picture, refused, save, state

import layouts
import models
from datasets import Images
from engine import images
from engine.config import UserError
from layouts import classes
from settings import load_config

CONFIGS = ROOT / "configs"
TRAIN_IDS = {"road": 0, "car": 13, "sky": 10}
MAPILLARY = {"road": 13, "car": 55, "sky": 27}


def lookup(ids, ignored):
    """Return the table from Cityscapes' label values to another dataset's."""
    table = np.full(256, ignored, np.uint8)
    for name, value in IDS.items():
        table[value] = ids[name]
    return table


@pytest.fixture
def world(dataset):
    """The small datasets once more, in every layout that a setting reads."""
    for i in range(2):
        image, label = picture(50 + i)
        save(dataset / f"bdd/images/val/{i}.jpg", image)
        save(dataset / f"bdd/labels/val/{i}_train_id.png", lookup(TRAIN_IDS, 255)[label])
        save(dataset / f"mapillary/validation/images/{i}.jpg", image)
        file = dataset / f"mapillary/validation/labels/{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        palette = np.arange(66 * 3).reshape(66, 3)
        file.write_bytes(paletted_png(lookup(MAPILLARY, 65)[label], palette))
    return dataset


def small(world, *more, network="mobilenet_v2"):
    """Return overrides with which any shipped configuration runs in seconds on `world`."""
    return [
        "device=cpu", "precision=fp32", "workers=0", f"output={world}/runs", "name=small",
        "crop=[32,48]", "source.sizes=[[40,56],[48,64]]", "target.sizes=[[40,56],[48,64]]",
        "val.size=[48,64]", f"target.root={world}/camera", f"val.root={world}/camera",
        f"model.network={network}", "model.weights=null", "model.channels=32", "bn_images=4",
        "translation.steps=2", "translation.crop=[32,32]", "translation.filters=4",
        "translation.blocks=1", "warmup.steps=2", "selftrain.steps=2", "log_every=1",
        "optimizer.warmup=1", *more,
    ]  # fmt: skip


def results(world):
    return json.loads((world / "runs/small/results.json").read_text())


# ---------------------------------------------------------------- the authors' settings


# configuration: steps, batch, distill, strong and strong_to_weak of each stage; other keys
SETTINGS = {
    "config.yaml": (
        (80000, [1, 2], 0.5, 0.4, 0.5), (80000, [2, 1], 0.25, 0.3, 0.5),
        {"crop": [512, 896], "supervised": "ce", "source.sizes": [[720, 1280], [1052, 1914]],
         "classes": 19},
    ),
    "configs/synthia_to_cityscapes.yaml": (
        (60000, [1, 3], 0.25, 0.4, 0.25), (80000, [1, 2], 0.25, 0.3, 0.25),
        {"crop": [512, 896], "supervised": "ohem", "source.sizes": [[760, 1280], [1140, 1920]],
         "classes": 16},
    ),
    "configs/generalization.yaml": (
        (80000, [2, 2], 0.5, 0.4, 0.5), None,
        {"crop": [512, 896], "supervised": "ce", "bn_recalibrate": ["source"],
         "stages": ["warmup"]},
    ),
    "configs/semi_supervised.yaml": (
        (80000, [1, 2], 0.5, 0.4, 0.5), (80000, [1, 2], 0.5, 0.4, 0.5),
        {"crop": [512, 1024], "supervised": "ce", "model.auxiliary": 0.1,
         "optimizer.lr_backbone": 1e-3, "optimizer.power": 1.0, "warmup.crdomix": False,
         "selftrain.crdomix": False},
    ),
}  # fmt: skip


@pytest.mark.parametrize("config", SETTINGS)
def test_the_numbers_of_the_settings(config):
    cfg = load_config(ROOT / config)
    warmup, selftrain, more = SETTINGS[config]
    for section, numbers in ((cfg.warmup, warmup), (cfg.selftrain, selftrain)):
        keys = ("steps", "batch", "distill", "strong", "strong_to_weak")
        assert numbers is None or tuple(section[key] for key in keys) == numbers
    for key, value in more.items():
        found = cfg
        for part in key.split("."):
            found = found[part]
        assert (len(classes(cfg)) if key == "classes" else found) == value
    assert cfg.target.sizes == [[512, 1024], [1024, 2048]]
    assert (cfg.min_scale, cfg.optimizer.momentum, cfg.optimizer.weight_decay) == (0.7, 0.9, 5e-4)
    if config in ("config.yaml", "configs/synthia_to_cityscapes.yaml"):
        rates = (cfg.optimizer.lr_backbone, cfg.optimizer.lr_head, cfg.optimizer.power)
        assert rates == (7.5e-4, 2.5e-3, 0.9)


def test_generalization_reads_nothing_of_a_target_and_is_scored_on_three_datasets(
    world, run, monkeypatch
):
    more = [f"more_val.bdd100k.root={world}/bdd", f"more_val.mapillary.root={world}/mapillary"]
    more += [f"more_val.{name}.size=[48,64]" for name in ("bdd100k", "mapillary")]
    more.append(f"source.root={world}/game")
    cfg = ("--cfg", CONFIGS / "generalization.yaml", *small(world, *more))
    opened, read, iterate = [], images._read, layouts.list_images
    monkeypatch.setattr(images, "_read", lambda path: opened.append(path) or read(path))
    noted = lambda folder, **more: opened.append(folder) or iterate(folder, **more)  # noqa: E731
    monkeypatch.setattr(layouts, "list_images", noted)
    ok(run("warmup", *cfg))
    assert opened
    assert all(Path(path).is_relative_to(world / "game") for path in opened)

    ok(run("evaluate", *cfg))
    ok(run("tools.report", world / "runs/small"))
    assert {name: entry["dataset"] for name, entry in results(world).items()} == {
        "warmup": "val",
        "warmup_on_bdd100k": "bdd100k",
        "warmup_on_mapillary": "mapillary",
    }
    # both hold the same pictures: the same classes must come from their own layouts and values
    bdd, mapillary = results(world)["warmup_on_bdd100k"], results(world)["warmup_on_mapillary"]
    assert sum(iou is not None for iou in bdd["iou"].values()) >= 3
    cfg = load_config(CONFIGS / "generalization.yaml", cfg[2:])
    for i in range(2):
        labelled = (Images(cfg, f"more_val.{name}", True) for name in ("bdd100k", "mapillary"))
        labels = [dataset.label(i) for dataset in labelled]
        assert np.array_equal(*labels)
        assert np.array_equal(np.unique(labels[0]), [0, 10, 13, 255])
    assert (bdd["split"], mapillary["split"]) == ("val", "validation")


def test_semi_supervised_lists_part_labelled_and_unlabelled_images(world, run, monkeypatch):
    names = [f"a/a_{i}_leftImg8bit.png" for i in range(4)]
    # as they are published: from the dataset's root, followed by the label's path
    (world / "labelled.txt").write_text(f"leftImg8bit/train/{names[0]} gtFine/train/{names[0]}\n")
    (world / "unlabelled.txt").write_text("\n".join(names[1:]))
    for i in range(1, 4):
        (world / f"camera/gtFine/train/a/a_{i}_gtFine_labelIds.png").unlink()
    more = [f"source.list={world}/labelled.txt", f"target.list={world}/unlabelled.txt"]
    more.append(f"source.root={world}/camera")
    cfg = ("--cfg", CONFIGS / "semi_supervised.yaml", *small(world, *more))
    for script in ("warmup", "selftrain", "evaluate"):
        ok(run(script, *cfg))
    assert list(results(world)) == ["warmup", "selftrain_round1", "selftrain"]
    written = sorted(path.name for path in (world / "runs/small/pseudo_labels/round1/a").iterdir())
    assert written == [f"a_{i}_leftImg8bit.png" for i in range(1, 4)]
    (world / "labelled.txt").write_text("a/none.png")
    refused(run("warmup", *cfg, "--force"), "names a/none.png")


def test_the_auxiliary_loss_trains_the_auxiliary_classifier_alone_and_the_backbone(world, run):
    for weight in (0.1, 0.4):
        overrides = small(world, f"source.root={world}/game", "warmup.crdomix=false")
        overrides += [f"model.auxiliary={weight}", f"name=a{weight}"]
        ok(run("warmup", *overrides, "optimizer.lr_backbone=0.1"))
    a, b = (state(world / f"runs/a{w}/warmup.pth")["student"] for w in (0.1, 0.4))
    assert not torch.equal(a["auxiliary.2.weight"], b["auxiliary.2.weight"])
    assert not torch.equal(a["backbone.features.0.0.weight"], b["backbone.features.0.0.weight"])


# ---------------------------------------------------------------- more datasets


def adverse(folder, place, number, kind="TrainIds"):
    """Write an image and its label in the layout of ACDC and Dark Zurich, both below `place`."""
    image, label = picture(number)
    values = lookup(TRAIN_IDS, 255)[label] if kind == "TrainIds" else label
    name = f"{place}/GOPR{number:04d}/GOPR{number:04d}_frame_000001"
    save(folder / f"rgb_anon/{name}_rgb_anon.png", image // 3)
    save(folder / f"gt/{name}_gt_label{kind}.png", values)
    other = np.zeros(SIZE, np.uint8)  # the downloads hold more pictures of labels
    save(folder / f"gt/{name}_gt_labelColor.png", np.stack([other] * 3, 2))


def test_acdc_and_dark_zurich(world):
    """A * in a split stands for the conditions; Dark Zurich has its night images alone."""
    conditions = ("fog", "night", "rain", "snow")
    for n, condition in enumerate(conditions):
        for split in ("train", "val", "train_ref"):
            adverse(world / "acdc", f"{condition}/{split}", 60 + n)
    more = [f"{domain}.root={world}/acdc" for domain in ("target", "val")]
    more += [f"more_val.{condition}.root={world}/acdc" for condition in conditions]
    cfg = load_config(CONFIGS / "cityscapes_to_acdc.yaml", small(world, *more))
    target = Images(cfg, "target", True)
    assert [name.partition("/")[0] for name in target.names] == [*conditions]
    assert all("/train/" in name for name in target.names)
    for n, condition in enumerate(conditions):
        images = Images(cfg, f"more_val.{condition}", True)
        assert len(images) == 1
        expected = lookup(TRAIN_IDS, 255)[picture(60 + n)[1]]
        assert np.array_equal(images.label(0), expected)
        assert np.array_equal(target.label(n), expected)

    adverse(world / "zurich", "val/night", 80)
    adverse(world / "zurich", "val/day", 70)
    adverse(world / "ids", "val/night", 80, "Ids")
    layout = "{layout: dark_zurich, ids: %s, split: val, list: null, root: %s, size: [48,64]}"
    sets = {"a": ("train_ids", world / "zurich"), "b": ("cityscapes", world / "ids")}
    more = [f"more_val.{key}=" + layout % values for key, values in sets.items()]
    cfg = load_config(ROOT / "config.yaml", small(world, *more))
    first, second = (Images(cfg, f"more_val.{key}", True) for key in sets)
    assert len(first) == 1
    assert np.array_equal(first.label(0), second.label(0))


# ---------------------------------------------------------------- other networks


def test_a_transformer_trains_and_trains_itself(world, run):
    """At a small size: the smallest network of the family that the configuration names."""
    pytest.importorskip("segmentation_models_pytorch")
    more = [f"source.root={world}/game", "warmup.crdomix=false", "selftrain.crdomix=false"]
    more = small(world, *more, "selftrain.rounds=1", network="smp/Segformer/mit_b0")
    for script in ("warmup", "selftrain", "evaluate"):
        ok(run(script, "--cfg", CONFIGS / "segformer.yaml", *more))
    stages = ("warmup", "selftrain")
    warmup, selftrain = (state(world / f"runs/small/{s}.pth")["student"] for s in stages)
    weights = (key for key in warmup if key.startswith("backbone.") and key.endswith("weight"))
    part = next(weights)
    assert not torch.equal(warmup[part], selftrain[part])
    assert set(results(world)) == {"warmup", "selftrain"}


def test_the_teacher_of_a_transformer_is_not_random():
    pytest.importorskip("segmentation_models_pytorch")
    model = models.build_segmenter("smp/Segformer/mit_b0", 3).train()
    images = torch.rand(2, 3, 64, 64)
    teacher = models.make_teacher(model)
    assert torch.equal(teacher(images)[0], teacher(images)[0])
    assert not torch.equal(model(images)[0], model(images)[0])  # dropout and stochastic depth


@pytest.mark.parametrize("network", ["smp/Unetto/resnet18", "smp/FPN/resnet19"])
def test_a_network_that_does_not_exist(network):
    pytest.importorskip("segmentation_models_pytorch")
    with pytest.raises(UserError, match=r"Unetto|resnet19"):
        models.build_segmenter(network, 3)
