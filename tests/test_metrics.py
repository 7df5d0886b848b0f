"""IoU against cityscapesscripts, on the same prediction files."""

import numpy as np
import pytest
import torch
from conftest import ROOT, save

from metrics import ConfusionMatrix
from settings import CITYSCAPES, label_values, load_config


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


def test_the_subsets_of_a_configuration_are_of_its_classes():
    cfg = load_config(ROOT / "config.yaml", ['evaluation.subsets={"16": [road, sky]}'])
    assert cfg.evaluation.subsets == {"16": ["road", "sky"]}
