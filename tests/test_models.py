"""Networks against torchvision's own, the teacher, batch-norm recalibration, optimizers."""

import copy

import pytest
import torch
import torchvision
from conftest import CLASSES, LONG
from torch import nn

import models
from engine.config import Config, UserError
from translate_cyclegan import Discriminator


def images(n=2, size=(65, 97)):
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(0))


def segmenter(network="resnet18", stride=8, **more):
    torch.manual_seed(0)
    return models.build_segmenter(network, 5, output_stride=stride, channels=32, **more)


OPTIMIZER = {"name": "sgd", "lr_backbone": 7.5e-4, "lr_head": 2.5e-3, "layer_decay": 1.0}
OPTIMIZER |= {"momentum": 0.9, "weight_decay": 5e-4}
NETWORKS = ["resnet18", "resnet50", "mobilenet_v2", "deeplab_v2_resnet101"]


@pytest.mark.parametrize("network", NETWORKS)
def test_output_stride_and_normalisation(network):
    normalised = torchvision.transforms.functional.normalize(
        images(1), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    )
    for stride in (8, 16) if LONG or network != "deeplab_v2_resnet101" else (8,):
        model = segmenter(network, stride).eval()
        with torch.no_grad():
            logits, features, _ = model(images(1, (64, 96)))
            # a multiple of the stride, plus the row that the ceil-mode pooling of DeepLab-V2 adds
            extra = int(network.startswith("deeplab"))
            assert logits.shape == (1, 5, 64 // stride + extra, 96 // stride + extra)
            assert features.shape == (1, 32, *logits.shape[2:])
            expected = model.head(model.backbone(normalised))
            torch.testing.assert_close(model(images(1))[1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [8, 16])
def test_backbone_is_torchvisions_dilated_resnet_up_to_the_dilation_of_two_blocks(stride):
    dilated = [False, stride == 8, True]
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=dilated).eval()
    ours = models.build_segmenter("resnet50", 5, stride, 32).backbone.eval()
    weights = {k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    models.load_exactly(ours, weights, "test")
    # torchvision gives the first block of a dilated stage the dilation of the stage before it;
    # DeepLab-V2 does not
    stages = {8: ((theirs.layer3, 2), (theirs.layer4, 4)), 16: ((theirs.layer4, 2),)}
    for stage, dilation in stages[stride]:
        stage[0].conv2.dilation = stage[0].conv2.padding = (dilation, dilation)
    with torch.no_grad():
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images()))))
        expected = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(x))))
        torch.testing.assert_close(ours(images()), expected)


def test_deeplab_freezes_the_batch_norms_scale_and_shift_but_not_their_statistics():
    model = segmenter("deeplab_v2_resnet101").train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 104
    assert not any(p.requires_grad for norm in norms for p in norm.parameters())
    before = norms[-1].running_mean.clone()
    model(images())
    assert not torch.equal(before, norms[-1].running_mean)
    optimizer = models.build_optimizer(model, Config(OPTIMIZER))
    assert [group["base_lr"] for group in optimizer.param_groups] == [7.5e-4, 2.5e-3]
    trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert len(optimizer.param_groups[0]["params"]) == 104


def test_the_rate_of_a_transformer_decays_by_block():
    model = segmenter("smp/DPT/tu-vit_small_patch16_dinov3.lvd1689m")
    rates = {"name": "adamw", "lr_backbone": 1e-4, "lr_head": 1e-3, "layer_decay": 0.5}
    optimizer = models.build_optimizer(model, Config(OPTIMIZER | rates))
    rate_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        words, expected = name.split("."), 1e-3
        if name.startswith("backbone.model.blocks."):
            expected = 1e-4 * 0.5 ** (11 - int(words[3]))
        elif words[0] == "backbone":
            expected = 1e-4 if words[2] == "norm" else 1e-4 * 0.5**12
        assert rate_of[id(p)] == pytest.approx(expected, rel=1e-12), name
    assert len(rate_of) == sum(1 for _ in model.parameters())


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "encoder."])
def test_weights_in_the_wrappers_that_projects_put_around_them(tmp_path, prefix):
    theirs = torchvision.models.resnet18().state_dict()
    wrapped = {f"{prefix}{key}": value for key, value in theirs.items()}
    wrapped |= {f"{prefix}head.weight": torch.zeros(3), f"{prefix}fc.bias": torch.zeros(2)}
    wrapped |= {"decode_head.conv_seg.weight": torch.zeros(19)} if prefix else {}
    named = {"state_dict": wrapped, "arch": "resnet18", "optimizer": {"state": {}}}
    for file in (wrapped, {"model": wrapped}, {"student": wrapped, "teacher": wrapped}, named):
        torch.save(file, tmp_path / "weights.pth")
        backbone = segmenter(weights=str(tmp_path / "weights.pth")).backbone.state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in backbone.items())


