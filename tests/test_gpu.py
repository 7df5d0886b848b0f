"""The GPU against the CPU, on the same inputs, at 19 classes and odd sizes.

In single precision they agree to rounding: TF32 is off. In bf16 they agree roughly.
"""

import functools

import pytest
import torch
from conftest import ok
from torch import nn

import selftrain
import warmup
from datasets import Images
from engine.loop import Run

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


# ---------------------------------------------------------------- networks and steps


@pytest.fixture
def on_gpu(finished, config, monkeypatch):
    """on_gpu(device, "key=value", ...) returns a configuration of the finished run; no dropout."""
    monkeypatch.setattr(nn.Dropout2d, "forward", lambda _, x: x)  # a GPU draws other numbers
    some = [*SMALLER.split(), "bn_recalibrate=[]", "compile=false", "selftrain.rounds=1"]
    some += ["selftrain.diagnose=false", "model.network=mobilenet_v2", "name=gpu"]
    some += ["translation.images=runs/test/translated"]
    return lambda device, *more: config(*some, f"device={device}", *more)


class OneStep(Run):
    """A run of one step, or of two, the second of which must not wait for the GPU."""

    repeats = 1

    def steps(self, batches, total):
        batch, self.shows, self.found = self.fetch(next(iter(batches))), False, {}
        self.log = self.keep
        yield 0, [batch]
        if self.repeats > 1:
            torch.cuda.set_sync_debug_mode("error")
            yield 0, [batch]
            torch.cuda.set_sync_debug_mode("default")
            return
        optimizer = self.state["optimizer"]
        self.gradients = [  # the momentum of a first step
            torch.cat([optimizer.state[p]["momentum_buffer"].flatten() for p in group["params"]])
            for group in optimizer.param_groups
        ]
        self.vectors = self.state["centroids"].vectors if "centroids" in self.state else None

    def keep(self, **figures):
        self.found |= {name: torch.as_tensor(x).detach() for name, x in figures.items()}

    def save(self, *_, **__):
        pass

    save_unfinished = finish = save


def after_a_step(cfg, stage, repeats=1):
    """Return a OneStep that has taken its step, from weights that are always the same."""
    run = OneStep(cfg, stage, stage)
    run.repeats = repeats
    run.folder.mkdir(parents=True, exist_ok=True)
    source, target = Images(cfg, "source", True), Images(cfg, "target", cfg.selftrain.diagnose)
    if stage == "warmup":
        warmup.train(run, None, source)
    else:
        labels = run.folder / "pseudo_labels"
        selftrain.train(run, "runs/test/warmup.pth", labels, source, target)
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
    for name, figure in theirs.found.items():
        expected = pytest.approx(float(figure), rel=of_figures, abs=of_figures)
        assert float(ours.found[name]) == expected, name
    for gradient, expected in zip(ours.gradients, theirs.gradients, strict=True):
        assert difference(gradient, expected) < of_gradients
    if stage == "selftrain":
        assert difference(ours.vectors, theirs.vectors) < of_gradients


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", ["warmup", "selftrain"])
def test_a_step_does_not_wait_for_the_gpu(on_gpu, stage, precision, request):
    request.addfinalizer(functools.partial(torch.cuda.set_sync_debug_mode, "default"))
    after_a_step(on_gpu(DEVICE, f"precision={precision}"), stage, repeats=2)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_stages(dataset, run, precision):
    for script in ("translate_cyclegan", "warmup", "selftrain"):
        ok(run(script, "device=cuda", "compile=false", f"precision={precision}"))
