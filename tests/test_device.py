"""Shipped configurations at their own sizes on PyTorch's meta device, which needs no memory.

Tensors there have a shape and a dtype, but no data. To mix devices or to read a value back is an
error, as on a GPU it would fail or make the host wait. LONG=1: all configurations; else three.
"""

import contextlib
import re

import numpy as np
import pytest
import torch
from conftest import LONG, ROOT, SHIPPED, save
from torch.overrides import TorchFunctionMode

import metrics
import models
import selftrain
import warmup
from datasets import Images
from engine import kernels
from engine.loop import Run
from layouts import classes
from settings import load_config

META = torch.device("meta")
# a shipped configuration, and what makes its shapes quick to compute
NAMES = ["config.yaml", "configs/segformer.yaml", "configs/dinov3.yaml"]
QUICKER = {"configs/segformer.yaml": ["model.network=smp/Segformer/mit_b0"]}
if LONG:
    NAMES = [path.relative_to(ROOT).as_posix() for path in SHIPPED]
    QUICKER = {}
STEPS = [
    (name, stage)
    for name in NAMES
    for stage in ("warmup", "selftrain")
    if stage in load_config(ROOT / name).stages
]
LARGE = (2160, 3840)  # of an image
RESERVED = 1.08  # what CUDA's caching allocator reserves over the peak of live tensors


