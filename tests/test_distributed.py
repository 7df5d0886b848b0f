"""Several processes against one: equal numbers, one message, one end. On a CPU, over gloo."""

import copy
import functools
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torchvision
from conftest import FORKS, ROOT, into_files, log, same, state
from engine.run import Run
from torch import nn

import models
from datasets import Images, Whole
from engine import processes
from engine.command import command
from metrics import ConfusionMatrix, predictions
from settings import load_config

GO_ON = "the same command goes on from the last checkpoint"


def process(number, count, port, out, work, *arguments):
    """Be one process of `count`, as torchrun would have set it up; its output goes to files."""
    if count > 1:
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    into_files(f"{out}.{number}")
    work(*arguments)


def together(count, out, work, *arguments):
    """Run `work` in `count` processes; return their exit codes and all their stdout and stderr."""
    # torchrun has the store, not the first process
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    workers = [
        FORKS.Process(target=process, args=(number, count, store.port, out, work, *arguments))
        for number in range(count)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        worker.kill()
    out, err = (
        "".join(Path(f"{out}.{n}.{stream}").read_text() for n in range(count)) for stream in (1, 2)
    )
    return [worker.exitcode for worker in workers], out, err


def stage(script, arguments, signal_at=None, plain=False):
    """Run a script's command.

    signal_at: (step, number) of a signal that the last process alone gets, in the last part of that
    step, counted from 1. plain: no batch norm and no dropout.
    """
    if plain:
        norm = functools.partial(nn.GroupNorm, 4)
        get_model = functools.partial(torchvision.models.get_model, norm_layer=norm)
        torchvision.models.get_model = get_model
        models.Head = functools.partial(models.Head, dropout=0)
    losses, original = [], Run.log

    def counted(self, **figures):
        losses.extend([1] * ("loss" in figures))
        is_last = processes.rank() == processes.world() - 1
        is_there = len(losses) == signal_at[0] * self.cfg.accumulate
        if is_last and is_there and "loss" in figures:
            os.kill(os.getpid(), signal_at[1])
        original(self, **figures)

    if signal_at:
        Run.log = counted
    sys.argv = [f"{script}.py", *arguments]
    command(importlib.import_module(script).main)


@pytest.fixture
def stages(dataset):
    """stages(count, script, "key=value", ...) runs a script's command in `count` processes."""

    def call(count, script, *overrides, **options):
        arguments = ["--cfg", str(dataset / "test.yaml"), *map(str, overrides)]
        work = functools.partial(stage, **options)
        return together(count, dataset / "out", work, script, arguments)

    return call


def ok(outcome):
    codes, out, err = outcome
    assert set(codes) == {0}, err
    return out


def files(folder):
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def tensors(tree, prefix=""):
    """Return every tensor of nested dicts and lists, by its path."""
    if isinstance(tree, torch.Tensor):
        return {prefix: tree}
    pairs, found = (), {}
    if isinstance(tree, dict | list):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, part in pairs:
        found |= tensors(part, f"{prefix}/{key}")
    return found


def assert_close(ours, theirs):
    """Integers are equal, and single-precision numbers to 1e-6."""
    ours, theirs = tensors(ours), tensors(theirs)
    assert ours.keys() == theirs.keys()
    for path, tensor in theirs.items():
        torch.testing.assert_close(
            ours[path], tensor, rtol=1e-6, atol=1e-6, msg=lambda text, path=path: f"{path}: {text}"
        )


# ---------------------------------------------------------------- the same numbers


def test_the_gradients_of_any_number_of_processes(stages, dataset):
    """N processes, K parts each, against one process and the whole batch.

    After one step, the optimizer's momentum is the gradient.
    """
    runs = dataset / "runs"
    options = ("warmup.batch=[2,4]", "selftrain.batch=[4,2]", "selftrain.momentum=0.1")
    options += ("bn_recalibrate=[]", "selftrain.rounds=1", "selftrain.diagnose=false")
    options += ("log_every=1", "model.network=resnet18")
    ok(stages(1, "translate_cyclegan", "name=base", *options))
    options += (f"translation.images={runs}/base/translated",)
    ok(stages(1, "warmup", "name=base", *options, plain=True))
    whole = {}
    for count, parts in ((1, 1), (2, 1), (1, 3), (3, 2)):
        name = f"{count}x{parts}"
        for script in ("warmup", "selftrain"):
            arguments = (*options, f"name={name}", f"accumulate={parts}")
            if script == "selftrain":
                arguments += ("--init", runs / "base/warmup.pth")
            stop = (1, signal.SIGTERM)
            codes, _, err = stages(count, script, *arguments, signal_at=stop, plain=True)
            assert set(codes) == {143}, err
            assert err == f"{script}.py: stopped by SIGTERM; {GO_ON}\n"
            saved = state(runs / name / f"{script}.unfinished.pth")
            assert saved["step"] == 1
            figures = log(runs / name)[-1]
            whole.setdefault(script, (saved, figures))
            parts_of_both = ["student", "teacher", "optimizer"]
            for part in parts_of_both + ["centroids"] * (script == "selftrain"):
                assert_close(saved[part], whole[script][0][part])
            for key in ("ce", "kd", "loss"):
                assert figures[key] == pytest.approx(whole[script][1][key], rel=1e-5), key
        assert files(runs / name / "pseudo_labels") == files(runs / "1x1/pseudo_labels")


@pytest.fixture
def both(stages, dataset):
    """both(script, ...) runs it in two processes, and in one that does each batch in two parts.

    Returns the folders of the one, `parts`, and of the two.
    """

    def call(script, *overrides):
        ok(stages(1, script, *overrides, "name=parts", "accumulate=2"))
        ok(stages(2, script, *overrides, "name=two"))
        return dataset / "runs/parts", dataset / "runs/two"

    return call


def test_two_processes_are_two_parts_on_one_bit_for_bit(both):
    """The real networks, with batch norm and dropout, through all stages.

    There are more translations than CycleGAN's pool holds.
    """
    both("translate_cyclegan", "translation.batch=[1,1]", "translation.steps=30")
    both("warmup", "val_every=3")
    both("selftrain", "selftrain.centroids=target")
    one, two = both("evaluate", "evaluation.scales=[1.0, 0.5]")
    for name in ("translator", "warmup", "warmup_best_on_val", "selftrain_round1", "selftrain"):
        a, b = state(one / f"{name}.pth"), state(two / f"{name}.pth")
        for checkpoint in (a, b):
            del checkpoint["config"], checkpoint["inputs"]  # they hold the run's name
        assert same(a, b), name
    for a, b in zip(log(one), log(two), strict=True):
        for different in ("images_per_second", "memory_gb", "seconds"):
            a.pop(different, None)
            b.pop(different, None)
        assert a.pop("stage") == b.pop("stage")
        assert a == pytest.approx(b, rel=1e-5)
    pictures = [written(folder) for folder in (one, two)]
    assert pictures[0] == pictures[1]
    # translations, pseudo-labels, results, predictions and overlays, the comparison
    assert len(pictures[0]) == 6 + 2 * 4 + 1 + 4 * 2 * 2 + 1
    assert not [name for name in files(two) if "unfinished" in name or "partial" in name]


def written(folder):
    """Return the pictures and results in a run's folder, without samples: name -> bytes."""
    found = files(folder)
    names = [name for name in found if name.endswith((".png", ".jpg", "results.json"))]
    return {name: found[name] for name in names if "samples" not in name}


def counts(path, weights, folder):
    """Write a dataset's confusion matrix and the statistics of 3 batches into a process's file."""
    processes.join()
    cfg = load_config(path)
    run = Run(cfg, "evaluate", "evaluation")
    model, matrix = models.load_segmenter(weights, cfg)[0], ConfusionMatrix(3)
    seen = []
    whole = Whole(Images(cfg, "source", True))
    for sample, prediction, _ in predictions(run, copy.deepcopy(model), whole, [1.0]):
        matrix.update(sample["label"], prediction)
        seen.append(sample["index"])
    order = [int(index) for (index,) in processes.in_batch_order((torch.tensor(i),) for i in seen)]
    images = torch.rand(3, 2, 3, 32, 40, generator=torch.Generator().manual_seed(0))

    class Batches:
        def __len__(self):
            return len(images)

        def __iter__(self):
            return iter(images[processes.rank() :: processes.world()])

    models.recalibrate_batchnorm(model, Batches())
    left = {"counts": processes.sum_over_processes(matrix.counts), "seen": seen, "order": order}
    left["statistics"] = dict(model.named_buffers())
    torch.save(left, f"{folder}/{processes.world()}_{processes.rank()}.pth")


def test_evaluation_and_statistics_where_the_images_cannot_be_divided(stages, dataset):
    """6 images and 3 batches for 1, 2 and 4 processes: each image once, the same numbers in all."""
    ok(stages(1, "warmup", "warmup.crdomix=false", "warmup.steps=1"))
    weights = dataset / "runs/test/warmup.pth"
    alone = None
    for world in (1, 2, 4):
        ok(together(world, dataset / "out", counts, dataset / "test.yaml", weights, dataset))
        found = [state(dataset / f"{world}_{rank}.pth") for rank in range(world)]
        alone = alone or found[0]
        assert sorted(i for part in found for i in part["seen"]) == list(range(6))
        for part in found:
            assert part["order"] == list(range(6))
            assert torch.equal(part["counts"], alone["counts"])
            assert_close(part["statistics"], alone["statistics"])
    assert alone["counts"].sum() > 0


def normalised(folder, compiled):
    """Write outputs, gradients and statistics of two batch norms into a process's file."""
    processes.join()
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [nn.Conv2d(8, 40, 1, bias=False), nn.BatchNorm2d(40), nn.Conv2d(40, 4, 1)]
    network = nn.Sequential(*layers)
    network[1].requires_grad_(False)
    for norm in (network[1], network[4]):
        nn.init.normal_(norm.weight)
    images, above = 3 * torch.randn(4, 3, 17, 19) + 5, torch.randn(4, 4, 15, 17)
    share = slice(processes.rank(), None, processes.world())  # some of the images
    x = images[share].to(memory_format=torch.channels_last).requires_grad_()
    forward = processes.synchronise_batchnorm(network)
    mean = processes.GradientMean(network) if processes.world() > 1 else None
    if compiled:
        forward = torch.compile(network, fullgraph=True, backend="aot_eager")
    if mean:
        mean.begin()
    out = forward(x)
    (out * above[share]).sum().mul(processes.world()).backward()
    if mean:
        mean.finish()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    left = {"out": out.detach(), "x": x.grad / processes.world(), "gradients": gradients}
    left["buffers"] = dict(network.named_buffers())
    torch.save(left, f"{folder}/norm_{processes.world()}_{processes.rank()}.pth")


@pytest.mark.core
@pytest.mark.parametrize("compiled", [False, True])
def test_batch_norm_over_two_processes_is_that_of_one_with_all_images(dataset, compiled):
    """Outputs, gradients, running statistics; captured by the compiler as one graph."""
    for world in (1, 2):
        ok(together(world, dataset / "out", normalised, dataset, compiled))
    one, *two = (state(dataset / f"norm_{name}.pth") for name in ("1_0", "2_0", "2_1"))
    for rank, part in enumerate(two):
        for name in ("out", "x"):
            torch.testing.assert_close(part[name], one[name][rank::2], rtol=1e-4, atol=1e-4)
        for name, gradient in one["gradients"].items():
            assert (part["gradients"][name] - gradient).norm() < 1e-5 * gradient.norm(), name
        for name, value in one["buffers"].items():
            torch.testing.assert_close(part["buffers"][name], value, rtol=1e-5, atol=1e-6)


def mean_gradients(folder):
    """Write the averaged gradients of a network into a process's files.

    A layer of it is not used. The buckets are of one parameter, and of all.
    """
    processes.join()
    for bucket in (1, 10**6):
        torch.manual_seed(0)
        layers = [nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(7, 7), nn.Conv2d(3, 2, 3)]
        network = nn.ModuleList(layers)
        network.to(memory_format=torch.channels_last)
        mean = processes.GradientMean(network, bucket)
        torch.manual_seed(1 + processes.rank())
        for last in (False, True):  # two parts, of which the second ends the step
            if last:
                mean.begin()
            outputs = network[1](network[0](torch.randn(6, 5))), network[3](torch.randn(1, 3, 8, 8))
            sum(output.square().sum() for output in outputs).backward()
            if not last:
                kept = gradients(network)
        # in buckets of one parameter, some of them are averaged by now
        left = {"kept": kept, "alone": gradients(network) if bucket > 1 else None}
        mean.finish()
        left["found"] = gradients(network)
        torch.save(left, f"{folder}/mean_{bucket}_{processes.rank()}.pth")


def gradients(network):
    return [p.grad.clone() for p in network.parameters() if p.grad is not None]


@pytest.mark.core
def test_gradients_are_averaged_in_buckets_of_any_size(dataset):
    ok(together(2, dataset / "out", mean_gradients, dataset))
    single = [state(dataset / f"mean_1_{rank}.pth") for rank in (0, 1)]
    whole = [state(dataset / f"mean_{10**6}_{rank}.pth") for rank in (0, 1)]
    assert len(whole[0]["found"]) == 6
    for k in range(6):
        expected = (whole[0]["alone"][k] + whole[1]["alone"][k]) / 2
        for part in (*single, *whole):
            torch.testing.assert_close(part["found"][k], expected)
        # a part that is not the last stays apart
        assert not torch.equal(single[0]["kept"][k], single[1]["kept"][k])


# ---------------------------------------------------------------- one voice


def test_an_error_is_told_once(stages, dataset):
    codes, _, err = stages(2, "warmup", "warmup.crdomix=false", "warmup.batch=[1,2]")
    assert codes == [2, 2]
    assert len(err.splitlines()) == 1
    assert "warmup.batch = [1, 2]: the 3 images of a step cannot be divided into 2 equal" in err
    assert not (dataset / "runs").exists()


def test_an_error_in_one_process_ends_all(stages, dataset):
    """A broken image, which only the process that draws it meets."""
    ok(stages(1, "translate_cyclegan"))
    (dataset / "runs/test/translated/00003.jpg").write_bytes(b"no image")
    started = time.monotonic()
    codes, _, err = stages(2, "warmup", "workers=1")
    assert sorted(codes) == [1, 2], err
    assert len(err.splitlines()) == 1, err
    assert "00003.jpg: is broken" in err
    assert time.monotonic() - started < 60


def test_without_torchrun_there_is_no_group(run):
    assert run("warmup", "warmup.crdomix=false")[0] == 0
    assert not dist.is_initialized()
    assert (processes.world(), processes.rank()) == (1, 0)


# ---------------------------------------------------------------- the death of one

LOST = f"warmup.py: another process of this job has died or cannot be reached; {GO_ON}"


def test_a_killed_process_ends_the_others_and_is_made_up_for(stages, dataset):
    """Killed in step 10 of two processes; the rest of the steps by one, in as many parts."""
    options = ("warmup.crdomix=false", "warmup.steps=12", "save_every=4", "workers=1")
    runs = dataset / "runs"
    ok(stages(1, "warmup", *options, "name=undisturbed", "accumulate=2"))
    started = time.monotonic()
    codes, _, err = stages(2, "warmup", *options, signal_at=(10, signal.SIGKILL))
    assert (codes, err) == ([1, -signal.SIGKILL], LOST + "\n")
    assert time.monotonic() - started < 60
    assert state(runs / "test/warmup.unfinished.pth")["step"] == 8
    ok(stages(1, "warmup", *options, "accumulate=2"))
    found, undisturbed = (state(runs / name / "warmup.pth") for name in ("test", "undisturbed"))
    assert all(same(found[part], undisturbed[part]) for part in ("student", "teacher"))


def test_torchrun_restarts_a_killed_process_and_the_others(stages, dataset):
    """The first process, which holds the folder's lock, is killed after a checkpoint.

    The job ends as if it had not been.
    """
    options = ("warmup.crdomix=false", "warmup.steps=16", "save_every=4", "workers=1")
    runs = dataset / "runs"
    ok(stages(1, "warmup", *options, "name=undisturbed", "accumulate=2"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc_per_node=2", "--max_restarts=1"]
    warmup = [str(ROOT / "warmup.py"), "--cfg", str(dataset / "test.yaml"), *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    pipes |= {"cwd": dataset, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    agent = subprocess.Popen([*torchrun, *warmup], **pipes)
    while not (runs / "test/warmup.unfinished.pth").exists() and agent.poll() is None:
        time.sleep(0.02)
    first = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()[0]
    os.kill(int(first), signal.SIGKILL)
    _, err = agent.communicate(timeout=120)
    assert agent.returncode == 0, err
    assert [line for line in err.splitlines() if line.startswith("warmup.py")] == [LOST]
    found, undisturbed = (state(runs / name / "warmup.pth") for name in ("test", "undisturbed"))
    assert all(same(found[part], undisturbed[part]) for part in ("student", "teacher"))
