"""The commands, from files to files, on small data: all stages, resuming, results, demo data."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    CLASSES,
    IDS,
    ORACLE,
    ROOT,
    SIZE,
    SOURCE_ONLY,
    Command,
    log,
    ok,
    picture,
    same,
    save,
    state,
)
from engine.run import Run
from engine.signals import Stopped
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate
import losses
import metrics
import models
from datasets import Crops, Images
from engine import device as devices
from engine.command import command
from engine.images import read_image, read_label, write_image
from settings import load_config
from tools import bench, gpu_hour, make_demo_data
from translate_cyclegan import Generator

STAGES = ["source_only", "warmup", "selftrain_round1", "selftrain", "oracle"]


@pytest.mark.core
def test_all_stages_end_to_end(dataset, run, config, monkeypatch):
    folder = dataset / "runs/test"
    ok(run("translate_cyclegan"))
    for i in range(6):
        assert read_image(folder / f"translated/{i:05d}.jpg").shape == (*SIZE, 3)
    assert not np.array_equal(read_image(folder / "translated/00000.jpg"), picture(0)[0])

    ok(run("warmup", "--as", "source_only", *SOURCE_ONLY))
    ok(run("warmup", "val_every=3"))
    ok(run("selftrain", "--init", "warmup.pth"))
    ok(run("warmup", "--as", "oracle", *ORACLE))
    for number in (1, 2):
        for i in range(4):
            labels = read_label(folder / f"pseudo_labels/round{number}/a/a_{i}_leftImg8bit.png")
            assert labels.shape == SIZE
            assert labels.max() < 3

    weights = [argument for stage in reversed(STAGES) for argument in ("--weights", f"{stage}.pth")]
    out = ok(run("evaluate", *weights, "--ids", "evaluation.scales=[1.0, 0.5]"))
    results = json.loads((folder / "results.json").read_text())
    assert list(results) == STAGES
    for stage, entry in results.items():
        assert list(entry["iou"]) == list(CLASSES)
        mean = np.mean([x for x in entry["iou"].values() if x is not None])
        assert entry["miou"] == pytest.approx(mean, abs=2e-3)
        assert (entry["scales"], entry["weights"], entry["split"]) == ([1.0, 0.5], "last", "val")
        row = next(line for line in out.splitlines() if line.startswith(f"| {stage} "))
        assert f"{entry['miou']:.1f}" in row
    check_pictures(dataset, folder, config())
    theirs = cityscapes_scores(dataset, folder, monkeypatch)
    for name, iou in results["warmup"]["iou"].items():
        assert iou / 100 == pytest.approx(theirs[name], abs=1e-5)

    best = check_log(folder)
    ok(run("evaluate", "--cfg", folder / "config.yaml", "--weights", "warmup_best_on_val.pth"))
    entry = json.loads((folder / "results.json").read_text())["warmup_best_on_val"]
    assert entry["weights"] == "best_on_val"
    assert entry["miou"] == pytest.approx(best["miou"], abs=1e-3)

    # a stage that is finished is left alone, one of another configuration is not overwritten
    before = (folder / "warmup.pth").stat().st_mtime_ns
    assert "is finished" in ok(run("warmup", "workers=1", "log_every=1"))
    code, _, err = run("warmup", "warmup.distill=2")
    assert code == 2
    assert "another warmup" in err
    assert (folder / "warmup.pth").stat().st_mtime_ns == before
    ok(run("warmup", "warmup.distill=2", "--force"))
    assert (folder / "warmup.pth").stat().st_mtime_ns != before


def check_pictures(dataset, folder, cfg):
    """Predictions have the classes' colours, overlays half of the image, ids label values."""
    name = "b/b_4_leftImg8bit.png"
    coloured = read_image(folder / "predictions/warmup" / name)
    ids = read_label(folder / "ids/warmup" / name)
    for label, colour in ((IDS[k], colour) for k, colour in CLASSES.items()):
        assert (coloured[ids == label] == colour).all()
    assert set(np.unique(ids)) <= set(IDS.values())
    model = models.load_segmenter(folder / "warmup.pth", cfg)[0].eval()
    image = read_image(dataset / "camera/leftImg8bit/val" / name)
    whole = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    half = F.interpolate(whole, (24, 32), mode="bilinear", antialias=True)
    with torch.no_grad():
        logits = [losses.upsample(model(x)[0], SIZE) for x in (whole, half)]
    expected = np.array(list(CLASSES.values()))[torch.maximum(*logits).argmax(1)[0]]
    assert (coloured == expected).all(2).mean() > 0.999
    overlay = read_image(folder / "overlays/warmup" / name).astype(int)
    assert np.abs(overlay - (image.astype(int) + coloured) / 2).max() <= 1
    assert read_image(folder / "comparison.png").shape[1] == 7 * (192 + 4)


