"""tools.convert: the authors' weights and those of other projects, against their own output."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import ROOT, ok, picture, refused
from golden.authors_state_dict import authors_state_dict
from test_golden import equal, golden

import models
from engine.config import UserError
from engine.images import read_image
from translate_cyclegan import load_generator

KEYS = ROOT / "tests/golden/authors_student_keys.json"


def test_the_authors_checkpoint_gives_the_authors_output():
    data = golden("authors_network")
    state = models.from_authors(authors_state_dict(KEYS))
    model = models.build_segmenter("deeplab_v2_resnet101", 19).eval()
    models.load_exactly(model, state, "golden")
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}" == "65.06"
    # their input is BGR, less a mean, over 128; ours is the picture itself, RGB in [0, 1]
    image = data["image"].flip(1) * model.std + model.mean
    with torch.no_grad():
        logits, features, _ = model(image)
    equal(logits, data["logits"])
    equal(features, data["features"])


def test_a_published_generators_layout_loads(tmp_path):
    """The keys and shapes of latest_net_G_A.pth, with the prefix and old statistics it may have."""
    keys = json.loads((ROOT / "tests/golden/published_translator_keys.json").read_text())
    generator = torch.Generator().manual_seed(0)
    state = {key: torch.randn(shape, generator=generator) * 0.02 for key, shape in keys.items()}
    torch.save(state, tmp_path / "plain.pth")
    old = {f"module.{k}": v for k, v in state.items()}
    old["module.model.2.running_mean"] = torch.zeros(64)
    torch.save(old, tmp_path / "old.pth")
    paths = (tmp_path / name for name in ("plain.pth", "old.pth"))
    plain, prefixed = (load_generator(path).eval() for path in paths)
    x = torch.rand(1, 3, 32, 48)
    with torch.no_grad():
        assert torch.equal(plain(x), prefixed(x))
        assert plain(x).shape == x.shape
        assert 0 <= plain(x).min() <= plain(x).max() <= 1
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth: no CycleGAN"):
        load_generator(tmp_path / "other.pth")


def test_the_authors_student_goes_through_the_command_line(dataset, run):
    saved = authors_state_dict(KEYS)
    torch.save(saved, "student.pth")
    more = ("classes=cityscapes", "model.network=deeplab_v2_resnet101", "model.channels=256")
    ok(run("evaluate", "--weights", "student.pth", *more))
    results = json.loads((dataset / "runs/test/results.json").read_text())
    assert list(results) == ["student"]
    saved["layer9.0.weight"] = saved.pop("layer1.0.conv2.weight")
    torch.save(saved, "student.pth")
    refused(run("evaluate", "--weights", "student.pth", *more), "layer1.0.conv2.weight")


def test_backbones_in_the_old_deeplab_and_in_the_simclr_layout(tmp_path):
    torch.manual_seed(0)
    plain = torchvision.models.resnet50(weights=None).state_dict()
    torch.save(plain, tmp_path / "plain.pth")
    simclr = {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in plain.items()}}
    torch.save(simclr, tmp_path / "simclr.pth")
    kept = [key for key in plain if "num_batches" not in key and not key.startswith("fc.")]
    old = {f"Scale.{key}": plain[key] for key in kept}
    old["Scale.layer5.conv2d_list.0.weight"] = torch.zeros(19, 2048, 3, 3)
    torch.save(old, tmp_path / "old.pth")
    networks = {}
    for name in ("plain", "simclr", "old"):
        weights = str(tmp_path / f"{name}.pth")
        networks[name] = models.build_segmenter("resnet50", 3, weights=weights).eval()
    image = torch.rand(1, 3, 48, 64)
    bgr = image.flip(1) * 255 - torch.tensor(models.AUTHORS_BGR_MEAN)[:, None, None]

    def through(network):
        return network.backbone((image - network.mean) / network.std)

    with torch.no_grad():
        assert torch.equal(through(networks["plain"]), through(networks["simclr"]))
        expected = networks["plain"].backbone(bgr)
        error = (through(networks["old"]) - expected).abs().max()
        assert error < 1e-4 * expected.abs().max()
    del old["Scale.layer2.0.conv1.weight"]
    torch.save(old, tmp_path / "old.pth")
    with pytest.raises(models.UserError, match=r"lacks layer2\.0\.conv1\.weight"):
        models.build_segmenter("resnet50", 3, weights=str(tmp_path / "old.pth"))


def test_the_authors_translator(dataset, run):
    """Against the layers written out one after the other, by the names in their files."""
    shapes = json.loads((ROOT / "tests/golden/authors_translator_keys.json").read_text())
    folder = dataset / "translator"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    files = {}
    for name, keys in shapes.items():
        draw = lambda shape: 0.05 * torch.randn(shape, generator=generator)  # noqa: E731
        files[name] = {key: draw(shape) for key, shape in keys.items()}
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
    mean = torch.tensor([104.00698793, 116.66876762, 122.67891434])[:, None, None]
    enc, dec = files["enc_s"], files["dec_s2t"]
    x = conv((image.flip(1) * 255 - mean) / 128, enc, "model.0")
    x = blocks(conv(conv(x, enc, "model.1", 2), enc, "model.2", 2), enc, "model.3")
    x = blocks(x, dec, "model.0")
    for name in ("model.2", "model.4"):
        x = conv(F.interpolate(x, scale_factor=2), dec, name)
    x = conv(x, dec, "model.5", norm=False, relu=False).tanh()
    expected = ((x * 128 + mean) / 255).clamp(0, 1).flip(1)

    with torch.no_grad():
        ours = load_generator(folder)(image)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    ok(run("translate_cyclegan", f"translation.weights={folder}"))
    written = read_image(dataset / "runs/test/translated/00002.jpg")
    assert np.abs(written - expected[0].permute(1, 2, 0).numpy() * 255).mean() < 4
    shutil.copy(folder / "enc_s.pth", folder / "dec_s2t.pth")
    outcome = run("translate_cyclegan", f"translation.weights={folder}", "--force")
    refused(outcome, "dec_s2t.pth: lacks")
