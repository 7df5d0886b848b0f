"""Every shipped configuration on a GPU, tested on a machine that needs none.

Training steps and predictions run at the configurations' own sizes, in fake tensors: these have a
device, a dtype and a shape, but no data. They show mixed devices, values that are read back, and
the memory that is needed. They cannot show values, times, or the workspaces that cuDNN chooses.
"""

import contextlib
import copy
import functools
import heapq
import itertools
import re
import sys
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, save
from engine.run import Run
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import metrics
import selftrain
import warmup
from engine.config import Config
from layouts import classes
from settings import load_config

pytestmark = [
    pytest.mark.filterwarnings("ignore:Accessing the data pointer", "ignore:'pin_memory'"),
    pytest.mark.skipif(
        not torch.cuda.is_available() and not hasattr(torch._C, "_ensureCUDADeviceGuardSet"),
        reason="this PyTorch has fake tensors only on devices that are there",
    ),
]

CONFIGS = ["config.yaml", *sorted(f"configs/{path.name}" for path in ROOT.glob("configs/*.yaml"))]
STEPS = [
    (path, stage)
    for path in CONFIGS
    for stage in ("warmup", "selftrain")
    if stage in load_config(ROOT / path).stages
]
LARGE = (2160, 3840)  # of an image, larger than every configuration's tile
# GiB of live storages that fit on a GPU with 24 GB: CUDA and its libraries need about 0.5 GiB, and
# the caching allocator reserves some percent more than it hands out.
LIMIT = 22.5
RESERVED = 1.08  # what the allocator reserves over the peak of live storages: 1.04 to 1.17


# ---------------------------------------------------------------- the project: all uses of it


class OneStep(Run):
    """A run that takes one step on its first batch and writes nothing."""

    def steps(self, batches, first, total, state):
        """Yield one step that needs as much memory as any later one: the optimizer has its state.

        Of the `accumulate` parts of a step, it has two at most: the second one runs beside the
        gradients of the first, and so would all others.
        """
        with unset_fake_temporarily():
            batch = next(iter(batches))
        optimizer = state["optimizer"]
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        self.watch.peak = self.watch.now
        yield first, (self.fetch(batch) for _ in range(min(self.cfg.accumulate, 2)))

    def describe(self):
        pass

    def save(self, *_, **__):
        pass

    def save_unfinished(self, *_):
        pass

    def finish(self, *_):
        pass


class Project:
    """The project's configurations, networks, steps and predictions, in fake or real tensors.

    No other place of this file uses the project.
    """

    def __init__(self, folder):
        self.folder, self.networks = folder, {}
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.label = np.indices((60, 90), np.uint8)[1] // 45  # classes 0 and 1
        save(folder / "images/0.png", np.zeros((60, 90, 3), np.uint8))
        save(folder / "labels/0.png", self.label)

    def config(self, path, *overrides):
        """Return a configuration at its own sizes; its data is one small image, scaled to them."""
        data = {
            "root": self.folder,
            "layout": "folder",
            "split": None,
            "ids": "index",
            "list": None,
        }
        data = {
            f"{domain}.{key}": value
            for domain in ("source", "target", "val")
            for key, value in data.items()
        }
        data["translation.images"] = self.folder / "images"
        data = [f"{key}={'null' if value is None else value}" for key, value in data.items()]
        options = ["precision=bf16", "compile=false", "workers=0", "model.weights=null"]
        options += [f"output={self.folder}", "bn_recalibrate=[]"]
        return load_config(ROOT / path, [*options, *data, *overrides])

    def network(self, cfg, filled=False):
        """Return a new network with random weights if `filled`, or else without any (meta device).

        Those without weights are built once and copied.
        """
        build = functools.partial(
            warmup.build_segmenter, num_classes=len(classes(cfg)), **cfg.model
        )
        if filled:
            return build()
        if str(build) not in self.networks:
            with Unfilled():
                self.networks[str(build)] = build().to("meta")
        return copy.deepcopy(self.networks[str(build)])

    def run(self, cfg, stage, section, device):
        """Return a run on `device`, whether this machine has it or not."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            return OneStep(Config(cfg, device=device), stage, section)

    def step(self, cfg, stage, device="cuda", fake=True):
        """Take a step of warm-up or self-training; return the peak of its storages in GiB."""
        run = self.run(cfg, stage, stage, device)
        run.watch, passes = Watch(device, fake), []
        network = self.network(cfg, filled=not fake)
        with pytest.MonkeyPatch.context() as patch, self.in_fake_tensors(fake, patch, passes):
            patch.setattr(warmup, "build_segmenter", lambda **_: network)
            patch.setattr(selftrain, "load_segmenter", lambda *_: (network, {}))
            # pseudo-labels are read back and written to files, before training begins
            for name in ("label_target", "class_means_of_source"):
                patch.setattr(selftrain, name, lambda *_: iter(()))
            patch.setattr(selftrain, "Aligned", lambda *_: lambda i: self.label)
            with run.watch:
                if stage == "warmup":
                    warmup.train(run)
                else:
                    selftrain.train(run, None, self.folder)
        if fake:
            parts = min(cfg.accumulate, 2)
            assert passes == parts * [(device, torch.float32)], "losses of the backward passes"
        return run.watch.peak / 2**30

    def predict(self, cfg, size, precision):
        """Predict an image; return the prediction's device and shape, and the peak in GiB."""
        cfg = Config(cfg, precision=precision)
        run = self.run(cfg, "evaluate", "evaluation", "cuda")
        watch, network = Watch("cuda"), self.network(cfg)
        image = torch.zeros(*size, 3, dtype=torch.uint8)
        sample = {"index": 0, "shape": size, "image": image}
        with pytest.MonkeyPatch.context() as patch, self.in_fake_tensors(True, patch):
            patch.setattr(metrics, "loader", lambda *_: [sample])
            with watch:
                model, options = run.place(network), cfg.evaluation
                made = metrics.predictions(run, model, None, options.scales, options.tile)
                _, labels, _ = next(made)
        return labels.device.type, tuple(labels.shape), watch.peak / 2**30

    @contextlib.contextmanager
    def in_fake_tensors(self, fake, patch, passes=()):
        """Context manager: tensors are fake, and `passes` gets each backward pass's loss."""
        forget_constants()
        tape = Tape(passes)
        if fake:
            patch.setattr(torch.Tensor, "backward", lambda loss: tape.backward(loss))
            patch.setattr(F, "scaled_dot_product_attention", attention)
            # without a GPU, autocast and the gradient scaler would be off
            patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
            patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
        try:
            with contextlib.ExitStack() as modes:
                for mode in (self.fake, tape) if fake else ():
                    modes.enter_context(mode)
                yield
        finally:
            forget_constants()