def test_weights_that_do_not_fit_are_named(tmp_path):
    path = tmp_path / "weights.pth"

    def load(state):
        torch.save(state, path)
        segmenter(weights=str(path))

    state = torchvision.models.resnet18().state_dict()
    first = state.pop("layer1.0.conv1.weight")
    with pytest.raises(UserError, match=r"does not fit.*Missing key.*layer1\.0\.conv1"):
        load(state)
    with pytest.raises(UserError, match=r"Unexpected key.*layer1\.2"):
        load(torchvision.models.resnet34().state_dict())
    with pytest.raises(UserError, match=r"size mismatch for layer1\.0\.conv1\.weight"):
        load(state | {"layer1.0.conv1.weight": torch.zeros(1)})
    with pytest.raises(UserError, match=r"not finite in layer1\.0\.conv1\.weight"):
        load(state | {"layer1.0.conv1.weight": first / 0})
    path.write_text("<!DOCTYPE html>")  # a login page in place of a download
    with pytest.raises(UserError, match=r"weights\.pth: is no checkpoint.*DOCTYPE"):
        segmenter(weights=str(path))


def test_a_network_of_other_classes_is_refused(finished, config):
    path = finished / "warmup.pth"
    names = list(CLASSES)
    assert models.load_segmenter(path, config())[0] is not None
    turned = config(f"classes={[names[1], names[0], names[2]]}")
    with pytest.raises(UserError, match="other classes, in another order: road, car, sky; set"):
        models.load_segmenter(path, turned)
    with pytest.raises(UserError, match="other classes: road, car, sky; set"):
        models.load_segmenter(path, config(f"classes={names[:2]}", "source.ids=cityscapes"))


def test_ema_moves_parameters_and_copies_buffers():
    student = segmenter().train()
    teacher = models.make_teacher(student)
    old = {name: p.clone() for name, p in teacher.named_parameters()}
    with torch.no_grad():
        student(images())
        for p in student.parameters():
            p.add_(torch.randn(p.shape))
    models.ema_update(teacher, student, 99, limit=0.9)
    new = dict(student.named_parameters())
    for name, p in teacher.named_parameters():
        torch.testing.assert_close(p, 0.9 * old[name] + 0.1 * new[name])
    for (name, ours), theirs in zip(teacher.named_buffers(), student.buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    models.ema_update(teacher, student, 0)
    pairs = zip(teacher.parameters(), student.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_teacher_uses_batch_statistics_keeps_its_own_and_drops_nothing():
    student = segmenter().train()
    teacher = models.make_teacher(student)
    before = copy.deepcopy(dict(teacher.named_buffers()))
    with torch.no_grad():
        first, second = teacher(images())[0], teacher(images())[0]
        plain = copy.deepcopy(student).train()
        plain.head.dropout.eval()
        assert torch.equal(first, second)
        torch.testing.assert_close(first, plain(images())[0])
        assert not torch.allclose(first, copy.deepcopy(student).eval()(images())[0], atol=1e-3)
        # in the student, dropout is at work
        assert not torch.equal(student(images())[0], student(images())[0])
    for name, buffer in teacher.named_buffers():
        if "num_batches" not in name:
            assert torch.equal(buffer, before[name]), name
    assert not any(p.requires_grad for p in teacher.parameters())


def test_recalibration_is_the_plain_average_over_the_batches():
    model = segmenter().train()
    batches = [images(2), images(2).flip(0) * 0.5, images(2) ** 2]
    norm, seen = model.backbone.bn1, []
    hook = norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    models.recalibrate_batchnorm(model, batches)
    hook.remove()
    mean = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    variance = torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)
    assert not model.training
    assert norm.momentum == 0.1


# ---------------------------------------------------------------- CycleGAN


def test_the_discriminator_judges_70x70_patches():
    judge = Discriminator(4)
    x = torch.rand(1, 3, 128, 128, requires_grad=True)
    scores = judge(x)
    assert scores.shape == (1, 1, 14, 14)
    layers = nn.Sequential(*(layer for layer in judge if not isinstance(layer, nn.InstanceNorm2d)))
    layers(x)[0, 0, 7, 7].backward()
    rows = x.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert rows[-1] - rows[0] + 1 == 70


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_first_step_that_fp16_skips_leaves_no_trace(name):
    rates = {"name": name, "lr_backbone": 0.1, "lr_head": 0.1, "weight_decay": 0.01}
    found = []
    for skipped in (True, False):
        model = segmenter("mobilenet_v2")
        # what an earlier tensor leaves in memory that is not initialised
        garbage = [torch.full_like(p, float("nan")) for p in model.parameters()]
        optimizer = models.build_optimizer(model, Config(OPTIMIZER | rates))
        scaler = torch.amp.GradScaler("cpu")
        del garbage
        for gradient in [float("inf")] * skipped + [1.0, -0.5]:
            for p in model.parameters():
                p.grad = torch.full_like(p, gradient) * scaler.scale(torch.ones(()))
            scaler.step(optimizer)
            scaler.update()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.isfinite(found[0]).all()
    torch.testing.assert_close(*found, rtol=0, atol=0)