def cityscapes_scores(dataset, folder, monkeypatch):
    """Return the IoU of each class according to cityscapesscripts, from the files in ids/."""
    from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as official

    monkeypatch.setattr(np, "in1d", np.isin, raising=False)
    official.args.evalInstLevelScore = official.args.JSONOutput = official.args.colorized = False
    official.args.quiet, official.args.evalPixelAccuracy = True, False
    truth = sorted(map(str, (dataset / "camera/gtFine/val").rglob("*.png")))
    predicted = sorted(map(str, (folder / "ids/warmup").rglob("*.png")))
    return official.evaluateImgLists(predicted, truth, official.args)["classScores"]


def check_log(folder):
    """Every term is logged, and how good the pseudo-labels were; return the best on val."""
    lines = [line for line in log(folder) if line["stage"] == "selftrain"]
    lines = [line for line in lines if "finished" not in line]
    assert [line["step"] for line in lines] == [2, 4]
    figures = {"loss", "ce", "ce_mix", "kd", "kept", "precision", "probability_accuracy", "lr"}
    figures |= {"images_per_second", "memory_gb"}
    for line in lines:
        assert figures <= line.keys()
        assert 0 <= line["kept"] <= 1
    validations = [line for line in log(folder) if "val_miou_student" in line]
    assert [line["step"] for line in validations] == [3, 6]
    best = state(folder / "warmup_best_on_val.pth")
    highest = max(line["val_miou_student"] for line in validations)
    assert best["miou"] == pytest.approx(highest, abs=1e-3)
    assert json.loads((folder / "environment.json").read_text())["torch"] == torch.__version__
    assert (folder / "tensorboard/warmup").is_dir()
    return best


def test_the_baseline_reads_no_target_and_no_translation(dataset, run):
    shutil.rmtree(dataset / "camera")
    ok(run("warmup", "--as", "source_only", *SOURCE_ONLY))
    assert [line["stage"] for line in log(dataset / "runs/test")] == ["source_only"] * 4


def test_the_source_only_step_is_plain_supervised_training(dataset, run, config):
    """The whole command against a loop of a dozen lines."""
    overrides = ("warmup.distill=0", "warmup.crdomix=false", "bn_recalibrate=[]")
    overrides += ("optimizer.lr_backbone=0.01",)
    ok(run("warmup", *overrides))
    cfg = config(*overrides)
    torch.manual_seed(cfg.seed)
    model = models.build_segmenter(num_classes=3, **cfg.model).train()
    model = model.to(memory_format=torch.channels_last)
    groups = [
        {"params": model.backbone.parameters(), "lr": 0.01},
        {"params": model.head.parameters()},
        {"params": model.classifier.parameters()},
    ]
    optimizer = torch.optim.SGD(groups, 2.5e-3, momentum=0.9, weight_decay=5e-4)
    base = [group["lr"] for group in optimizer.param_groups]
    crops = Crops(cfg, "warmup", "source", Images(cfg, "source", True), [1, 1], 6)
    for step in range(6):
        for group, rate in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = models.poly_lr(rate, step, 6, 0.9)
        samples = [crops[2 * step], crops[2 * step + 1]]
        x = torch.stack([torch.from_numpy(s["image"]) for s in samples]).permute(0, 3, 1, 2) / 255
        y = torch.stack([torch.from_numpy(s["label"]) for s in samples]).long()
        # dropout's mask is the one thing that the loop takes from the command: its seed
        torch.manual_seed(int(np.random.SeedSequence([0, *b"warmup", step]).generate_state(1)[0]))
        # the loss is compared elsewhere; six steps from scratch would blow its rounding up
        loss = losses.supervised_loss(model(x)[0], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained = state(dataset / "runs/test/warmup.pth")["student"]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained[name], value, rtol=1e-3, atol=1e-5, msg=name)