class NoCopies(TorchFunctionMode):
    """Mode that refuses what is made on the host and copied: a GPU's host waits for it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.device == META:
            assert function not in (torch.tensor, torch.as_tensor), "a constant is copied"
            read = [tensor.device.type for tensor in args if isinstance(tensor, torch.Tensor)]
            assert "cpu" not in read, f"{function} copies from the host"
        return made


class OnMeta(Run):
    """A run on the meta device that takes two steps on its first batch and writes nothing."""

    def __init__(self, cfg, stage, section):
        super().__init__(cfg, stage, section)
        self.device = META
        self.kept = {}  # what autograd keeps for the backward passes: id -> storage
        self.gib = None  # what was kept for the first step

    def autocast(self):
        return contextlib.nullcontext()

    def steps(self, batches, total):
        """Yield a step, and another one in which no constant may be copied to the device."""
        self.shows, batch = False, self.fetch(next(iter(batches)))
        parts = [batch] * min(self.cfg.accumulate, 2)
        for group in self.state["optimizer"].param_groups:
            group["fused"] = False  # there is no fused optimizer for this device
        yield 0, parts
        self.gib = sum(storage.nbytes() for storage in self.kept.values()) / 2**30
        # timm computes the coordinates of a ViT's patches on the host
        of_timm = "/tu-vit" in self.cfg.model.network
        with contextlib.nullcontext() if of_timm else NoCopies():
            yield 0, parts

    def save(self, *_, **__):
        pass

    save_unfinished = finish = save


class Project:
    """The project's configurations, networks, steps and predictions on the meta device."""

    def __init__(self, folder):
        self.folder = folder
        self.label = np.indices((60, 90), np.uint8)[1] // 45  # classes 0 and 1
        save(folder / "images/0.png", np.full((60, 90, 3), 99, np.uint8))
        save(folder / "labels/0.png", self.label)

    def config(self, name, *overrides):
        """Return a configuration at its own sizes; its data is one small image, scaled to them."""
        data = {"root": self.folder, "layout": "folder", "split": "null", "ids": "index"}
        data["list"] = "null"
        options = ["precision=fp32", "device=cpu", "compile=false", "workers=0"]
        options += [f"output={self.folder}", "bn_recalibrate=[]", "model.weights=null"]
        options += [f"translation.images={self.folder}/images", *QUICKER.get(name, [])]
        for domain in ("source", "target", "val"):
            options += [f"{domain}.{key}={value}" for key, value in data.items()]
        return load_config(ROOT / name, [*options, *overrides])

    def network(self, cfg):
        """Return a new network on the meta device."""
        options = {"num_classes": len(classes(cfg)), **cfg.model}
        if "Segformer" in cfg.model.network:  # its library reads values while it is built
            return models.build_segmenter(**options).to(META)
        with META:
            return models.build_segmenter(**options)

    def step(self, cfg, stage):
        """Take two steps of a stage; return what one needs in GiB, but for the backward pass's own.

        These are networks, gradients, momentum, and what autograd keeps.
        """
        run = OnMeta(cfg, stage, stage)
        network = self.network(cfg)
        tensors = [*network.parameters(), *network.buffers()]
        own = [tensor.untyped_storage() for tensor in tensors]

        def pack(tensor):
            storage = tensor.untyped_storage()
            if not any(storage is other for other in own):
                run.kept[id(storage)] = storage
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with pytest.MonkeyPatch.context() as patch, hooks:
            patch.setitem(kernels.BAND, "meta", kernels.BAND["cuda"])
            patch.setattr(models, "build_segmenter", lambda **_: network)
            patch.setattr(models, "load_segmenter", lambda *_, **__: [network])
            # pseudo-labels are read back and written to files, before training begins
            for name in ("label_target", "class_means_of_source"):
                patch.setattr(selftrain, name, lambda *_: iter(()))
            patch.setattr(selftrain, "Aligned", lambda *_: lambda i: self.label)
            source = Images(cfg, "source", True)
            target = Images(cfg, "target", cfg.selftrain.diagnose)
            if stage == "warmup":
                warmup.train(run, None, source)
            else:
                selftrain.train(run, None, self.folder, source, target)
        copies = 4  # student, teacher, gradients, momentum
        return run.gib + copies * sum(storage.nbytes() for storage in own) / 2**30

    def predict(self, cfg, size):
        """Predict an image; return the prediction."""
        run = OnMeta(cfg, "evaluate", "evaluation")
        sample = {"index": 0, "shape": size, "image": torch.zeros(*size, 3, dtype=torch.uint8)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(metrics, "loader", lambda *_: [sample])
            made = metrics.predictions(run, self.network(cfg), None, cfg.evaluation.scales)
            _, labels, _ = next(made)
        return labels


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return Project(tmp_path_factory.mktemp("device"))


@pytest.mark.parametrize(("name", "stage"), STEPS)
def test_a_step_of_a_shipped_configuration_mixes_no_devices_and_reads_nothing_back(
    project, name, stage
):
    """Forward and backward pass, optimizer, teacher and centroids, at its own crop and batch.

    With the paper's settings, in fp32: the file's first lines say how much memory that takes.
    """
    gib = project.step(project.config(name), stage)
    if name == "config.yaml":
        text = (ROOT / name).read_text(encoding="utf-8")
        stated = re.search(r"# With precision=fp32 it is ([\d.]+) GiB and ([\d.]+) GiB", text)
        stated = float(stated[1 if stage == "warmup" else 2])
        assert stated == pytest.approx(RESERVED * gib, rel=0.1)


OTHERS = ["accumulate=3", "selftrain.labels=online", "supervised=ohem", "model.auxiliary=0.1"]


@pytest.mark.parametrize("stage", ["warmup", "selftrain"])
def test_a_step_with_other_settings_mixes_no_devices_and_reads_nothing_back(project, stage):
    """Parts of a batch, losses and labels that config.yaml has not, and another optimizer."""
    cfg = project.config("config.yaml", *OTHERS, "optimizer.name=adamw")
    assert project.step(cfg, stage) > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_large_image_is_predicted_by_every_shipped_configuration(project, name):
    labels = project.predict(project.config(name), LARGE)
    assert (labels.device, labels.shape) == (META, LARGE)


WRONG = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.any()),
    "mask": lambda x: x[x > 0],
    "cpu": lambda x: x.cpu(),
    "add": lambda x: x + torch.zeros(3),
    "cat": lambda x: torch.cat([x, torch.zeros(3)]),
    "constant": lambda x: x + torch.tensor([1.0, 2.0, 3.0], device=META),
    "copy": lambda x: x + torch.zeros(3).to(META),
}


@pytest.mark.parametrize("kind", WRONG)
def test_reading_back_and_mixing_devices_are_errors(kind):
    """So that the tests above would fail if a step did one of these."""
    with NoCopies(), pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
        WRONG[kind](torch.zeros(3, device=META))