def forget_constants():
    """Empty the caches of the project's functions, so that no fake constant reaches a real step."""
    for module in list(sys.modules.values()):
        path = getattr(module, "__file__", None) or ""
        if path.startswith(f"{ROOT}/") and "site-packages" not in path:
            for value in vars(module).values():
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()


# ---------------------------------------------------------------- a GPU in fake tensors


class Unfilled(TorchDispatchMode):
    """Mode in which large tensors are not initialised, since that takes seconds for a network."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        in_place = operation.overloadpacket.__name__.endswith("_")
        if in_place and isinstance(args[0], torch.Tensor) and args[0].numel() > 4096:
            return args[0]
        return operation(*args, **(kwargs or {}))


class Watch(TorchDispatchMode):
    """Mode that counts the bytes of live storages on a device and refuses copies to the host."""

    def __init__(self, device, fake=True):
        super().__init__()
        self.device, self.fake, self.known = device, fake, weakref.WeakSet()
        self.now = self.peak = 0

    def add(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operation.overloadpacket.__name__
        if self.fake and name.startswith("_fused_"):
            # fused optimizers change their arguments and allocate nothing; PyTorch has no rule for
            # them in fake tensors, and would run them on real zeros
            assert len({tensor.device for tensor in tensors_of((args, kwargs))}) == 1, name
            return None
        made = operation(*args, **kwargs)
        for tensor in tensors_of(made):
            if tensor.device.type == self.device:
                storage = tensor.untyped_storage()
                if storage not in self.known:
                    self.known.add(storage)
                    self.add(storage.nbytes())
                    weakref.finalize(storage, self.add, -storage.nbytes())
            elif tensor.device.type == "cpu":
                read = {tensor.device.type for tensor in tensors_of((args, kwargs))}
                assert "cuda" not in read, f"{name} copies to the host, which waits for the GPU"
        return made


def tensors_of(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """Replace F.scaled_dot_product_attention: call the kernel that a GPU would use.

    PyTorch selects it by the GPU's model. Without a GPU it falls back to plain matrix products,
    which need far more memory.
    """
    assert not enable_gqa, "not needed so far"
    aten, inputs = torch.ops.aten, (query, key, value)
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        inputs = tuple(tensor.to(dtype) for tensor in inputs)
    if attn_mask is None and inputs[0].dtype != torch.float32:
        kernel, more = aten._scaled_dot_product_flash_attention, ()
    else:
        kernel, more = aten._scaled_dot_product_efficient_attention, (attn_mask, True)
    return kernel(*inputs, *more, dropout_p, is_causal, scale=scale)[0]


class Saved:
    """Holds a tensor for the backward pass until it has been used."""

    def __init__(self, tensor):
        self.tensor = tensor


class Tape(torch.autograd.graph.saved_tensors_hooks):
    """Context manager whose `backward` runs autograd's nodes from Python.

    Autograd's own engine asks the CUDA driver for streams, even for fake tensors. This one needs as
    much memory: it keeps the order of the nodes, frees a node's saved tensors after the node, and
    adds gradients in place where it can. passes: list that gets each loss's (device, dtype).
    """

    def __init__(self, passes):
        super().__init__(self.pack, self.unpack)
        self.passes, self.saved, self.used = passes, weakref.WeakSet(), []

    def pack(self, tensor):
        saved = Saved(tensor)
        self.saved.add(saved)
        return saved

    def unpack(self, saved):
        self.used.append(saved)
        return saved.tensor

    def free(self, saved):
        for one in saved:
            one.tensor = None

    @torch.no_grad()
    def backward(self, loss):
        self.passes.append((loss.device.type, loss.dtype))
        root, number = loss.grad_fn, itertools.count()
        waiting = edges_to_nodes(root)
        gradients = {root: {0: torch.ones_like(loss)}}  # node -> index of an output -> gradient
        ready = [(-root._sequence_nr(), next(number), root)]  # the youngest node runs first
        while ready:
            *_, node = heapq.heappop(ready)
            made = self.run(node, gradients.pop(node, {}), gradients)
            for k, (below, place) in enumerate(node.next_functions):
                if below is None:
                    continue
                if made[k] is not None:
                    gradient, made[k] = fitted(made[k], below._input_metadata[place]), None
                    there = gradients.setdefault(below, {})
                    if place in there:
                        gradient = added(there.pop(place), gradient, [gradients, made])
                    there[place] = gradient
                    del gradient
                waiting[below] -= 1
                if not waiting[below]:
                    heapq.heappush(ready, (-below._sequence_nr(), next(number), below))
        self.free(self.saved)

    def run(self, node, above, gradients):
        """Return the gradients of a node's inputs. above: index of an output -> its gradient.

        At a parameter, the gradient goes to its `grad`. gradients: those of all other nodes.
        """
        edges = len(node.next_functions)
        if not above:
            return [None] * edges
        if type(node).__name__ == "AccumulateGrad":
            leaf, gradient = node.variable, above.pop(0)
            if leaf.grad is not None:
                leaf.grad.add_(gradient)
            else:
                leaf.grad = gradient.clone() if is_held(gradient, gradients) else gradient
            return []
        of_python = isinstance(node, torch.autograd.function.BackwardCFunction)
        call = node.apply if of_python else node
        made = call(*[above.pop(k, None) for k in range(len(node._input_metadata))])
        self.free(self.used)
        self.used.clear()
        made = list(made) if isinstance(made, tuple) else [made]
        return made + [None] * (edges - len(made))


def edges_to_nodes(root):
    """Return {node: number of edges that lead to it} for the graph of the node `root`."""
    edges, found = {root: 0}, [root]
    while found:
        for node, _ in found.pop().next_functions:
            if node is not None:
                if node not in edges:
                    edges[node] = 0
                    found.append(node)
                edges[node] += 1
    return edges


def fitted(gradient, metadata):
    """Return a gradient in the shape and dtype of its tensor, which may have been broadcast."""
    if gradient.shape != metadata.shape:
        gradient = gradient.sum_to_size(metadata.shape)
    assert gradient.device == metadata.device, f"{gradient.device}, not {metadata.device}"
    return gradient.to(metadata.dtype)


def added(there, gradient, others):
    """Return there + gradient, in place unless one of the `others` shares there's memory."""
    in_place = 0 not in there.stride() and not is_held(there, others)
    return there.add_(gradient) if in_place else there + gradient


