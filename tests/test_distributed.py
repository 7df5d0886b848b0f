"""Several processes against one: equal numbers, one end. On a CPU, over gloo."""

import copy
import functools
import importlib
import os
import signal
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
import torchvision
from conftest import FORKS, LONG, files, into_files, log, same, same_networks, state
from torch import nn

import models
from datasets import Images, Whole
from engine import processes
from engine.command import command
from engine.loop import Run
from metrics import ConfusionMatrix, predictions
from settings import load_config


def process(number, count, port, folder, work, *arguments):
    """Be one process of `count`, as torchrun would have set it up; its output goes to files."""
    if count > 1:
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    warnings.simplefilter("error", FutureWarning)  # of what the next torch no longer has
    os.chdir(folder)
    into_files(f"out.{number}")
    work(*arguments)


def together(count, folder, work, *arguments):
    """Run `work` in `count` processes; return their exit codes and all their stdout and stderr."""
    # torchrun has the store, not the first process
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    workers = [
        FORKS.Process(target=process, args=(number, count, store.port, folder, work, *arguments))
        for number in range(count)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        worker.kill()
    out, err = (
        "".join((folder / f"out.{n}.{stream}").read_text() for n in range(count))
        for stream in (1, 2)
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
    parts, original = [], Run.backward

    def counted(self, loss):
        parts.append(loss)
        is_last = processes.rank() == processes.world() - 1
        if is_last and len(parts) == signal_at[0] * self.cfg.accumulate:
            os.kill(os.getpid(), signal_at[1])
        original(self, loss)

    if signal_at:
        Run.backward = counted
    sys.argv = [f"{script}.py", *arguments]
    command(importlib.import_module(script).main)


@pytest.fixture
def stages(dataset):
    """stages(count, script, "key=value", ...) runs a script's command in `count` processes."""

    def call(count, script, *overrides, **options):
        arguments = ["--cfg", "test.yaml", *map(str, overrides)]
        return together(count, dataset, functools.partial(stage, **options), script, arguments)

    return call


def ok(outcome):
    codes, out, err = outcome
    assert set(codes) == {0}, err
    return out


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


def test_the_gradients_of_any_number_of_processes(stages, finished):
    """N processes, K parts each, against one process and the whole batch.

    After one step, the optimizer's momentum is the gradient.
    """
    runs = finished.parent
    options = ("warmup.batch=[2,4]", "selftrain.batch=[4,2]", "selftrain.momentum=0.1")
    options += ("bn_recalibrate=[]", "selftrain.rounds=1", "selftrain.diagnose=false")
    options += ("log_every=1", "model.network=resnet18")
    options += ("translation.images=runs/test/translated",)
    ok(stages(1, "warmup", "name=base", *options, plain=True))
    whole = {}
    for count, parts in ((1, 1), (2, 1), (3, 2)) + ((1, 3),) * LONG:
        name = f"{count}x{parts}"
        for script in ("warmup", "selftrain"):
            arguments = (*options, f"name={name}", f"accumulate={parts}")
            if script == "selftrain":
                arguments += ("--init", runs / "base/warmup.pth")
            stop = (1, signal.SIGTERM)
            codes, _, err = stages(count, script, *arguments, signal_at=stop, plain=True)
            assert set(codes) == {143}, err
            assert err.count(f"{script}.py: stopped by signal 15") == count, err
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
    both("warmup")
    both("selftrain", "selftrain.centroids=target", "selftrain.align_logits=1")
    one, two = both("evaluate", "evaluation.scales=[1.0, 0.5]")
    for name in ("translator", "warmup", "selftrain_round1", "selftrain"):
        a, b = state(one / f"{name}.pth"), state(two / f"{name}.pth")
        for checkpoint in (a, b):
            del checkpoint["config"], checkpoint["inputs"]  # they hold the run's name
        assert same(a, b), name
    for a, b in zip(log(one), log(two), strict=True):
        for different in ("images_per_second", "memory_gb", "seconds", "date"):
            a.pop(different, None)
            b.pop(different, None)
        assert a.pop("stage") == b.pop("stage")
        assert a == pytest.approx(b, rel=1e-5)
    pictures = [written(folder) for folder in (one, two)]
    assert pictures[0] == pictures[1]
    # translations, pseudo-labels, predictions and overlays, results
    assert len(pictures[0]) == 6 + 2 * 4 + 3 * 2 * 2 + 1
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
    models.recalibrate_batchnorm(model, images)
    left = {"counts": processes.sum_over_processes(matrix.counts), "seen": seen, "order": order}
    left["statistics"] = dict(model.named_buffers())
    torch.save(left, f"{folder}/{processes.world()}_{processes.rank()}.pth")


def test_evaluation_and_statistics_where_the_images_cannot_be_divided(finished, dataset):
    """6 images and 3 batches for 1, 2 and 4 processes: each image once, the same numbers in all."""
    alone = None
    for world in (1, 2, 4):
        ok(together(world, dataset, counts, "test.yaml", finished / "warmup.pth", dataset))
        found = [state(dataset / f"{world}_{rank}.pth") for rank in range(world)]
        alone = alone or found[0]
        assert sorted(i for part in found for i in part["seen"]) == list(range(6))
        for part in found:
            assert part["order"] == list(range(6))
            assert torch.equal(part["counts"], alone["counts"])
            assert_close(part["statistics"], alone["statistics"])
    assert alone["counts"].sum() > 0


# ---------------------------------------------------------------- one end


def test_an_error_of_all_processes(stages, dataset):
    codes, _, err = stages(2, "warmup", "warmup.crdomix=false", "warmup.batch=[1,2]")
    assert codes == [2, 2]
    part = "warmup.batch: 3 images a step cannot be divided by 2 processes x accumulate = 1"
    lines = err.splitlines()
    assert len(lines) == 2, err
    assert all(part in line for line in lines), err
    assert not list((dataset / "runs").rglob("*.pth"))


def test_an_error_in_one_process_ends_all(stages, finished):
    """A broken image, which only the process that draws it meets."""
    (finished / "translated/00003.jpg").write_bytes(b"no image")
    codes, _, err = stages(2, "warmup", "workers=1", "--force")
    assert 2 in codes and 0 not in codes, err
    assert "00003.jpg: is broken" in err


OPTIONS = ("warmup.crdomix=false", "warmup.steps=12", "save_every=4", "workers=1")


def test_a_killed_process_ends_the_others_and_is_made_up_for(stages, dataset):
    """Killed in step 10 of two processes; the rest of the steps by one, in as many parts."""
    ok(stages(1, "warmup", *OPTIONS, "name=undisturbed", "accumulate=2"))
    codes, _, _ = stages(2, "warmup", *OPTIONS, signal_at=(10, signal.SIGKILL))
    assert codes[1] == -signal.SIGKILL
    assert codes[0] > 0
    assert state(dataset / "runs/test/warmup.unfinished.pth")["step"] == 8
    ok(stages(1, "warmup", *OPTIONS, "accumulate=2"))
    assert same_networks("runs/test/warmup.pth", "runs/undisturbed/warmup.pth")
