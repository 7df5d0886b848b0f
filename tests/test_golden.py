"""Every expected number was computed with the authors' published code.

Integers must be equal, floats equal to 1e-5 relative.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

import augment
import losses
import metrics
import models
from settings import load_config

pytestmark = pytest.mark.core
GOLDEN = Path(__file__).parent / "golden"
CONFIG = Path(__file__).parent.parent / "config.yaml"
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
cuda = pytest.param("cuda", marks=[pytest.mark.gpu, no_gpu])
on_each_device = pytest.mark.parametrize("device", ["cpu", cuda])


def golden(name, device="cpu"):
    data = np.load(GOLDEN / f"{name}.npz")
    return {key: torch.from_numpy(np.asarray(value)).to(device) for key, value in data.items()}


def equal(ours, theirs):
    """Assert equality to 1e-5 of the largest magnitude.

    That is the scale on which sums of single-precision numbers are exact.
    """
    atol = 1e-5 * theirs.abs().max().item()
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-5, atol=atol)


@on_each_device
def test_supervised_loss_and_its_gradient(device):
    data = golden("supervised_ce", device)
    logits = data["logits"].requires_grad_()
    loss = losses.supervised_loss(logits, data["labels"])
    loss.backward()
    equal(loss.detach(), data["loss"])
    equal(logits.grad, data["grad"])


@on_each_device
def test_symmetric_distillation_and_its_gradient(device):
    data = golden("symmetric_kd", device)
    student = data["student_logits"].requires_grad_()
    teacher = data["teacher_logits"].requires_grad_()
    n = len(student) // 2
    loss = losses.symmetric_distillation(student.split(n), teacher.split(n), strong_to_weak=0.5)
    loss.backward()
    equal(loss.detach(), data["loss"])
    equal(student.grad, data["grad"])
    assert teacher.grad is None


@on_each_device
@pytest.mark.parametrize("labelled", [True, False])
def test_class_means(labelled, device):
    data = golden("class_means", device)
    centroids = losses.Centroids(19, 256).to(device)
    labels = data["labels"] if labelled else None
    means, classes = centroids.class_means(data["features"], data["logits"], labels)
    suffix = "with_labels" if labelled else "without_labels"
    found = classes != 255
    assert classes[found].tolist() == data[f"ids_{suffix}"].tolist()
    equal(means[found], data[f"means_{suffix}"])


def test_centroids_accumulate_then_move():
    means, expected = golden("class_means"), golden("centroid_update")
    centroids = losses.Centroids(19, 256, momentum=float(expected["momentum"]))
    centroids.accumulate(means["means_without_labels"], means["ids_without_labels"])
    equal(centroids.vectors, expected["after_running_mean"])
    before = centroids.vectors.clone()
    centroids.move(means["means_with_labels"], means["ids_with_labels"])
    equal(centroids.vectors, expected["after_moving_average"])
    # the move itself is 1e-4 of a vector, below the tolerance of the line above
    moved = (expected["after_moving_average"] - expected["after_running_mean"]).norm()
    assert abs((centroids.vectors - before).norm() - moved) < 1e-3 * moved


def test_feature_labels_and_consensus():
    data = golden("consensus")
    centroids = losses.Centroids(19, 256)
    centroids.vectors.copy_(data["centroids"])
    theirs = data["feature_labels"]
    feature_labels = centroids.assign(data["features"], theirs.shape[-2:])
    # classes never seen have one centroid, zero: which of them wins is up to the CPU's rounding
    seen = centroids.vectors.any(1)
    assert torch.equal(feature_labels[seen[theirs]], theirs[seen[theirs]])
    assert not seen[feature_labels[~seen[theirs]]].any()
    assert (feature_labels != theirs).sum() <= 0.1 * theirs.numel()
    consensus = losses.bilateral_consensus(data["prob_labels"], theirs)
    assert torch.equal(consensus, data["consensus"])


def test_masks_and_mixing():
    data = golden("mixing")
    chosen = torch.zeros(2, 256, dtype=torch.bool)
    chosen[torch.arange(2)[:, None], data["chosen"]] = True
    mask = augment.class_mask(data["source_labels"], chosen)
    assert torch.equal(mask[:, 0].float(), data["mask"])
    for front, back, mixed in (
        ("source_strong", "translated", "crdomix"),
        ("source_strong", "target_strong", "crossmix"),
        ("source_labels", "target_labels", "crossmix_labels"),
    ):
        assert torch.equal(augment.mix(mask, data[front], data[back]), data[mixed])


def test_evaluation_at_two_scales():
    data = golden("evaluation")
    logits = [data["logits_full"], data["logits_half"]]
    prediction = losses.probability_labels(logits, data["labels"].shape[-2:])
    assert torch.equal(prediction, data["prediction"])
    matrix = metrics.ConfusionMatrix(19)
    matrix.update(data["labels"], prediction)
    assert torch.equal(matrix.counts, data["confusion"].long())
    scores = matrix.scores([str(k) for k in range(19)])
    equal(torch.tensor(list(scores["iou"].values()), dtype=torch.float64) / 100, data["iou"])
    assert scores["miou"] / 100 == pytest.approx(data["miou"].item(), rel=1e-5)


def test_schedules():
    data, cfg = golden("schedules"), load_config(CONFIG, ["optimizer.lr_backbone=2.5e-4"])
    backbone, head, teacher, student = (torch.nn.Linear(1, 1, bias=False) for _ in range(4))
    model = torch.nn.ModuleDict({"backbone": backbone, "head": head})
    optimizer = models.build_optimizer(model, cfg.optimizer)
    for t, rate, head_rate, alpha in zip(*(data[k].tolist() for k in data), strict=True):
        models.set_learning_rate(optimizer, t, 80000, cfg.optimizer)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([rate, head_rate], rel=1e-5)
        teacher.weight.data.fill_(1)
        student.weight.data.fill_(0)
        models.ema_update(teacher, student, t)
        assert teacher.weight.item() == pytest.approx(alpha, rel=1e-5)
