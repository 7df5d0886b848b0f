"""Weights of other projects: what tools.convert writes gives what their own code computes."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import ROOT, ok, picture, refused
from golden.authors_state_dict import authors_state_dict

import models
from engine.config import UserError
from engine.images import read_image
from tools.convert import BGR_MEAN, authors_translator, cyclegan
from translate_cyclegan import Generator

GOLDEN = ROOT / "tests/golden"
CFG = ("--cfg", ROOT / "config.yaml")


def test_the_authors_student_gives_the_authors_output(run, tmp_path):
    state = authors_state_dict(GOLDEN / "authors_student_keys.json")
    torch.save(state, tmp_path / "student.pth")
    files = tmp_path / "student.pth", "--out", tmp_path / "ours.pth"
    with pytest.raises(UserError, match=r"no segmentation network.*tools/convert\.py makes one"):
        models.load(files[0])
    ok(run("tools.convert", "student", *files, *CFG))
    model = models.load(tmp_path / "ours.pth").network
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}" == "65.06"
    data = np.load(GOLDEN / "authors_network.npz")
    # their input is BGR, less a mean, over 128; ours is the picture itself, RGB in [0, 1]
    image = torch.from_numpy(data["image"]).flip(1) * model.std + model.mean
    with torch.no_grad():
        logits, features, _ = model(image)
    for ours, name in ((logits, "logits"), (features, "features")):
        theirs = torch.from_numpy(data[name])
        atol = 1e-5 * theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=atol)

    state["layer9.0.weight"] = state.pop("layer1.0.conv2.weight")
    torch.save(state, tmp_path / "student.pth")
    refused(run("tools.convert", "student", *files, *CFG), "backbone.layer1.0.conv2.weight")


def test_backbones_of_old_deeplab_and_of_simclr(run, tmp_path):
    torch.manual_seed(0)
    plain = torchvision.models.resnet50(weights=None).state_dict()
    simclr = {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in plain.items()}}
    kept = [key for key in plain if "num_batches" not in key and not key.startswith("fc.")]
    old = {f"Scale.{key}": plain[key] for key in kept}
    old["Scale.layer5.conv2d_list.0.weight"] = torch.zeros(19, 2048, 3, 3)
    networks = {}
    for name, state in (("plain", plain), ("simclr", simclr), ("old", old)):
        out = str(tmp_path / f"{name}.pth")
        torch.save(state, out)
        if name == "old":
            ok(run("tools.convert", "backbone", out, "--out", out, *CFG))
        networks[name] = models.build_segmenter("resnet50", 3, weights=out).eval()
    image = torch.rand(1, 3, 48, 64)
    bgr = image.flip(1) * 255 - torch.tensor(BGR_MEAN)[:, None, None]

    def through(network):
        return network.backbone((image - network.mean) / network.std)

    with torch.no_grad():
        assert torch.equal(through(networks["plain"]), through(networks["simclr"]))
        expected = networks["plain"].backbone(bgr)
        error = (through(networks["old"]) - expected).abs().max()
    assert error < 1e-4 * expected.abs().max()
    torch.save({"weight": torch.zeros(1)}, tmp_path / "theirs.pth")
    given = "tools.convert", "backbone", tmp_path / "theirs.pth", "--out", tmp_path / "none.pth"
    refused(run(*given, *CFG), "holds no ResNet")


def test_the_authors_translator(dataset, run):
    """Against the layers written out one after the other, by the names in their files."""
    shapes = json.loads((GOLDEN / "authors_translator_keys.json").read_text())
    folder = dataset / "translator"
    folder.mkdir()
    torch.manual_seed(0)
    files = {}
    for name, keys in shapes.items():
        files[name] = {key: 0.05 * torch.randn(shape) for key, shape in keys.items()}
        torch.save(files[name], folder / f"{name}.pth")

    def conv(x, state, name, stride=1, norm=True, relu=True):
        weight = state[f"{name}.conv.weight"]
        x = F.pad(x, [(weight.shape[-1] - 1) // 2] * 4, mode="reflect")
        x = F.conv2d(x, weight, state[f"{name}.conv.bias"], stride)
        x = F.instance_norm(x) if norm else x
        return x.relu() if relu else x

    def blocks(x, state, name):
        for b in range(4):
            inner = conv(x, state, f"{name}.model.{b}.model.0")
            x = x + conv(inner, state, f"{name}.model.{b}.model.1", relu=False)
        return x

    image = torch.from_numpy(picture(2)[0]).permute(2, 0, 1)[None] / 255
    mean = torch.tensor(BGR_MEAN)[:, None, None]
    enc, dec = files["enc_s"], files["dec_s2t"]
    x = conv((image.flip(1) * 255 - mean) / 128, enc, "model.0")
    x = blocks(conv(conv(x, enc, "model.1", 2), enc, "model.2", 2), enc, "model.3")
    x = blocks(x, dec, "model.0")
    for name in ("model.2", "model.4"):
        x = conv(F.interpolate(x, scale_factor=2), dec, name)
    x = conv(x, dec, "model.5", norm=False, relu=False).tanh()
    expected = ((x * 128 + mean) / 255).clamp(0, 1).flip(1)

    with torch.no_grad():
        ours = authors_translator(folder)(image)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    out = dataset / "by_authors"
    given = "tools.convert", "translator", folder, "--out", out
    ok(run(*given))
    written = read_image(out / "00002.jpg")
    assert np.abs(written - expected[0].permute(1, 2, 0).numpy() * 255).mean() < 4
    ok(run("translate_cyclegan", f"translation.images={out}"))
    shutil.copy(folder / "enc_s.pth", folder / "dec_s2t.pth")
    refused(run(*given), "dec_s2t.pth: does not fit")


def test_a_generator_of_cyclegan(run, dataset):
    generator = Generator(8, 2)
    saved = {f"module.{key}": value for key, value in generator.state_dict().items()}
    saved["module.model.2.running_mean"] = torch.zeros(8)
    with_dropout = {key.replace("block.5", "block.6"): value for key, value in saved.items()}
    path = dataset / "latest_net_G_A.pth"
    image = torch.from_numpy(picture(2)[0]).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        expected = generator(image)
        for file in (with_dropout, saved):
            torch.save(file, path)
            assert torch.equal(cyclegan(path)(image), expected)
    given = "tools.convert", "translator", path, "--out", dataset / "out"
    ok(run(*given))
    written = read_image(dataset / "out/00002.jpg")
    assert np.abs(written - expected[0].permute(1, 2, 0).numpy() * 255).mean() < 4
    torch.save(saved | {"module.model.2.weight": torch.zeros(8)}, path)
    refused(run(*given), "has batch norm")
