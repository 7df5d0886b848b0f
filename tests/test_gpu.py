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


def difference(ours, theirs):
    """Return the norm of the difference, relative to the norm of `theirs`."""
    theirs = theirs.double()
    return ((ours.cpu().double() - theirs).norm() / theirs.norm().clamp(min=1e-12)).item()


def label_maps(rng, batch):
    """Return random label maps in patches of 9 x 9 pixels, with a strip of ignored ones."""
    labels = torch.randint(CLASSES, (batch, 29, 50), generator=rng)
    labels = labels.repeat_interleave(9, 1).repeat_interleave(9, 2)[:, : SIZE[0], : SIZE[1]].clone()
    labels[:, :20, 30:] = losses.IGNORED
    return labels


def images(rng, batch):
    return torch.rand(batch, 3, *SIZE, generator=rng)


# ---------------------------------------------------------------- equations


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

    given = [*inputs, *draws]
    *ours, labels = (view.cpu() for view in views(*(x.to(DEVICE) for x in given)))
    *theirs, expected_labels = views(*given)
    for view, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-4)
    assert torch.equal(labels, expected_labels)


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