def interrupt(monkeypatch, step):
    """Stop the loop, as a kill would, before it has done `step` more steps; return the undoing."""
    fetch, count = Run.fetch, [0]

    def counted(self, batch):
        if isinstance(batch, dict):
            sample = batch if "image" in batch else next(iter(batch.values()))
            count[0] += "draws" in sample
            if "draws" in sample and count[0] > step:
                raise Stopped(signal.SIGINT)
        return fetch(self, batch)

    monkeypatch.setattr(Run, "fetch", counted)
    return lambda: monkeypatch.setattr(Run, "fetch", fetch)


@pytest.mark.parametrize("script", ["translate_cyclegan", "warmup", "selftrain"])
def test_a_stage_that_was_interrupted_ends_as_if_it_had_not_been(dataset, run, monkeypatch, script):
    first, second = dataset / "runs/test", dataset / "runs/again"
    if script != "translate_cyclegan":
        ok(run("translate_cyclegan"))
    if script == "selftrain":
        ok(run("warmup"))
    if first.exists():
        shutil.copytree(first, second)
    ok(run(script))
    result = {"translate_cyclegan": "translator"}.get(script, script)
    # 3 steps lie between two checkpoints; the centroids of self-training take 3 batches before them
    for steps in (3, 1) if script != "selftrain" else (3 + 3, 1, 3 + 2):
        restore = interrupt(monkeypatch, steps)
        code, _, err = run(script, "name=again")
        restore()
        assert code == 130, err
        assert "goes on" in err
        assert not (second / f"{result}.pth").exists()
    ok(run(script, "name=again", "workers=1"))
    a, b = state(first / f"{result}.pth"), state(second / f"{result}.pth")
    for checkpoint in (a, b):
        del checkpoint["config"], checkpoint["inputs"]  # they hold the run's name
    assert same(a, b)
    assert not list(second.glob("*.unfinished.pth"))


def test_the_seed_decides_everything(dataset, run):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        ok(run("warmup", "warmup.crdomix=false", f"name={name}", f"seed={seed}"))
    a, b, c = (state(dataset / f"runs/{name}/warmup.pth")["student"] for name in "abc")
    assert same(a, b)
    assert not same(a, c)


def test_translation_by_a_published_generator_or_elsewhere(dataset, run):
    generator = Generator(8, 2)
    torch.save(generator.state_dict(), dataset / "latest_net_G_A.pth")
    out = ok(run("translate_cyclegan", f"translation.weights={dataset}/latest_net_G_A.pth"))
    assert "6 translated images" in out
    image = torch.from_numpy(picture(2)[0]).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        expected = (generator(image)[0] * 255).round().byte().permute(1, 2, 0).numpy()
    ours = read_image(dataset / "runs/test/translated/00002.jpg").astype(int)
    write_image(dataset / "expected.jpg", expected)
    assert np.abs(ours - read_image(dataset / "expected.jpg")).max() <= 4  # a rounding, in JPEG
    assert np.abs(ours - expected).mean() < 4
    assert not (dataset / "runs/test/translator.pth").exists()

    shutil.move(dataset / "runs/test/translated", dataset / "elsewhere")
    code, _, err = run("warmup")
    assert code == 2
    assert "run translate_cyclegan.py first" in err
    ok(run("translate_cyclegan", f"translation.images={dataset}/elsewhere"))
    ok(run("warmup", f"translation.images={dataset}/elsewhere"))
    (dataset / "elsewhere/00003.jpg").unlink()
    code, _, err = run("warmup", "name=other", f"translation.images={dataset}/elsewhere")
    assert code == 2
    assert "00003.png" in err


def test_translations_that_an_earlier_version_wrote_as_png_are_kept_until_they_are_outdated(
    dataset, run
):
    folder = dataset / "runs/test/translated"
    ok(run("translate_cyclegan"))
    image = read_image(folder / "00001.jpg")
    (folder / "00001.jpg").unlink()
    write_image(folder / "00001.png", image)
    made = (folder / "00001.png").stat().st_mtime_ns
    (folder / "00002.jpg").unlink()
    ok(run("translate_cyclegan"))
    assert (folder / "00001.png").stat().st_mtime_ns == made
    assert (folder / "00002.jpg").exists()
    ok(run("warmup"))
    ok(run("translate_cyclegan", "--force", "translation.steps=2"))
    assert sorted(path.name for path in folder.iterdir()) == [f"{i:05d}.jpg" for i in range(6)]


