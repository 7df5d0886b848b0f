"""The methods that DiGA is compared with: parts against plain versions, whole runs; a floor."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT, SOURCE_ONLY, log, main, ok, save

from datasets import Crops, Images, RareClasses
from settings import load_config
from tools import baselines
from tools import make_demo_data as demo


def test_rare_class_sampling_draws_classes_by_the_published_formula(dataset, config):
    label = np.full((48, 64), 7, np.uint8)  # road alone: this image is drawn for road only
    save(dataset / "game/labels/00000.png", label)
    images, temperature = Images(config(), "source", labelled=True), 0.3
    labels = np.stack([images.label(i) for i in range(len(images))])
    frequency = np.array([(labels == k).mean((1, 2)).sum() for k in range(3)])
    frequency /= frequency.sum()
    expected = np.exp((1 - frequency) / temperature)
    expected /= expected.sum()

    rare, rng = RareClasses(images, 3, temperature), np.random.default_rng(0)
    drawn = [rare.draw(rng) for _ in range(4000)]
    counts = np.bincount([k for _, k in drawn], minlength=3) / len(drawn)
    np.testing.assert_allclose(counts, expected, atol=0.03)
    assert {i for i, k in drawn if k == 0} == set(range(6))
    assert {i for i, k in drawn if k == 1} == set(range(1, 6))
    for i, k in drawn[:50]:
        assert (labels[i] == k).mean() >= RareClasses.LEAST
    rarest = RareClasses(images, 3, 0.001)  # exp(1000) is no number
    np.testing.assert_allclose(rarest.chance, np.eye(3)[frequency.argmin()], atol=1e-50)


def test_crops_of_rare_classes_hold_the_class_and_depend_on_their_number_alone(dataset, config):
    label = np.full((48, 64), 7, np.uint8)
    label[:2, 5:8] = 23  # seldom in a random crop
    for i in range(4):
        save(dataset / f"game/labels/{i:05d}.png", label)
    images = Images(config("crop=[16,16]"), "source", labelled=True)
    arguments = config("crop=[16,16]"), "warmup", "source", images, [1, 1], 100
    rare = Crops(*arguments, rare=0.05)
    for n in range(100):
        _, k = rare.rare.draw(np.random.default_rng([*rare.seed, 1, n]))
        assert (rare[n]["label"] == k).any()
    for n in (7, 3, 7):
        again = Crops(*arguments, rare=0.05)[n]
        assert all(np.array_equal(rare[n][key], again[key]) for key in again)


def test_a_masked_view_hides_square_blocks():
    torch.manual_seed(0)
    images, colour = torch.rand(8, 3, 49, 70), torch.full((3, 1, 1), 2.0)
    view = baselines.masked_view(images, 0.7, colour)
    hidden = (view == 2).all(1)
    assert torch.equal(view.movedim(1, -1)[~hidden], images.movedim(1, -1)[~hidden])
    assert hidden.float().mean() == pytest.approx(0.7, abs=0.02)
    for top in range(0, 48, 3):  # blocks of 49 // 16 pixels
        for left in range(0, 69, 3):
            block = hidden[:, top : top + 3, left : left + 3].flatten(1)
            assert torch.equal(block.all(1), block.any(1))


@pytest.mark.parametrize("method", ["source_strong", *baselines.ADAPTING])
def test_a_method_trains_for_as_many_steps_as_all_of_diga_and_is_scored(dataset, run, method):
    name = f"name={method}"
    ok(run("tools.baselines", "--method", method, name))
    lines = log(dataset / "runs" / method)
    assert lines[-1]["finished"] == 6 + 2 * 4
    assert ("confident" in lines[-1]) == (method in baselines.ADAPTING)
    assert "| " + method in ok(run("evaluate", "--weights", f"{method}.pth", name))


# ---------------------------------------------------------------- a floor for accuracy

FLOOR = 8  # points of mIoU; seeds 0, 1 and 2 had 14.8, 17.1 and 11.5
OPTIONS = [
    "device=cpu", "precision=fp32", "workers=0", "source.root=game", "target.root=camera",
    "val.root=camera", "source.sizes=[[48,96],[64,128]]", "target.sizes=[[48,96],[64,128]]",
    "val.size=[64,128]", "crop=[48,96]", "translation.crop=[32,64]", "translation.images=ideal",
    "model.channels=32", "optimizer.lr_backbone=4e-3", "optimizer.lr_head=4e-3", "bn_images=16",
    "log_every=100", "pictures_every=1000", "save_every=1000", "evaluation.pictures=0",
]  # fmt: skip


def test_a_warm_up_beats_source_only(tmp_path, monkeypatch):
    """With ideal translations: the game's scenes, drawn as the camera would see them."""
    monkeypatch.chdir(tmp_path)
    path = ROOT / "configs/demo.yaml"
    cfg = load_config(path, OPTIONS)
    monkeypatch.setattr(demo, "SPLITS", {"game": 16, "train": 12, "val": 12})
    main("tools.make_demo_data", "--cfg", path, *OPTIONS)
    for domain, split in (("source", "game"), ("target", "train"), ("val", "val")):
        images = Images(cfg, domain, labelled=True)
        assert len(images) == demo.SPLITS[split]
        assert np.array_equal(images.image(1), demo.render(0, split, 1)[0])
        assert images.label(1).max() < 8
    for i in range(16):
        rng = np.random.default_rng([0, 0, i])
        image = demo.as_camera(demo.draw_world(rng, demo.CAMERA), rng)
        save(tmp_path / f"ideal/{i:05d}.png", (np.clip(image, 0, 1) * 255).round().astype(np.uint8))

    script, *more = SOURCE_ONLY
    main(script, "--cfg", path, *OPTIONS, *more)
    main("warmup", "--cfg", path, *OPTIONS)
    main("evaluate", "--cfg", path, *OPTIONS)
    results = json.loads((tmp_path / "runs/demo/results.json").read_text())
    miou = {stage: entry["miou"] for stage, entry in results.items()}
    assert miou["warmup"] > miou["source_only"] + FLOOR, miou
