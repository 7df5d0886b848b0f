"""The GPU against the CPU, on the same inputs, at 19 classes and odd sizes.

In single precision they agree to rounding: TF32 is off. In bf16 they agree roughly.
"""

import functools

import pytest
import torch
from conftest import ok
from torch import nn

import augment
import losses
import metrics
import models
import selftrain
import warmup
from datasets import Images, Whole
from engine.command import command
from engine.run import Run
from translate_cyclegan import Generator

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU"),
]
SIZE, SMALL, CLASSES = (261, 449), (33, 57), 19  # of labels and images, of logits
SMALLER = "crop=[65,89] source.sizes=[[72,96],[105,140]] target.sizes=[[66,90],[103,140]]"


@pytest.fixture(autouse=True)
def plain_float32():
    """Turn TF32 off."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def on(device, inputs):
    return [x.to(device) if isinstance(x, torch.Tensor) else x for x in inputs]


def on_both(function, *inputs):
    """Return what a function gives for the inputs on the GPU, moved to the CPU, and on the CPU."""
    ours, theirs = function(*on(DEVICE, inputs)), function(*on("cpu", inputs))
    move = functools.partial(torch.Tensor.to, device="cpu")
    return (tuple(map(move, ours)) if isinstance(ours, tuple) else move(ours)), theirs


def difference(ours, theirs):
    """Return the norm of the difference, relative to the norm of `theirs`."""
    theirs = theirs.double()
    return ((ours.cpu().double() - theirs).norm() / theirs.norm().clamp(min=1e-12)).item()


def maps(rng, batch, classes=CLASSES, dtype=torch.float32):
    return (3 * torch.randn(batch, classes, *SMALL, generator=rng)).to(dtype)


def label_maps(rng, batch):
    """Return random label maps in patches of 9 x 9 pixels, with a strip of ignored ones."""
    labels = torch.randint(CLASSES, (batch, 29, 50), generator=rng)
    labels = labels.repeat_interleave(9, 1).repeat_interleave(9, 2)[:, : SIZE[0], : SIZE[1]].clone()
    labels[:, :20, 30:] = losses.IGNORED
    return labels


def images(rng, batch):
    return torch.rand(batch, 3, *SIZE, generator=rng)


# ---------------------------------------------------------------- equations


LOSSES = {
    "supervised": lambda student, _, labels: losses.supervised_loss(student, labels),
    "ohem": lambda student, _, labels: losses.ohem_loss(student, labels),
    "distillation": lambda student, teacher, labels: losses.symmetric_distillation(
        student, teacher, 0.5, labels.shape[-2:]
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_and_its_gradient(rng, name, dtype):
    def loss_and_gradient(student, teacher, labels):
        student = student.clone().requires_grad_()
        loss = LOSSES[name](student, teacher, labels)
        loss.backward()
        return loss.detach(), student.grad

    inputs = maps(rng, 2, dtype=dtype), maps(rng, 2, dtype=dtype), label_maps(rng, 2)
    (loss, gradient), (expected, expected_gradient) = on_both(loss_and_gradient, *inputs)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    # hard pixels at the threshold may be chosen on one device only
    tolerance = {"ohem": 5e-3}.get(name, 1e-4) if dtype == torch.float32 else 1e-2
    assert difference(gradient, expected_gradient) < tolerance


def test_the_edge_loss_and_its_gradient(rng):
    def loss_and_gradient(translated, source, labels):
        translated = translated.clone().requires_grad_()
        loss = losses.semantic_edge_loss(translated, source, labels)
        loss.backward()
        return loss.detach(), translated.grad

    ours, theirs = on_both(loss_and_gradient, images(rng, 2), images(rng, 2), label_maps(rng, 2))
    assert difference(ours[0], theirs[0]) < 1e-5
    assert difference(ours[1], theirs[1]) < 1e-5


def test_views(rng):
    """Of eight images, so that each operation of the strong view is drawn."""
    inputs = images(rng, 8), label_maps(rng, 8), images(rng, 8), label_maps(rng, 8)
    draws = [torch.rand(8, augment.DRAWS, generator=rng) for _ in range(2)]

    def views(source, labels, other, other_labels, draws, other_draws):
        strong = augment.strong_view(source, draws[:, augment.FOR_STRONG], 0.4)
        x_cdm = augment.cross_domain_mix(source, labels, other, draws, 0.4)
        both = draws, other_draws
        x_mix, y_mix, _ = augment.class_mix(source, labels, other, other_labels, both, 0.3)
        return strong, x_cdm, x_mix, y_mix

    (*ours, labels), (*theirs, expected_labels) = on_both(views, *inputs, *draws)
    for view, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-4)
    assert torch.equal(labels, expected_labels)


def test_centroids(rng):
    """Class means, their running mean and moving average, and the labels of the nearest one."""
    features, logits, labels = maps(rng, 2, 256), maps(rng, 2), label_maps(rng, 2)
    features += 3 * torch.randn(CLASSES, 256, generator=rng)[logits.argmax(1)].movedim(-1, 1)

    def follow(features, logits, labels):
        centroids = losses.Centroids(CLASSES, 256, momentum=0.1).to(features.device)
        means, found = centroids.class_means(features, logits, labels)
        centroids.accumulate(means, found)
        centroids.accumulate(*centroids.class_means(features, logits))
        centroids.move(*centroids.class_means(features, logits, labels, padded=True))
        return means, found, centroids.vectors, centroids.assign(features, SIZE)

    ours, theirs = on_both(follow, features, logits, labels)
    assert torch.equal(ours[1], theirs[1])
    assert difference(ours[0], theirs[0]) < 1e-5
    assert difference(ours[2], theirs[2]) < 1e-5
    assert (ours[3] == theirs[3]).float().mean() > 0.999


def test_consensus_and_scores(rng):
    def count(full, half, labels):
        matrix = metrics.ConfusionMatrix(CLASSES, full.device)
        found = losses.probability_labels([full, half], SIZE)
        matrix.update(labels, labels.roll(5, 2).where(labels.roll(5, 2) < CLASSES, 0))
        return found, losses.bilateral_consensus(found, labels), matrix.counts

    half = maps(rng, 2)[..., ::2, ::2].contiguous()
    ours, theirs = on_both(count, maps(rng, 2), half, label_maps(rng, 2))
    assert (ours[0] == theirs[0]).float().mean() > 0.9999
    assert (ours[1] == theirs[1]).float().mean() > 0.9999
    assert torch.equal(ours[2], theirs[2])


# ---------------------------------------------------------------- networks and steps


@pytest.fixture
def on_gpu(finished, config, monkeypatch):
    """on_gpu(device, "key=value", ...) returns a configuration of the finished run; no dropout."""
    monkeypatch.setattr(nn.Dropout2d, "forward", lambda _, x: x)  # a GPU draws other numbers
    some = [*SMALLER.split(), "bn_recalibrate=[]", "compile=false", "selftrain.rounds=1"]
    some += ["model.network=mobilenet_v2", "translation.images=runs/test/translated", "name=gpu"]
    return lambda device, *more: config(*some, f"device={device}", *more)


class OneStep(Run):
    """A run of one step, or of two, the second of which must not wait for the GPU."""

    repeats = 1

    def steps(self, batches, first, total, state):
        batch, self.figures = self.fetch(next(iter(batches))), {}
        yield first, [batch]
        if self.repeats > 1:
            torch.cuda.set_sync_debug_mode("error")
            yield first, [batch]
            torch.cuda.set_sync_debug_mode("default")
            return
        optimizer = state["optimizer"]
        self.gradients = [  # the momentum of a first step
            torch.cat([optimizer.state[p]["momentum_buffer"].flatten() for p in group["params"]])
            for group in optimizer.param_groups
        ]
        self.vectors = state["centroids"].vectors if "centroids" in state else None

    def log(self, **figures):
        self.figures |= {name: torch.as_tensor(x).detach() for name, x in figures.items()}

    def save(self, *_, **__):
        pass

    finish = save


def after_a_step(cfg, stage, repeats=1):
    """Return a OneStep that has taken its step, from weights that are always the same."""
    run = OneStep(cfg, stage, stage)
    run.repeats = repeats
    run.folder.mkdir(parents=True, exist_ok=True)
    if stage == "warmup":
        warmup.train(run)
    else:
        selftrain.train(run, "runs/test/warmup.pth", run.folder / "pseudo_labels")
    return run


@pytest.mark.parametrize(
    ("precision", "of_figures", "of_gradients"), [("fp32", 1e-3, 1e-2), ("bf16", 2e-2, 0.7)]
)
@pytest.mark.parametrize("stage", ["warmup", "selftrain"])
def test_a_step(on_gpu, stage, precision, of_figures, of_gradients):
    """Logged figures, gradients of backbone and head, centroids.

    bf16 rounds the gradients of the backbone's first layers by half of their size.
    """
    ours, theirs = (
        after_a_step(on_gpu(device, f"precision={precision}"), stage) for device in (DEVICE, "cpu")
    )
    for name, figure in theirs.figures.items():
        expected = pytest.approx(float(figure), rel=of_figures, abs=of_figures)
        assert float(ours.figures[name]) == expected, name
    for gradient, expected in zip(ours.gradients, theirs.gradients, strict=True):
        assert difference(gradient, expected) < of_gradients
    if stage == "selftrain":
        assert difference(ours.vectors, theirs.vectors) < of_gradients


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", ["warmup", "selftrain"])
def test_a_step_does_not_wait_for_the_gpu(on_gpu, stage, precision, request):
    request.addfinalizer(functools.partial(torch.cuda.set_sync_debug_mode, "default"))
    after_a_step(on_gpu(DEVICE, f"precision={precision}"), stage, repeats=2)


def test_predictions_in_windows_at_two_scales(on_gpu):
    def predict(device):
        run = Run(on_gpu(device, "precision=fp32"), "evaluate", "evaluation")
        model = run.place(models.build_segmenter("resnet18", CLASSES))
        whole = Whole(Images(run.cfg, "val", labelled=True), [103, 205])
        made = metrics.predictions(run, model, whole, (1.0, 0.5), (64, 96))
        return [(prediction.cpu(), outputs[0][0]) for _, prediction, outputs in made]

    for (ours, logits), (theirs, expected) in zip(predict(DEVICE), predict("cpu"), strict=True):
        assert difference(logits, expected) < 1e-4
        assert (ours == theirs).float().mean() > 0.999


def test_a_translated_image(rng):
    torch.manual_seed(0)
    generator = Generator(16, 2)
    with torch.no_grad():
        ours, theirs = on_both(lambda x: generator.to(x.device)(x), images(rng, 1)[..., :260, :448])
    assert difference(ours, theirs) < 1e-4


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_stages(dataset, run, precision):
    for script in ("translate_cyclegan", "warmup", "selftrain"):
        ok(run(script, "device=cuda", "compile=false", f"precision={precision}"))


def test_memory_that_is_not_enough_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["warmup.py"])
    with pytest.raises(SystemExit) as stop:
        command(lambda: torch.empty(2**46, dtype=torch.uint8, device=DEVICE))
    err = capsys.readouterr().err
    assert (stop.value.code, len(err.splitlines())) == (2, 1)
    assert "raise accumulate" in err