def test_images_of_any_size_are_translated_at_their_size(dataset, run):
    image, label = picture(0, (51, 67))
    save(dataset / "game/images/00000.png", image)
    save(dataset / "game/labels/00000.png", label)
    ok(run("translate_cyclegan"))
    assert read_image(dataset / "runs/test/translated/00000.jpg").shape == (51, 67, 3)


def test_a_folder_of_images_without_labels(dataset, run):
    ok(run("warmup", "warmup.crdomix=false"))
    save(dataset / "photos/a.jpg", picture(7, (60, 90))[0])
    save(dataset / "photos/trip/b.png", picture(8, (90, 60))[0])
    weights = dataset / "runs/test/warmup.pth"
    given = ("--images", dataset / "photos", "--out", dataset / "out")
    ok(run("evaluate", "--weights", weights, *given))
    for kind in ("predictions", "overlays", "ids"):
        assert cv2.imread(str(dataset / f"out/{kind}/warmup/a.png"), -1).shape[:2] == (60, 90)
        assert cv2.imread(str(dataset / f"out/{kind}/warmup/trip/b.png"), -1).shape[:2] == (90, 60)
    assert not (dataset / "runs/test/results.json").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_video_comes_back_with_every_frame(dataset, run, workers):
    ok(run("warmup", "warmup.crdomix=false"))
    codec = cv2.VideoWriter_fourcc(*"MJPG")
    film = cv2.VideoWriter(str(dataset / "drive.avi"), codec, 12, (96, 64))
    for i in range(7):
        film.write(picture(i, (64, 96))[0][..., ::-1])
    film.release()
    weights, out = dataset / "runs/test/warmup.pth", dataset / "out"
    given = ("--weights", weights, "--out", out, f"workers={workers}")
    ok(run("evaluate", *given, "--images", dataset / "drive.avi"))
    assert [path.name for path in out.iterdir()] == ["drive_warmup.mp4"]
    back, frames = cv2.VideoCapture(str(out / "drive_warmup.mp4")), []
    assert back.get(cv2.CAP_PROP_FPS) == 12
    while (frame := back.read())[0]:
        frames.append(frame[1][..., ::-1].astype(int))
    assert len(frames) == 7

    # the frames as images have the overlays that the video holds, up to its compression
    source = cv2.VideoCapture(str(dataset / "drive.avi"))
    for i in range(7):
        save(dataset / f"frames/{i}.png", source.read()[1][..., ::-1])
    ok(run("evaluate", *given, "--images", dataset / "frames"))
    overlays = [read_image(out / f"overlays/warmup/{i}.png").astype(int) for i in range(7)]
    away = [[np.abs(frame - overlay).mean() for overlay in overlays] for frame in frames]
    assert np.argmin(away, axis=1).tolist() == list(range(7))
    assert np.diag(away).max() < 8

    (dataset / "none.mp4").write_bytes(b"no video")
    code, _, err = run("evaluate", *given, "--images", dataset / "none.mp4")
    assert (code, "no video" in err, err.count("\n")) == (2, True, 1)


def test_an_exported_network_gives_the_same_logits_at_any_size(dataset, run, config):
    import onnxruntime

    ok(run("warmup", "warmup.crdomix=false"))
    ok(run("evaluate", "--weights", "warmup.pth", "--export", dataset / "model.onnx"))
    session = onnxruntime.InferenceSession(dataset / "model.onnx")
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == list(CLASSES)
    assert json.loads(metadata["colours"]) == list(CLASSES.values())
    student = models.load_segmenter(dataset / "runs/test/warmup.pth", config())[0].eval()
    for size in (SIZE, (75, 101)):
        image = torch.from_numpy(picture(3, size)[0]).permute(2, 0, 1)[None] / 255
        (logits,) = session.run(None, {"image": image.numpy()})
        with torch.no_grad():
            expected = losses.upsample(student(image)[0], size).numpy()
        assert np.abs(logits - expected).max() < 1e-3
        assert (logits.argmax(1) == expected.argmax(1)).mean() > 0.999