def is_held(tensor, others):
    """Return whether one of the `others` shares this tensor's memory."""
    data = tensor.untyped_storage()._cdata
    return any(other.untyped_storage()._cdata == data for other in tensors_of(others))


# ---------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return Project(tmp_path_factory.mktemp("device"))


@pytest.fixture(scope="module")
def peak(project):
    """Return peak(path, stage, "key=value", ...): a step's peak memory in GiB, measured once."""
    return functools.cache(
        lambda path, stage, *overrides: project.step(project.config(path, *overrides), stage)
    )


@pytest.mark.parametrize(("path", "stage"), STEPS)
def test_a_step_of_a_shipped_configuration_mixes_no_devices_and_reads_nothing_back(
    peak, path, stage
):
    """Forward and backward pass, optimizer, teacher and centroids, at its own crop and batch."""
    assert peak(path, stage) > 0


@pytest.mark.parametrize("stage", ["warmup", "selftrain"])
@pytest.mark.parametrize(
    "options",
    [
        ["precision=fp16", "accumulate=3", "selftrain.labels=online"],
        ["precision=fp32", "supervised=ohem", "model.auxiliary=0.1"],
    ],
    ids=" ".join,
)
def test_a_step_with_other_settings_mixes_no_devices_and_reads_nothing_back(peak, options, stage):
    """Gradient scaler, accumulation, single precision, and losses that config.yaml has not."""
    assert peak("config.yaml", stage, *options) > 0


