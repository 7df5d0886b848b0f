"""A training step of each stage, as its command takes it, against the method pixel by pixel."""

import copy
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Killed, log, ok, state

import augment
import losses
import models
from datasets import Crops, Images
from engine.images import read_image, read_label
from engine.log import Figures

pytestmark = pytest.mark.core
IGNORED = 255
QUIET = ("bn_recalibrate=[]", "log_every=1", "save_every=1", "workers=0")


def after_one_step(run, script, *overrides):
    """Run a script's command, and kill it in its second step: the checkpoint is of the first."""
    calls = 0

    def add(self, original=Figures.add, **figures):
        nonlocal calls
        calls += "loss" in figures
        if calls == 2:
            raise Killed
        original(self, **figures)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Figures, "add", add)
        run(script, *QUIET, *overrides)


def seed(stage, step=0):
    torch.manual_seed(int(np.random.SeedSequence([0, *stage.encode(), step]).generate_state(1)[0]))


def as_batch(samples, name):
    batch = torch.stack([torch.from_numpy(sample[name]) for sample in samples])
    return batch.permute(0, 3, 1, 2).float() / 255 if batch.dim() == 4 else batch


def half_of_the_classes(label, scores):
    """The values in half of the classes present, those with the highest scores, and 255."""
    present = np.unique(label).tolist()
    present.sort(key=lambda value: -scores[value])
    return {*present[: len(present) // 2], IGNORED}


def mixed(front, back, label, scores):
    chosen = half_of_the_classes(label.numpy(), scores)
    mask = torch.tensor(np.isin(label.numpy(), list(chosen)))
    return torch.where(mask, front, back)


def cross_entropy(probabilities, logits):
    """H(p, q), the mean over all pixels."""
    return -(probabilities * logits.log_softmax(1)).sum(1).mean()


def supervised(logits, labels, weights=None):
    weights, total = torch.ones(labels.shape) if weights is None else weights, 0
    for image, label, weight in zip(logits.log_softmax(1), labels, weights, strict=True):
        for k in range(logits.shape[1]):
            total = total - (weight * image[k])[label == k].sum()
    return total / labels.numel()


def up(maps, size):
    return F.interpolate(maps, size, mode="bilinear", align_corners=True)


def teacher_of(student):
    """Batch norm with the batch's statistics, no dropout."""
    teacher = copy.deepcopy(student)
    for module in teacher.modules():
        module.train(isinstance(module, torch.nn.BatchNorm2d))
    return teacher


def distillation(student_logits, teacher_logits, kappa):
    n = len(student_logits) // 2
    weak_to_strong = cross_entropy(teacher_logits[:n].softmax(1), student_logits[n:])
    return weak_to_strong + kappa * cross_entropy(teacher_logits[n:].softmax(1), student_logits[:n])


def compare(saved, student, loss, rates, weight_decay=5e-4):
    """Assert that `saved` is `student` after a first step of `loss`.

    After one step, the momentum's buffer is the gradient itself.
    """
    loss.backward()
    for name, p in student.named_parameters():
        step = -rates[name.startswith("backbone.")] * (p.grad + weight_decay * p.detach())
        assert (saved[name] - p.detach() - step).norm() < 1e-2 * step.norm() + 1e-7, name


@pytest.fixture
def warmed_up(finished, run):
    """Return a run's folder with a network that is sure of some pixels, and translated images."""
    rates = ("optimizer.lr_backbone=0.05", "optimizer.lr_head=0.05")
    ok(run("warmup", "--force", *QUIET, *rates))
    for name in ("log.jsonl", "selftrain.pth", "selftrain_round1.pth"):
        (finished / name).unlink()
    shutil.rmtree(finished / "pseudo_labels")
    return finished


def views(cfg, stage, source, folder):
    translated = lambda i: read_image(folder / f"translated/{i:05d}.jpg")  # noqa: E731
    aligned = {"translated": translated}
    crops = Crops(cfg, stage, "source", source, [1, 1], 2, aligned=aligned)
    samples = [crops[0], crops[1]]
    x_s, y_s, draws = (as_batch(samples, name) for name in ("image", "label", "draws"))
    strong = augment.strong_view(x_s, draws, cfg[stage].strong)
    translated = as_batch(samples, "translated")
    pairs = zip(strong, translated, y_s, draws[:, 8:264], strict=True)
    return x_s, y_s, draws, torch.stack([mixed(*pair) for pair in pairs])


def test_a_warm_up_step(dataset, finished, run, config):
    rates = ("optimizer.lr_backbone=0.01", "optimizer.lr_head=0.02")
    options = (
        "name=one",
        f"translation.images={finished}/translated",
        "warmup.distill=0.7",
        "warmup.strong_to_weak=0.3",
    )
    after_one_step(run, "warmup", *options, *rates)
    saved = state(dataset / "runs/one/warmup.unfinished.pth")

    cfg = config(*options, *rates, *QUIET)
    torch.manual_seed(0)
    student = models.build_segmenter(num_classes=3, **cfg.model).train()
    student = student.to(memory_format=torch.channels_last)
    teacher = teacher_of(student)
    x_s, y_s, _, x_cdm = views(cfg, "warmup", Images(cfg, "source", True), finished)
    x = torch.cat([x_s, x_cdm])
    with torch.no_grad():
        teacher_logits = up(teacher(x)[0], y_s.shape[1:])
    seed("warmup")
    logits = up(student(x)[0], y_s.shape[1:])
    ce, kd = supervised(logits[:2], y_s), distillation(logits, teacher_logits, 0.3)
    compare(saved["student"], student, ce + 0.7 * kd, {True: 0.01, False: 0.02})
    line = log(dataset / "runs/one")[0]
    for name, value in {"ce": ce, "kd": kd, "loss": ce + 0.7 * kd}.items():
        assert line[name] == pytest.approx(value.item(), rel=1e-4), name


def class_means(features, predicted, labels):
    """[(class, mean feature)] of one image; `labels` at the features' size or None."""
    means = []
    for k in range(3):
        member = (predicted == k) & (labels == k if labels is not None else True)
        if member.sum() >= 5:
            means.append((k, features[:, member].mean(1)))
    return means


def smaller(label, size):
    return F.interpolate(label[None, None].float(), size=size, mode="nearest-exact")[0, 0]


@pytest.mark.parametrize(
    ("labels", "class_mixing"), [("consensus", True), ("online", True), ("online", False)]
)
def test_a_self_training_step(run, config, monkeypatch, warmed_up, labels, class_mixing):
    folder = warmed_up
    rates = ("optimizer.lr_backbone=0.01", "optimizer.lr_head=0.02")
    options = (
        "selftrain.rounds=1",
        "selftrain.centroids=target",
        "selftrain.momentum=0.1",
        "selftrain.distill=0.7",
        f"selftrain.labels={labels}",
        f"selftrain.class_mixing={class_mixing}",
    )
    monkeypatch.setattr(losses, "CONFIDENT", 0.6)  # of a network of a few steps
    after_one_step(run, "selftrain", *options, *rates)
    saved = state(folder / "selftrain.unfinished.pth")

    cfg = config(*options, *rates, *QUIET)
    student = models.load_segmenter(folder / "warmup.pth", cfg)[0]
    student = student.to(memory_format=torch.channels_last)
    source, target = Images(cfg, "source", True), Images(cfg, "target", False)

    # probability labels and first centroids, image by image
    student.eval()
    centroids, counts = torch.zeros(3, 32), [0, 0, 0]
    for i, name in enumerate(target.names):
        image = torch.from_numpy(target.image(i)).permute(2, 0, 1)[None] / 255
        half = F.interpolate(image, (24, 32), mode="bilinear", antialias=True)
        with torch.no_grad():
            full_logits, (logits, features, _) = student(image)[0], student(half)
        best = torch.maximum(up(full_logits, (48, 64)), up(logits, (48, 64))).argmax(1)[0]
        written = read_label(folder / f"pseudo_labels/round1/{name}")
        assert (best.numpy() == written).mean() > 0.999  # channels last sums in another order
        for k, mean in class_means(features[0], logits[0].argmax(0), None):
            counts[k] += 1
            centroids[k] += (mean - centroids[k]) / counts[k]

    student.train()
    teacher = teacher_of(student)
    x_s, y_s, draws, x_cdm = views(cfg, "selftrain", source, folder)
    pseudo = lambda i: read_label(folder / "pseudo_labels/round1" / target.names[i])  # noqa: E731
    crops = Crops(cfg, "selftrain", "target", target, [1, 1], 2, aligned={"pseudo": pseudo})
    samples = [crops[0], crops[1]]
    x_t, y_p, target_draws = (as_batch(samples, name) for name in ("image", "pseudo", "draws"))
    with torch.no_grad():
        teacher_logits, features, _ = teacher(torch.cat([x_s, x_cdm, x_t]))

    distance = (features[4:, None] - centroids[None, :, :, None, None]).norm(dim=2)
    y_f = up((-distance).softmax(1), y_p.shape[1:]).argmax(1)
    share = torch.ones(2)
    if labels == "online":
        probability, y_p = up(teacher_logits[4:], y_s.shape[1:]).softmax(1).max(1)
        share = (probability >= 0.6).float().mean((1, 2))
        assert share.min() > 0.1 and share.max() < 0.9 and share[0] != share[1]
    y_t = torch.where(y_p == y_f, y_p, IGNORED)
    strong = augment.strong_view(x_t, target_draws, cfg.selftrain.strong)
    x_mix, y_mix = strong, y_t
    weights = share[:, None, None].expand(y_t.shape)
    if class_mixing:
        part = [(y_s[b], draws[b, 264:]) for b in range(2)]
        one = torch.ones(y_s.shape[1:])
        x_mix = torch.stack([mixed(x_s[b], strong[b], *part[b]) for b in range(2)])
        y_mix = torch.stack([mixed(y_s[b], y_t[b], *part[b]) for b in range(2)])
        weights = [mixed(one, weights[b], *part[b]) for b in range(2)]

    seed("selftrain")
    logits = up(student(torch.cat([x_s, x_cdm, x_mix]))[0], y_s.shape[1:])
    ce, ce_mix = supervised(logits[:2], y_s), supervised(logits[4:], y_mix, weights)
    teacher_logits_up = up(teacher_logits[:4], y_s.shape[1:])
    kd = distillation(logits[:4], teacher_logits_up, cfg.selftrain.strong_to_weak)
    loss = ce + ce_mix + 0.7 * kd
    line = log(folder)[-1]
    for name, value in {"ce": ce, "ce_mix": ce_mix, "kd": kd, "loss": loss}.items():
        assert line[name] == pytest.approx(value.item(), rel=1e-3), name
    assert line["kept"] == pytest.approx((y_t != IGNORED).float().mean().item(), abs=2e-3)
    compare(saved["student"], student, loss, {True: 0.01, False: 0.02})

    # centroids: the target's images first, then the mixed source's
    for first, labels in ((4, y_t), (2, y_s)):
        for b in range(2):
            label = smaller(labels[b], features.shape[-2:])
            predicted = teacher_logits[first + b].argmax(0)
            for k, mean in class_means(features[first + b], predicted, label):
                centroids[k] = 0.9 * centroids[k] + 0.1 * mean
    torch.testing.assert_close(saved["centroids"]["vectors"], centroids, rtol=1e-3, atol=1e-4)