def averaged(network, image, size, tops, lefts):
    """The mean of a network's logits over windows, pixel by pixel."""
    kept = [[[] for _ in range(image.shape[3])] for _ in range(image.shape[2])]
    for top in tops:
        for left in lefts:
            logits = network(image[..., top : top + size[0], left : left + size[1]])[0]
            logits = F.interpolate(logits.float(), size, mode="bilinear", align_corners=True)[0]
            for i, j in itertools.product(range(size[0]), range(size[1])):
                kept[top + i][left + j].append(logits[:, i, j])
    means = [torch.stack([torch.stack(x).mean(0) for x in row], 1) for row in kept]
    return torch.stack(means, 1)[None]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_sliding_window_is_the_mean_over_its_windows(precision):
    """A network of 64 channels in 32 groups, in channels-last, as training leaves it."""
    torch.manual_seed(0)
    model = models.build_segmenter("resnet18", 8, 8, 64).eval()
    model = model.to(memory_format=torch.channels_last)
    image = torch.rand(1, 3, 75, 130)
    with torch.no_grad(), torch.autocast("cpu", precision, enabled=precision != torch.float32):
        (ours,) = metrics.sliding_window(model, image, [64, 96])
        (portrait,) = metrics.sliding_window(model, image.transpose(2, 3), [64, 96])
        assert torch.equal(metrics.sliding_window(model, image, [96, 160])[0], model(image)[0])
        expected = averaged(model, image, (64, 96), (0, 11), (0, 34))
        turned = averaged(model, image.transpose(2, 3), (96, 64), (0, 34), (0, 11))
    tolerance = 1e-4 if precision == torch.float32 else 0.05
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(portrait, turned, rtol=tolerance, atol=tolerance)


def test_windows_cover_an_image_at_less_than_twice_its_pixels():
    for side in range(33, 5000, 7):
        size, starts = metrics._windows(side, 512)
        assert size <= 512
        assert (starts[0], starts[-1] + size) == (0, side)
        shared = [before + size - after for before, after in itertools.pairwise(starts)]
        assert all(pixels >= size // 4 - 1 for pixels in shared)
        assert len(starts) * size <= (4 / 3) * side + 32 * len(starts)


def test_a_picture_larger_than_a_window_is_segmented_at_its_size(dataset, run):
    save(dataset / "photos/a.jpg", picture(7, (140, 210))[0])
    ok(run("warmup", "warmup.crdomix=false"))
    given = ("--weights", "warmup.pth", "--images", dataset / "photos", "--out", dataset / "out")
    ok(run("evaluate", *given, "val.size=null", "evaluation.tile=[128, 128]"))
    assert read_image(dataset / "out/predictions/warmup/a.png").shape == (140, 210, 3)


def test_without_labels_to_score_with_the_target_is_pictured(dataset, run):
    shutil.rmtree(dataset / "camera/gtFine")
    ok(run("warmup", "warmup.crdomix=false", "val.root=null"))
    out = ok(run("evaluate", "--weights", "warmup.pth", "val.root=null", "evaluation.pictures=3"))
    assert "pictures of 3 images" in out
    folder = dataset / "runs/test"
    assert read_image(folder / "overlays/warmup/a/a_0_leftImg8bit.png").shape == (*SIZE, 3)
    assert read_image(folder / "comparison.png").shape[1] == 2 * (192 + 4)
    assert not (folder / "results.json").exists()

    # two networks are compared by a score that needs no labels
    shutil.copy(folder / "warmup.pth", folder / "other.pth")
    out = ok(run("evaluate", "val.root=null", "evaluation.pictures=1"))
    results = json.loads((folder / "results.json").read_text())
    assert 0 < results["warmup"]["agreement"] == results["other"]["agreement"]
    assert out.splitlines()[-1].startswith("Without labels, other is the one to use.")
    ok(run("tools.report", folder))
    assert "Without labels, other" in (folder / "report.html").read_text()
    code, _, err = run("warmup", "val.root=null", "val_every=5")
    assert (code, "val_every" in err) == (2, True)


def test_evaluation_takes_the_configuration_from_the_checkpoint(dataset, run, monkeypatch, capsys):
    """But not where to write: that is beside it."""
    ok(run("warmup", "warmup.crdomix=false"))
    saved = state(dataset / "runs/test/warmup.pth")
    saved["config"] |= {"output": str(dataset / "elsewhere"), "name": "other"}
    (dataset / "moved").mkdir()
    torch.save(saved, dataset / "moved/warmup.pth")
    weights = str(dataset / "moved/warmup.pth")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--weights", weights])
    command(evaluate.main)
    assert "| warmup |" in capsys.readouterr().out
    assert (dataset / "moved/results.json").exists()
    assert not (dataset / "elsewhere").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["none.pth"], "none.pth: there is no such file"),
        (["test.yaml"], "test.yaml: not a file of tensors"),
        (["warmup.pth", "classes={road: [1, 1, 1], sky: [2, 2, 2]}"], "trained for other classes"),
        (["warmup.pth", "device=cuda"], "no GPU"),
    ],
)
def test_evaluation_errors(dataset, run, arguments, part, monkeypatch):
    monkeypatch.chdir(dataset)
    if arguments[-1] == "device=cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    ok(run("warmup", "warmup.crdomix=false", "warmup.steps=1"))
    code, _, err = run("evaluate", "--weights", *arguments)
    assert code == 2
    assert part in err
    assert len(err.strip().splitlines()) == 1


