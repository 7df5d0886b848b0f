"""IoU against cityscapesscripts, on the same prediction files; the score that needs no labels."""

import math

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, save

import metrics
from engine.loop import Run
from evaluate import advice
from layouts import CITYSCAPES, label_values
from losses import upsample
from metrics import ConfusionMatrix
from models import build_segmenter
from settings import load_config


def test_scores_equal_cityscapesscripts(tmp_path, capsys, monkeypatch):
    """On maps in Cityscapes' ids, with void and missing classes, and often right predictions."""
    # cityscapesscripts 2.3 uses it, numpy 2.4 removed it
    monkeypatch.setattr(np, "in1d", np.isin, raising=False)
    from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as official

    rng, names = np.random.default_rng(0), list(CITYSCAPES)
    values = [value for _, value, *_ in CITYSCAPES.values()][:16] + [0, 4, 9]
    labels = rng.choice(values, (3, 24, 40)).astype(np.uint8)
    right = rng.random(labels.shape) < 0.6
    predictions = np.where(right, labels, rng.choice(values[:14], labels.shape)).astype(np.uint8)
    predictions[~np.isin(predictions, values[:16])] = 7
    table = np.zeros(256, np.int64)
    for value, k in label_values("cityscapes", names).items():
        table[value] = k
    truth, predicted, matrix = [], [], ConfusionMatrix(19)
    for i, (label, prediction) in enumerate(zip(labels, predictions, strict=True)):
        truth.append(str(tmp_path / f"{i}_gt.png"))
        predicted.append(str(tmp_path / f"{i}_pred.png"))
        save(tmp_path / f"{i}_gt.png", label)
        save(tmp_path / f"{i}_pred.png", prediction)
        matrix.update(torch.from_numpy(table[label]), torch.from_numpy(table[prediction]))
    official.args.evalInstLevelScore = official.args.JSONOutput = official.args.quiet = False
    official.args.evalPixelAccuracy = True
    official.args.colorized = False
    theirs = official.evaluateImgLists(predicted, truth, official.args)
    capsys.readouterr()
    ours = matrix.scores(names)
    assert ours["miou"] / 100 == pytest.approx(theirs["averageScoreClasses"], rel=1e-9)
    for name in names:
        if ours["iou"][name] is None:
            assert np.isnan(theirs["classScores"][name])
        else:
            assert ours["iou"][name] / 100 == pytest.approx(theirs["classScores"][name], rel=1e-9)
    assert sum(iou is None for iou in ours["iou"].values()) == 3


def test_synthias_means_over_16_and_13_classes():
    names = list(CITYSCAPES)
    sixteen = [name for name in names if name not in ("terrain", "truck", "train")]
    thirteen = [name for name in sixteen if name not in ("wall", "fence", "pole")]
    matrix = ConfusionMatrix(19)
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 19, (2, 30, 30), generator=g)
    matrix.update(labels, torch.where(torch.rand(labels.shape, generator=g) < 0.5, labels, 3))
    scores = matrix.scores(names, {"16": sixteen, "13": thirteen})
    assert scores["miou_16"] == pytest.approx(np.mean([scores["iou"][name] for name in sixteen]))
    assert scores["miou_13"] == pytest.approx(np.mean([scores["iou"][name] for name in thirteen]))
    assert scores["miou_16"] != scores["miou"]


def entropy(values):
    shares = torch.bincount(values) / len(values)
    return -torch.xlogy(shares, shares).sum().item()


def test_shared_information_is_that_of_the_classes_at_full_and_half_size(tmp_path, monkeypatch):
    """On some images of unequal sizes, of a network in single precision."""
    rng = np.random.default_rng(0)
    torch.manual_seed(1)
    model = build_segmenter("resnet18", 5, 8, 32).eval()
    pairs = []
    for i, shape in enumerate([(96, 130), (101, 96), (96, 96)]):
        image = rng.integers(0, 256, (*shape, 3), np.uint8)
        save(tmp_path / f"{i}.png", image)
        x = torch.tensor(image).permute(2, 0, 1)[None] / 255
        small = F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True)
        with torch.no_grad():
            maps = [upsample(model(y)[0], shape).argmax(1).flatten() for y in (x, small)]
        pairs.append(torch.stack(maps))
    full, half = torch.cat([pairs[0], pairs[2]], 1)
    wanted = 100 * (entropy(full) + entropy(half) - entropy(5 * full + half)) / math.log(19)
    assert 0.01 < wanted < 99

    # two of the images, and none is resized: the target's size is theirs
    monkeypatch.setattr(metrics, "COMPARED", 2)
    monkeypatch.setattr("datasets.resize_pixels", lambda image, size: image)
    target = f"target={{layout: flat, root: {tmp_path}, split: null}}"
    overrides = ["precision=fp32", "device=cpu", "workers=0", f"output={tmp_path}/runs", target]
    run = Run(load_config(ROOT / "config.yaml", overrides), "evaluate", "evaluation")
    found = metrics.shared_information(run, run.place(model))
    assert found == pytest.approx(wanted, abs=0.02)


def test_the_network_of_the_most_shared_information_is_the_one_to_use_but_not_the_oracle():
    scores = {"source_only": 80.0, "warmup": 75.5, "oracle": 90.0}
    results = {stage: {"information": x} for stage, x in scores.items()}
    line = advice(results | {"warmup_on_night": {}})
    assert line.startswith("Without labels, source_only is the one to use. Adaptation may have")
    assert line.endswith(": source_only 80.0, warmup 75.5")
    line = advice(results | {"selftrain": {"information": 85.0}})
    assert line.startswith("Without labels, selftrain is the one to use. Shared")
    results = {"selftrain_round1": {"information": 89.0}, "selftrain": {"information": 88.5}}
    assert advice(results).startswith("Without labels, selftrain is")
    assert advice({"warmup": {"information": 80.0}, "oracle": {"information": 90.0}}) == ""


def test_edges_and_noise_by_plain_differences():
    image = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    luma = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(float)
    half = luma.reshape(6, 2, 8, 2).mean((1, 3))
    across, down = half[:, 2:] - half[:, :-2], half[2:] - half[:-2]
    across = across[:-2] + 2 * across[1:-1] + across[2:]
    down = down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]
    edges, noise = metrics.edges_and_noise(image)
    np.testing.assert_allclose(edges[1:-1, 1:-1], np.hypot(across, down), rtol=1e-4)
    twice = np.diff(np.diff(np.pad(luma, 1, mode="reflect"), n=2, axis=0), n=2, axis=1)
    assert noise == pytest.approx(np.median(np.abs(twice)))