@pytest.mark.parametrize(("stage", "gib"), [("warmup", 11.46), ("selftrain", 16.84)])
def test_the_memory_of_a_step_with_the_papers_settings(peak, stage, gib):
    """A tensor kept alive for too long, or a pass in the wrong precision, changes it."""
    assert peak("config.yaml", stage) == pytest.approx(gib, rel=0.05)


@pytest.mark.parametrize(("path", "stage"), STEPS)
def test_a_shipped_configuration_fits_into_24_gb(peak, path, stage):
    """With the batch, sizes and `accumulate` that its file states."""
    assert peak(path, stage) < LIMIT


@pytest.mark.parametrize(("path", "stage"), STEPS)
def test_a_shipped_configuration_states_the_memory_that_it_needs(peak, path, stage):
    """The file's comment says what the allocator reserves, within 10%."""
    text = (ROOT / path).read_text(encoding="utf-8")
    name = {"warmup": "warm-up", "selftrain": "self-training"}[stage]
    stated = re.search(rf"^# Memory:.*?([\d.]+) GiB {name}", text, re.MULTILINE)
    needed = RESERVED * peak(path, stage)
    assert stated, f"{path} has no line '# Memory: {needed:.1f} GiB {name} ...'"
    assert float(stated[1]) == pytest.approx(needed, rel=0.1, abs=0.1)


@pytest.mark.parametrize("stage", ["warmup", "selftrain"])
def test_fake_memory_is_real_memory(project, stage):
    """The other tests' figures are what real tensors and autograd's own engine need."""
    cfg = project.config("config.yaml", "model.network=resnet18", "crop=[64,128]")
    fake, real = (project.step(cfg, stage, "cpu", fake=fake) for fake in (True, False))
    assert fake == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("path", CONFIGS)
def test_a_large_image_is_predicted_by_every_shipped_configuration(project, path, precision):
    """In windows, on the GPU, at the image's size, and within the memory of a small GPU."""
    device, shape, gib = project.predict(project.config(path), LARGE, precision)
    assert (device, shape) == ("cuda", LARGE)
    assert gib < LIMIT


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (lambda x: x.sum().item(), DataDependentOutputException),
        (lambda x: bool(x.any()), DataDependentOutputException),
        (lambda x: x[x > 0], DynamicOutputShapeException),
        (lambda x: x.cpu(), AssertionError),
        (lambda x: torch.zeros(3).copy_(x), AssertionError),
        (lambda x: x + torch.zeros(3), RuntimeError),
        (lambda x: torch.cat([x, torch.zeros(3)]), RuntimeError),
    ],
    ids=["item", "bool", "mask", "cpu", "copy", "add", "cat"],
)
def test_reading_back_and_mixing_devices_are_errors(project, wrong, error):
    """So that the tests above would fail if a step did one of these."""
    with (
        pytest.MonkeyPatch.context() as patch,
        project.in_fake_tensors(True, patch),
        Watch("cuda"),
        pytest.raises(error),
    ):
        wrong(torch.zeros(3, device="cuda"))


def test_the_backward_pass_in_python_gives_autograds_gradients():
    """For shared, broadcast and converted tensors, and a function that is written in Python."""

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, above):
            return 2 * ctx.saved_tensors[0] * above

    torch.manual_seed(0)
    convolution, norm = torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.BatchNorm2d(4)
    scale, frozen = torch.nn.Parameter(torch.rand(4, 1, 1)), torch.rand(4, 1, 1)
    leaves = [*convolution.parameters(), *norm.parameters(), scale]

    def loss(images):
        with torch.autocast("cpu", torch.bfloat16):
            x = convolution(images)
            x = (norm(convolution(x)) + x + x).relu()  # a residual block
            x = torch.cat([x * scale, Square.apply(x), x + frozen + scale], 1)
        first, second = x.float().chunk(2)
        return first.softmax(1).log().mean() + (second.amax(1) * second.sum(1)).mean()

    def gradients(passes):
        for images in torch.rand(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(1)):
            passes(loss(images))
        answer = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        return answer

    expected = gradients(torch.Tensor.backward)
    tape = Tape([])
    with tape:
        torch.testing.assert_close(gradients(tape.backward), expected)