def test_labels_without_a_class_to_score_are_named(dataset, run):
    """Before a score is written, and while training."""
    nothing = "val.ids={7: null, 23: null, 26: null, 0: null}"
    fault = "val: no pixel of its labels belongs to a class; are val.ids right?"
    code, _, err = run("warmup", "warmup.crdomix=false", "val_every=2", nothing)
    assert (code, err) == (2, f"warmup.py: {fault}\n")
    ok(run("warmup", "warmup.crdomix=false", "--force"))
    code, _, err = run("evaluate", nothing)
    assert (code, err) == (2, f"evaluate.py: {fault}\n")
    assert not (dataset / "runs/test/results.json").exists()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_memory_that_is_not_enough_is_one_line(monkeypatch, capsys, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    monkeypatch.setattr(sys, "argv", ["warmup.py"])
    with pytest.raises(SystemExit) as stop:
        command(lambda: torch.empty(2**46, dtype=torch.uint8, device=device))
    err = capsys.readouterr().err
    assert (stop.value.code, len(err.splitlines())) == (2, 1)
    assert "raise accumulate" in err


def test_a_backbone_with_a_rate_of_zero_stands_still(dataset, run):
    for name, steps in (("one", 1), ("more", 3)):
        options = ("warmup.crdomix=false", f"warmup.steps={steps}", f"name={name}")
        ok(run("warmup", *options, "optimizer.lr_backbone=0"))
    one, more = (state(dataset / f"runs/{name}/warmup.pth")["student"] for name in ("one", "more"))
    for name, value in one.items():
        moved = not torch.equal(value, more[name])
        if name.startswith(("classifier.", "head.project.0.")):
            assert moved, name
        if name.startswith("backbone.") and name.endswith((".weight", ".bias")):
            assert not moved, name


@pytest.mark.parametrize(
    ("gpu", "least"),
    [
        (None, 10_000),
        ({"device": "A", "compile_from_steps": 700}, 700),
        ({"device": "A", "compile_from_steps": None}, 10_000),
        ({"device": "B", "compile_from_steps": 700}, 10_000),
        ({}, 10_000),
    ],
)
def test_a_measurement_decides_whether_to_compile(tmp_path, monkeypatch, gpu, least):
    monkeypatch.setattr(devices, "MEASURED", tmp_path / "gpu.json")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A")
    if gpu is not None:
        devices.MEASURED.write_text(json.dumps(gpu))
    assert devices.compilation_pays(torch.device("cuda"), least)
    assert not devices.compilation_pays(torch.device("cuda"), least - 1)
    assert not devices.compilation_pays(torch.device("cpu"), 10**6)


def test_the_measurement_says_from_how_many_steps_on_compilation_pays():
    rows = {
        f"config.yaml {stage} bf16 {mode}": {"first step s": first, "resident ms": ms}
        for stage, mode, first, ms in (
            ("warmup", "eager", 20, 125),
            ("warmup", "compiled", 120, 100),
            ("selftrain", "eager", 10, 175),
            ("selftrain", "compiled", 110, 165),
        )
    }
    assert gpu_hour.compile_from_steps(rows) == 10_000  # 100 s / 10 ms
    rows["config.yaml warmup bf16 compiled"]["resident ms"] = 126
    assert gpu_hour.compile_from_steps(rows) == gpu_hour.NEVER
    assert gpu_hour.compile_from_steps({}) is None


@pytest.mark.parametrize("falls_back", [True, False])
def test_a_network_that_cannot_be_compiled_is_told_in_one_line(tmp_path, falls_back):
    """Without a C++ compiler, which PyTorch's own compiler needs."""
    script = f"""
import torch
from engine.command import command
from engine.device import Compiled
module, x = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Softmax(1)), torch.rand(2, 3)
def main():
    for _ in range(2):
        assert torch.equal(Compiled(module, {falls_back})(x), module(x))
command(main)
"""
    environment = {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    environment = os.environ | environment | {"CUDA_VISIBLE_DEVICES": ""}
    pipes = {"capture_output": True, "text": True, "cwd": ROOT, "env": environment}
    done = subprocess.run([sys.executable, "-c", script], check=False, **pipes)
    message = "training goes on without it" if falls_back else "set compile=false"
    lines = [line for line in done.stderr.splitlines() if message in line]
    assert (done.returncode, len(lines)) == (0 if falls_back else 2, 1), done.stderr
    assert "Traceback" not in done.stderr


def test_a_loss_that_is_not_finite_stops_the_run_and_names_it(dataset, run):
    weights = models.build_segmenter("mobilenet_v2", 3).backbone.state_dict()
    weights["features.3.conv.0.0.weight"][:] = 3e38  # finite, but no sum of them is
    torch.save(weights, dataset / "weights.pth")
    code, _, err = run("warmup", "warmup.crdomix=false", f"model.weights={dataset}/weights.pth")
    assert code == 2
    assert "kd became nan" in err
    assert not (dataset / "runs/test/warmup.pth").exists()


def shell(*arguments):
    """Run a Python command line in the folder of the code."""
    command_line = [sys.executable, *map(str, arguments)]
    return subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_commands_as_a_user_types_them(dataset):
    """In processes of their own, with loader processes and the default precision."""
    options = ("warmup.crdomix=false", "workers=2", "precision=auto")
    done = shell("warmup.py", "--cfg", dataset / "test.yaml", *options)
    assert done.returncode == 0, done.stderr
    assert "warmup: wrote" in done.stdout
    failed = shell("selftrain.py", "--cfg", dataset / "test.yaml", "--init", "nothing.pth")
    assert failed.returncode == 2
    assert len(failed.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("arguments", [("--init", "a", "b"), ("--check",), ()])
def test_commands_that_have_moved_name_the_new_one(arguments, tmp_path):
    code, out, err = Command("datasets", *arguments, cwd=ROOT, out=tmp_path).end()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "python -m tools.own_data" in err


class NoWaiting(TorchDispatchMode):
    """Refuses what a GPU's host would have to wait for.

    A value that is read back, a shape that data decide, a constant that is copied to the GPU.
    """

    OPERATIONS = ("lift_fresh", "_local_scalar_dense", "nonzero", "masked_select")
    OPERATIONS += ("bincount", "_unique2", "equal")

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        assert name not in self.OPERATIONS, name
        masks = [i for i in indices if i is not None and i.dtype == torch.bool]
        assert not masks, f"{name} by a mask"
        return operation(*args, **(kwargs or {}))


def test_no_step_waits_for_the_device(dataset, run, monkeypatch):
    steps = Run.steps
    watched = []

    def watch(self, batches, first, total, state):
        for step, parts in steps(self, batches, first, total, state):
            # not in the first step, which makes constants, nor in the last, which shows pictures
            with NoWaiting() if 0 < step < total - 1 else contextlib.nullcontext():
                watched.append((self.stage, step))
                yield step, parts

    monkeypatch.setattr(Run, "steps", watch)
    ohem = ("name=ohem", "supervised=ohem", "model.auxiliary=0.1", "optimizer.name=adamw")
    for options in (("name=ce",), ohem):
        options = (*options, "workers=1", "selftrain.rounds=1")
        for stage in ("warmup", "selftrain"):
            ok(run(stage, *options, f"translation.images={dataset}/game/images"))
    steps_of_both = [("warmup", n) for n in range(6)] + [("selftrain", n) for n in range(4)]
    assert watched == 2 * steps_of_both


@pytest.mark.skipif(
    "LONG" not in os.environ and not torch.cuda.is_available(),
    reason="needs a GPU, or LONG=1 and a minute",
)
def test_compiled_networks_train_alike(dataset, run, monkeypatch):
    monkeypatch.setattr("torch._inductor.config.fallback_random", True)  # dropout as without
    found = []
    for wanted in ("false", "true"):
        options = (f"name=compile_{wanted}", f"compile={wanted}", "model.network=resnet18")
        options += ("warmup.crdomix=false", "selftrain.crdomix=false", "log_every=1")
        ok(run("warmup", *options, "warmup.steps=2"))
        # from one network, and with labels that no rounding changes
        options += ("selftrain.rounds=1", "selftrain.labels=probability")
        ok(run("selftrain", "--init", dataset / "runs/compile_false/warmup.pth", *options))
        lines = log(dataset / f"runs/compile_{wanted}")
        found.append([line["loss"] for line in lines if "step" in line])
    assert len(found[0]) == 6
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_stages_on_a_gpu(run, precision):
    for script in ("translate_cyclegan", "warmup", "selftrain"):
        ok(run(script, "device=cuda", "compile=false", f"precision={precision}"))


def test_every_part_of_the_bench_is_measured(dataset, run, monkeypatch):
    """At sizes at which its figures mean nothing."""
    monkeypatch.chdir(dataset)
    out = ok(run("tools.bench", "--steps", "1", "model.channels=32"))
    figures = json.loads((dataset / "bench.json").read_text())
    for part in bench.PARTS.split(","):
        assert all(value > 0 for value in figures[part].values()), part
        assert f"{part}: " in out
    assert figures["hours"]["selftrain"] == figures["selftrain"]["seconds"] * 4 * 2 / 3600
    assert [path.name for path in dataset.glob("runs*")] == []


# ---------------------------------------------------------------- the built-in benchmark


def test_demo_data_is_a_pure_function_of_the_seed():
    for split in make_demo_data.SPLITS:
        image, label = make_demo_data.render(0, split, 3)
        again = make_demo_data.render(0, split, 3)
        assert np.array_equal(image, again[0])
        assert np.array_equal(label, again[1])
        assert image.shape == (make_demo_data.HEIGHT, make_demo_data.WIDTH, 3)
        assert not np.array_equal(image, make_demo_data.render(1, split, 3)[0])


def test_demo_data_shows_every_class_in_every_split():
    for split in make_demo_data.SPLITS:
        labels = np.stack([make_demo_data.render(0, split, n)[1] for n in range(8)])
        shares = {name: (labels == value).mean() for name, value in make_demo_data.LABEL.items()}
        assert len(shares) == 8
        assert min(shares.values()) > 0.005, shares
        assert sum(shares.values()) == pytest.approx(1)


def test_demo_data_in_the_real_layouts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_demo_data, "SPLITS", {"game": 3, "train": 2, "val": 2})
    roots = [f"{domain}.root={tmp_path}/camera" for domain in ("target", "val")]
    roots.append(f"source.root={tmp_path}/game")
    demo = ROOT / "configs/demo.yaml"
    monkeypatch.setattr(sys, "argv", ["make_demo_data.py", "--cfg", str(demo), *roots])
    command(make_demo_data.main)
    cfg = load_config(demo, roots)
    for domain, split, count in (("source", "game", 3), ("target", "train", 2), ("val", "val", 2)):
        images = Images(cfg, domain, labelled=True)
        assert len(images) == count
        assert np.array_equal(images.image(1), make_demo_data.render(0, split, 1)[0])
        assert images.label(1).max() < 8
    stamp = Path(tmp_path / "game/images/00000.png").stat().st_mtime_ns
    command(make_demo_data.main)
    assert Path(tmp_path / "game/images/00000.png").stat().st_mtime_ns == stamp
    assert "complete" in capsys.readouterr().out
