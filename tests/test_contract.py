"""Checkpoints of commit 79179de, by names, shapes and types alone, load and continue."""

import hashlib
import json

import numpy as np
import torch
from conftest import ROOT, log, ok, save, state

import models

CONTRACT = json.loads((ROOT / "tests/checkpoint_contract.json").read_text())


def built(entry, name=""):
    """Return an entry of the contract, with random numbers in its tensors."""
    if isinstance(entry, dict):
        return {int(k) if k.isdigit() else k: built(v, k) for k, v in entry.items()}
    if isinstance(entry, list):
        return [built(value) for value in entry]
    kind, *words = entry.split() if isinstance(entry, str) else [None]
    if kind == "shared":
        return built(CONTRACT["shared"][words[0]])
    if kind != "tensor":
        return entry
    tensor = torch.full(list(map(int, words[1:])), 2, dtype=getattr(torch, words[0]))
    if name == "step" or not tensor.is_floating_point():
        return tensor
    values = 0.05 * torch.randn(tensor.shape)
    return 1 + values if name.endswith(("_var", "_sq")) else values


def write(folder, name, inputs=()):
    """Write a checkpoint of the contract, as if it was made with the `inputs` in its folder."""
    torch.manual_seed(0)
    tree = built(CONTRACT["files"][name])
    assert tree["inputs"].keys() == set(inputs)
    for path in inputs:
        tree["inputs"][path] = hashlib.sha256((folder / path).read_bytes()).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tree, folder / name)
    return tree


def continued(folder, stage, before, total):
    """Assert that the stage ended, from the steps and the sums of the checkpoint `before`."""
    *lines, finished = [line for line in log(folder) if line["stage"] == stage]
    assert finished["finished"] == total == state(folder / f"{stage}.pth")["step"]
    (above, done), first = before["overall"]["loss"], before["step"]
    assert done == first < lines[0]["step"]
    for line in lines:
        above, first = above + (line["step"] - first) * line["loss"], line["step"]
    np.testing.assert_allclose(finished["loss"], above / total, rtol=1e-4)
    assert finished["seconds"] >= before["seconds"]


def test_checkpoints_of_79179de_load_and_continue(dataset, run):
    folder = dataset / "runs/test"
    before = write(folder, "translator.unfinished.pth")
    ok(run("translate_cyclegan"))
    continued(folder, "translator", before, 4)

    before = write(folder, "warmup.unfinished.pth", ["translator.pth"])
    ok(run("warmup"))
    continued(folder, "warmup", before, 6)

    tree = write(folder, "warmup.pth", ["translator.pth"])
    for which in ("student", "teacher"):
        network = models.load_segmenter(folder / "warmup.pth", None, which)[0]
        ours = network.state_dict()
        assert list(ours) == list(tree[which])
        assert all(torch.equal(value, tree[which][key]) for key, value in ours.items())
    assert "is finished" in ok(run("warmup"))

    for i in range(4):
        path = folder / f"pseudo_labels/round1/a/a_{i}_leftImg8bit.png"
        save(path, np.zeros((48, 64), np.uint8))
    before = write(folder, "selftrain.unfinished.pth", ["translator.pth", "warmup.pth"])
    ok(run("selftrain", "selftrain.rounds=1"))
    continued(folder, "selftrain", before, 4)
    ok(run("evaluate"))
