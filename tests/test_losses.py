"""The equations against slow, obvious versions of themselves."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import losses
from engine import kernels


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def test_supervised_loss_counts_ignored_pixels_in_the_divisor(rng):
    logits = torch.randn(2, 3, 4, 5, generator=rng)
    labels = torch.randint(0, 3, (2, 4, 5), generator=rng)
    labels[:, 0] = 255
    weights = torch.rand(2, 4, 5, generator=rng)
    total = weighted = 0
    for b, i, j in itertools.product(range(2), range(1, 4), range(5)):
        loss = -logits[b, :, i, j].log_softmax(0)[labels[b, i, j]].item()
        total += loss
        weighted += weights[b, i, j].item() * loss
    assert losses.supervised_loss(logits, labels).item() == pytest.approx(total / 40, rel=1e-5)
    ours = losses.supervised_loss(logits, labels, weights)
    assert ours.item() == pytest.approx(weighted / 40, rel=1e-5)


def test_a_batch_without_any_label_has_loss_zero(rng):
    labels = torch.full((1, 4, 4), 255)
    assert losses.supervised_loss(torch.randn(1, 3, 4, 4, generator=rng), labels) == 0


def plain_cross_entropy(logits, target, size, ignore_index, weights):
    """The sum over all pixels of -log q_y, or of H(p, q), with the full-size maps of the batch."""
    log_q = losses.upsample(logits, size).log_softmax(1)
    if target.is_floating_point():
        return -(losses.upsample(target, size).softmax(1) * log_q).sum()
    loss = F.nll_loss(log_q, target, ignore_index=ignore_index, reduction="none")
    return (loss if weights is None else loss * weights).sum()


@pytest.mark.parametrize("band", [None, 1, 19 * 83 * 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", ["labels", "weighted labels", "logits"])
def test_the_fused_cross_entropy_is_the_plain_one(rng, monkeypatch, target, dtype, band):
    """In one band, in bands of a single row, and in bands of 5 rows that do not divide 53."""
    if band:
        monkeypatch.setitem(kernels.BAND, "cpu", band)
    size = (53, 83)
    values = (3 * torch.randn(2, 19, 7, 11, generator=rng)).to(dtype)
    labels = torch.randint(0, 19, (2, *size), generator=rng)
    labels[:, 10:20, 30:] = 255
    labels[1] = 255
    teacher = (3 * torch.randn(2, 19, 7, 11, generator=rng)).to(dtype)
    weights = torch.rand(2, *size, generator=rng) if "weighted" in target else None
    target = teacher if target == "logits" else labels
    ours, plain = values.clone().requires_grad_(), values.clone().requires_grad_()
    loss = kernels.upsampled_cross_entropy(ours, target, size, 255, weights)
    expected = plain_cross_entropy(plain, target, size, 255, weights)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (0.3 * loss).backward()
    (0.3 * expected).backward()
    assert ours.grad.dtype == dtype
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-5
    atol = rounding * plain.grad.abs().max().item()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=rounding, atol=atol)


@pytest.mark.parametrize("kappa", [0.0, 0.25, 1.0])
def test_symmetric_distillation_is_the_equation(rng, kappa):
    student, teacher = torch.randn(2, 4, 5, 6, 7, generator=rng)
    h = lambda p, q: -(p.softmax(0) * q.log_softmax(0)).sum(0).mean()  # noqa: E731
    weak_to_strong = (h(teacher[0], student[2]) + h(teacher[1], student[3])) / 2
    strong_to_weak = (h(teacher[2], student[0]) + h(teacher[3], student[1])) / 2
    expected = weak_to_strong + kappa * strong_to_weak
    ours = losses.symmetric_distillation(student.split(2), teacher.split(2), kappa)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)


def test_class_means_are_rows_of_each_image_and_class_255_is_skipped(rng):
    features = torch.randn(3, 6, 4, 4, generator=rng)
    logits = torch.randn(3, 5, 4, 4, generator=rng)
    centroids = losses.Centroids(5, 6, cap=2)
    means, classes = centroids.class_means(features, logits, min_pixels=4)
    expected, counts = torch.zeros(5, 6), [0] * 5
    for row, (b, k) in enumerate(itertools.product(range(3), range(5))):
        member = logits[b].argmax(0) == k
        assert classes[row] == (k if member.sum() >= 4 else 255)
        if classes[row] != 255:
            mean = features[b][:, member].mean(1)
            torch.testing.assert_close(means[row], mean)
            expected[k] += (mean - expected[k]) / (counts[k] + 1)
            counts[k] = min(counts[k] + 1, 2)
    assert {*range(5), 255} == {*classes.tolist()}
    centroids.accumulate(means, classes)
    torch.testing.assert_close(centroids.vectors, expected)
    assert centroids.counts.tolist() == counts


@pytest.mark.parametrize("momentum", [1e-4, 0.3, 1.0])
def test_move_is_one_row_after_the_other(rng, momentum):
    centroids = losses.Centroids(4, 3, momentum=momentum)
    expected = torch.randn(4, 3, generator=rng)
    centroids.vectors.copy_(expected)
    means, classes = torch.randn(9, 3, generator=rng), torch.tensor([0, 2, 2, 0, 255, 2, 1, 0, 2])
    for mean, k in zip(means, classes.tolist(), strict=True):
        if k != 255:
            expected[k] = (1 - momentum) * expected[k] + momentum * mean
    centroids.move(means, classes)
    torch.testing.assert_close(centroids.vectors, expected)


def test_logits_move_by_what_their_label_s_means_exceed_the_anchors_by(rng):
    align = losses.LogitAlignment(4, 0.7, momentum=0.5)
    labels = torch.randint(0, 3, (2, 6, 8), generator=rng)  # class 3 is nowhere
    labels[:, 0] = 255
    mean = torch.zeros(4, 4)
    for _ in range(2):
        logits = torch.randn(2, 4, 3, 4, generator=rng)
        near = labels[:, 1::2, 1::2]
        own = [mean[k, k] - mean[k].mean() for k in range(3)]
        rest = [mean[y, k] - mean[y].mean() for y in range(3) for k in range(4) if k != y]
        expected = logits.clone()
        for b, i, j in itertools.product(range(2), range(3), range(4)):
            for k in range(4 if near[b, i, j] != 255 else 0):
                y = near[b, i, j]
                anchor = sum(own) / 3 if k == y else sum(rest) / 9
                expected[b, k, i, j] += 0.7 * (mean[y, k] - mean[y].mean() - anchor)
        torch.testing.assert_close(align(logits, labels), expected)
        for b, k in itertools.product(range(2), range(3)):
            if (near[b] == k).sum() >= 5:
                mean[k] += 0.5 * (logits[b][:, near[b] == k].mean(1) - mean[k])
        align.move(*align.rows.pop())
        torch.testing.assert_close(align.vectors, mean)


def test_semantic_edges_are_where_a_neighbour_differs(rng):
    labels = torch.randint(0, 3, (2, 6, 7), generator=rng)
    translated, images = torch.rand(2, 2, 3, 6, 7, generator=rng)
    total = 0.0
    for b, i, j in itertools.product(range(2), range(6), range(7)):
        near = [(i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)]
        near = [labels[b, y, x] for y, x in near if 0 <= y < 6 and 0 <= x < 7]
        if any(label != labels[b, i, j] for label in near):
            total += (translated[b, :, i, j] - images[b, :, i, j]).abs().sum().item()
    loss = losses.semantic_edge_loss(translated, images, labels)
    assert loss.item() == pytest.approx(total / images.numel(), rel=1e-5)


@pytest.mark.parametrize(("min_pixels", "kept"), [(1, "hard"), (500, "most"), (100_000, "all")])
def test_ohem_keeps_the_hard_pixels(rng, min_pixels, kept):
    """Against a loop over pixels in the order of their losses."""
    labels = torch.randint(0, 5, (2, 16, 20), generator=rng)
    logits = torch.randn(2, 5, 16, 20, generator=rng) + 4 * F.one_hot(labels, 5).permute(0, 3, 1, 2)
    labels[0, :3] = 255
    weights, pixels = torch.rand(labels.shape, generator=rng), []
    for b, row, column in (labels != 255).nonzero().tolist():
        p = logits[b, :, row, column].softmax(0)[labels[b, row, column]].item()
        pixels.append((p, -math.log(p), -math.log(p) * weights[b, row, column].item()))
    pixels.sort()
    hard = [pixel for pixel in pixels if pixel[0] < 0.7]
    chosen = {"hard": hard, "most": pixels[:500], "all": pixels}[kept]
    assert len(hard) < 500 < len(pixels)
    _, plain, weighted = np.mean(chosen, axis=0)
    ours = losses.ohem_loss(logits, labels, min_pixels=min_pixels)
    assert ours.item() == pytest.approx(plain, rel=1e-5)
    ours = losses.ohem_loss(logits, labels, weights, min_pixels=min_pixels)
    assert ours.item() == pytest.approx(weighted, rel=1e-5)


def test_the_share_of_confident_pixels_is_that_of_each_image():
    probability = torch.tensor([[[0.97, 0.9], [0.969, 0.99]], [[0.5, 0.5], [0.5, 0.98]]])
    logits = torch.stack([probability, 1 - probability], 1).log()
    shares = losses.confident_share(logits, (2, 2))
    assert shares.tolist() == [[[0.75] * 2] * 2, [[0.25] * 2] * 2]
