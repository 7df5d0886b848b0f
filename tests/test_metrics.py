"""IoU against cityscapesscripts, on the same prediction files; the score that needs no labels."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, save

import metrics
from engine.loop import Run
from evaluate import advice
from layouts import CITYSCAPES, label_values
from metrics import ConfusionMatrix
from models import build_segmenter
from settings import load_config


@pytest.fixture(scope="module")
def maps():
    """Label maps in Cityscapes' ids, with void and missing classes, and often right predictions."""
    rng = np.random.default_rng(0)
    values = [value for _, value, *_ in CITYSCAPES.values()][:16] + [0, 4, 9]
    labels = rng.choice(values, (3, 24, 40)).astype(np.uint8)
    right = rng.random(labels.shape) < 0.6
    predictions = np.where(right, labels, rng.choice(values[:14], labels.shape)).astype(np.uint8)
    predictions[~np.isin(predictions, values[:16])] = 7
    return labels, predictions


def test_scores_equal_cityscapesscripts(maps, tmp_path, capsys, monkeypatch):
    # cityscapesscripts 2.3 uses it, numpy 2.4 removed it
    monkeypatch.setattr(np, "in1d", np.isin, raising=False)
    from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as official

    truth, predicted = [], []
    for i, (label, prediction) in enumerate(zip(*maps, strict=True)):
        truth.append(str(tmp_path / f"{i}_gt.png"))
        predicted.append(str(tmp_path / f"{i}_pred.png"))
        save(tmp_path / f"{i}_gt.png", label)
        save(tmp_path / f"{i}_pred.png", prediction)
    official.args.evalInstLevelScore = official.args.JSONOutput = official.args.quiet = False
    official.args.evalPixelAccuracy = True
    official.args.colorized = False
    theirs = official.evaluateImgLists(predicted, truth, official.args)
    capsys.readouterr()

    names = list(CITYSCAPES)
    table = np.zeros(256, np.int64)
    for value, k in label_values("cityscapes", names).items():
        table[value] = k
    matrix = ConfusionMatrix(19)
    for label, prediction in zip(*maps, strict=True):
        matrix.update(torch.from_numpy(table[label]), torch.from_numpy(table[prediction]))
    ours = matrix.scores(names)
    assert ours["miou"] / 100 == pytest.approx(theirs["averageScoreClasses"], rel=1e-9)
    for name in names:
        if ours["iou"][name] is None:
            assert np.isnan(theirs["classScores"][name])
        else:
            assert ours["iou"][name] / 100 == pytest.approx(theirs["classScores"][name], rel=1e-9)
    assert sum(iou is None for iou in ours["iou"].values()) == 3


def test_synthias_means_over_16_and_13_classes(maps):
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


def test_shared_information_is_that_of_the_classes_at_full_and_half_size(tmp_path, monkeypatch):
    """On some images of unequal sizes, of a network in single precision."""
    rng = np.random.default_rng(0)
    shapes = [(96, 130), (101, 96), (96, 96)]
    images = [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]
    for i, image in enumerate(images):
        save(tmp_path / f"{i}.png", image)
    torch.manual_seed(1)
    model = build_segmenter("resnet18", 5, 8, 32).eval()
    pairs = []
    for image in (images[0], images[2]):
        x = torch.tensor(image.copy()).permute(2, 0, 1)[None] / 255
        half = [max(round(side / 2), 1) for side in x.shape[2:]]
        small = F.interpolate(x, half, mode="bilinear", antialias=True)
        with torch.no_grad():
            maps = [
                F.interpolate(model(y)[0], x.shape[2:], mode="bilinear", align_corners=True)
                for y in (x, small)
            ]
        pairs += zip(*(x.argmax(1).flatten().tolist() for x in maps), strict=True)
    both = {pair: n / len(pairs) for pair, n in Counter(pairs).items()}
    first, second = (
        {k: n / len(pairs) for k, n in Counter(x).items()} for x in zip(*pairs, strict=True)
    )
    terms = [p * math.log(p / first[a] / second[b]) for (a, b), p in both.items()]
    wanted = 100 * sum(terms) / math.log(19)
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
