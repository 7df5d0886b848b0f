"""The commands, from files to files, on small data: all stages, resuming, results, demo data."""

import itertools
import json
import shutil
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
    LONG,
    ROOT,
    SIZE,
    changed,
    files,
    killed_after,
    log,
    ok,
    picture,
    refused,
    same_networks,
    save,
    state,
)

import losses
import metrics
import models
from datasets import Crops, Images
from engine.command import command
from engine.images import read_image, read_label
from tools import bench, make_demo_data

STAGES = ["source_only", "warmup", "selftrain_round1", "selftrain", "oracle"]


@pytest.mark.core
def test_all_stages_end_to_end(dataset, finished, run, config):
    for i in range(6):
        assert read_image(finished / f"translated/{i:05d}.jpg").shape == (*SIZE, 3)
    assert not np.array_equal(read_image(finished / "translated/00000.jpg"), picture(0)[0])
    for number in (1, 2):
        for i in range(4):
            labels = read_label(finished / f"pseudo_labels/round{number}/a/a_{i}_leftImg8bit.png")
            assert labels.shape == SIZE
            assert labels.max() < 3

    weights = [argument for stage in reversed(STAGES) for argument in ("--weights", f"{stage}.pth")]
    (finished / "results.json").unlink()
    out = ok(run("evaluate", *weights, "evaluation.scales=[1.0, 0.5]"))
    results = json.loads((finished / "results.json").read_text())
    assert list(results) == STAGES
    for stage, entry in results.items():
        assert list(entry["iou"]) == list(CLASSES)
        mean = np.mean([x for x in entry["iou"].values() if x is not None])
        assert entry["miou"] == pytest.approx(mean, abs=2e-3)
        assert (entry["scales"], entry["weights"], entry["split"]) == ([1.0, 0.5], "last", "val")
        row = next(line for line in out.splitlines() if line.startswith(f"| {stage} "))
        assert f"{entry['miou']:.1f}" in row
    check_pictures(dataset, finished, config())

    best = check_log(finished)
    ok(run("evaluate", "--cfg", finished / "config.yaml", "--weights", "warmup_best_on_val.pth"))
    entry = json.loads((finished / "results.json").read_text())["warmup_best_on_val"]
    assert entry["weights"] == "best_on_val"
    assert entry["miou"] == pytest.approx(best["miou"], abs=1e-3)


def test_a_finished_stage_is_left_alone_and_another_configuration_refused(finished, run):
    before = (finished / "warmup.pth").stat().st_mtime_ns
    assert "is finished" in ok(run("warmup", "workers=1", "log_every=1"))
    refused(run("warmup", "warmup.distill=2"), "another warmup")
    assert (finished / "warmup.pth").stat().st_mtime_ns == before
    ok(run("warmup", "warmup.distill=2", "--force"))
    assert (finished / "warmup.pth").stat().st_mtime_ns != before


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


@pytest.mark.parametrize("script", ["translate_cyclegan", "warmup", "selftrain"])
def test_a_stage_that_was_killed_ends_as_if_it_had_not_been(finished, run, script):
    """Killed at several places between two checkpoints, against the uninterrupted run."""
    again = finished.parent / "again"
    if script != "translate_cyclegan":
        shutil.copytree(finished / "translated", again / "translated")
        shutil.copy(finished / "translator.pth", again)
    if script == "selftrain":
        shutil.copy(finished / "warmup.pth", again)
    result = {"translate_cyclegan": "translator.pth"}.get(script, f"{script}.pth")
    # the first centroids of self-training take 3 batches before its steps
    for steps in (3, 1) if script != "selftrain" else (3 + 3, 1, 3 + 2):
        with killed_after(steps):
            run(script, "name=again")
        assert not (again / result).exists()
    ok(run(script, "name=again", "workers=1"))
    assert same_networks(finished / result, again / result)
    assert not list(again.glob("*.unfinished.pth"))


def test_another_seed_gives_another_network(finished, run):
    ok(run("warmup", "name=other", "seed=1", f"translation.images={finished}/translated"))
    assert not same_networks(finished / "warmup.pth", finished.parent / "other/warmup.pth")


def test_translation_by_a_trained_generator_or_elsewhere(finished, run):
    (finished / "translator.pth").rename("generator.pth")
    expected = files(finished / "translated")
    (finished / "translated").rename("elsewhere")
    refused(run("warmup", "--force"), "run translate_cyclegan.py first")
    out = ok(run("translate_cyclegan", "translation.weights=generator.pth"))
    assert "6 translated images" in out
    assert files(finished / "translated") == expected
    assert not (finished / "translator.pth").exists()

    shutil.rmtree(finished / "translated")
    ok(run("translate_cyclegan", "translation.images=elsewhere"))
    ok(run("warmup", "name=other", "translation.images=elsewhere"))
    assert same_networks(finished / "warmup.pth", "runs/other/warmup.pth")
    Path("elsewhere/00003.jpg").unlink()
    refused(run("warmup", "name=third", "translation.images=elsewhere"), "00003.png")


def test_another_translator_translates_all_images_again(finished, run):
    before = files(finished / "translated")
    ok(run("translate_cyclegan", "--force", "translation.steps=1"))
    after = files(finished / "translated")
    assert before.keys() == after.keys()
    assert not any(before[name] == after[name] for name in before)


def test_a_folder_of_images_without_labels(finished, run):
    save(Path("photos/a.jpg"), picture(7, (60, 90))[0])
    save(Path("photos/trip/b.png"), picture(8, (140, 210))[0])
    given = ("--weights", finished / "warmup.pth", "--images", "photos", "--out", "out")
    results = (finished / "results.json").read_bytes()
    # the second one is larger than a window
    ok(run("evaluate", *given, "val.size=null", "evaluation.tile=[128, 128]"))
    for kind in ("predictions", "overlays", "ids"):
        for name, size in (("a", (60, 90)), ("trip/b", (140, 210))):
            assert cv2.imread(f"out/{kind}/warmup/{name}.png", -1).shape[:2] == size
    assert (finished / "results.json").read_bytes() == results


@pytest.mark.parametrize("workers", [0, 2])
def test_a_video_comes_back_with_every_frame(dataset, finished, run, workers):
    codec = cv2.VideoWriter_fourcc(*"MJPG")
    film = cv2.VideoWriter(str(dataset / "drive.avi"), codec, 12, (96, 64))
    for i in range(7):
        film.write(picture(i, (64, 96))[0][..., ::-1])
    film.release()
    out = dataset / "out"
    given = ("--weights", finished / "warmup.pth", "--out", out, f"workers={workers}")
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
    refused(run("evaluate", *given, "--images", dataset / "none.mp4"), "no video")


def test_an_exported_network_gives_the_same_logits_at_any_size(dataset, finished, run, config):
    onnxruntime = pytest.importorskip("onnxruntime")
    ok(run("evaluate", "--weights", "warmup.pth", "--export", dataset / "model.onnx"))
    session = onnxruntime.InferenceSession(dataset / "model.onnx")
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == list(CLASSES)
    assert json.loads(metadata["colours"]) == list(CLASSES.values())
    student = models.load_segmenter(finished / "warmup.pth", config())[0].eval()
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


def test_without_labels_to_score_with_the_target_is_pictured(finished, run):
    shutil.rmtree("camera/gtFine")
    for name in ("source_only.pth", "selftrain_round1.pth", "oracle.pth", "results.json"):
        (finished / name).unlink()
    shutil.rmtree(finished / "overlays")
    out = ok(run("evaluate", "--weights", "warmup.pth", "val.root=null", "evaluation.pictures=3"))
    assert "pictures of 3 images" in out
    assert read_image(finished / "overlays/warmup/a/a_0_leftImg8bit.png").shape == (*SIZE, 3)
    assert not (finished / "results.json").exists()

    # networks are compared by a score that needs no labels
    shutil.copy(finished / "warmup.pth", finished / "selftrain.pth")
    (finished / "warmup_best_on_val.pth").unlink()
    out = ok(run("evaluate", "val.root=null", "evaluation.pictures=1"))
    results = json.loads((finished / "results.json").read_text())
    assert 0 < results["warmup"]["agreement"] == results["selftrain"]["agreement"]
    assert out.splitlines()[-1].startswith("Without labels, selftrain is the one to use.")
    ok(run("tools.report", finished))
    assert "Without labels, selftrain" in (finished / "report.html").read_text()
    refused(run("warmup", "val.root=null", "val_every=5"), "val_every")


def test_evaluation_takes_the_configuration_from_the_checkpoint(finished, run):
    """But not where to write: that is beside it."""
    moved = Path("moved")
    moved.mkdir()
    shutil.copy(finished / "warmup.pth", moved)
    changed(moved / "warmup.pth", lambda saved: saved["config"].update(output="elsewhere"))
    assert "| warmup |" in ok(run("evaluate", "--cfg", "", "--weights", moved / "warmup.pth"))
    assert (moved / "results.json").exists()
    assert not Path("elsewhere").exists()


EVALUATION_ERRORS = [
    (["none.pth"], "none.pth: there is no such file"),
    (["test.yaml"], "test.yaml: not a file of tensors"),
    (["warmup.pth", "classes={road: [1, 1, 1], sky: [2, 2, 2]}"], "trained for other classes"),
    (["warmup.pth", "device=cuda"], "no GPU"),
]


def test_evaluation_errors(finished, run):
    for arguments, part in EVALUATION_ERRORS:
        if arguments[-1] != "device=cuda" or not torch.cuda.is_available():
            refused(run("evaluate", "--weights", *arguments), part)


def test_labels_without_a_class_to_score_are_named(finished, run):
    """Before a score is written, and while training."""
    nothing = "val.ids={7: null, 23: null, 26: null, 0: null}"
    fault = "val: no pixel of its labels belongs to a class; are val.ids right?"
    (finished / "results.json").unlink()
    refused(run("warmup", "--force", "val_every=2", nothing), f"warmup.py: {fault}\n")
    refused(run("evaluate", nothing), f"evaluate.py: {fault}\n")
    assert not (finished / "results.json").exists()


def test_memory_that_is_not_enough_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["warmup.py"])
    with pytest.raises(SystemExit) as stop:
        command(lambda: torch.empty(2**46, dtype=torch.uint8))
    refused((stop.value.code, *capsys.readouterr()), "raise accumulate")


def test_a_backbone_with_a_rate_of_zero_stands_still(dataset, run, config):
    options = ("warmup.crdomix=false", "warmup.steps=2", "optimizer.lr_backbone=0")
    ok(run("warmup", *options))
    torch.manual_seed(0)
    first = models.build_segmenter(num_classes=3, **config().model).state_dict()
    for name, value in state(dataset / "runs/test/warmup.pth")["student"].items():
        moved = not torch.equal(value, first[name])
        if name.startswith(("classifier.", "head.project.0.")):
            assert moved, name
        if name.startswith("backbone.") and name.endswith((".weight", ".bias")):
            assert not moved, name


def test_a_loss_that_is_not_finite_stops_the_run_and_names_it(dataset, run):
    weights = models.build_segmenter("mobilenet_v2", 3).backbone.state_dict()
    weights["features.3.conv.0.0.weight"][:] = 3e38  # finite, but no sum of them is
    torch.save(weights, dataset / "weights.pth")
    outcome = run("warmup", "warmup.crdomix=false", f"model.weights={dataset}/weights.pth")
    refused(outcome, "kd became nan")
    assert not (dataset / "runs/test/warmup.pth").exists()


def test_the_commands_as_a_user_types_them(dataset):
    """In processes of their own, with loader processes and the default precision."""
    pipes = {"cwd": dataset, "capture_output": True, "text": True, "check": False}
    for script, more, code in (
        ("warmup.py", ["warmup.crdomix=false", "workers=2", "precision=auto"], 0),
        ("selftrain.py", ["--init", "nothing.pth"], 2),
    ):
        line = [sys.executable, str(ROOT / script), "--cfg", "test.yaml", *more]
        done = subprocess.run(line, **pipes)
        assert done.returncode == code, done.stderr
        assert len(done.stderr.splitlines()) == (1 if code else 0)


@pytest.mark.skipif(
    not LONG and not torch.cuda.is_available(),
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


def test_the_bench_measures_its_parts(dataset, run):
    """At sizes at which its figures mean nothing; LONG=1: all parts."""
    parts = bench.PARTS if LONG else "warmup,selftrain,loader"
    out = ok(run("tools.bench", "--steps", "1", "--parts", parts, "model.channels=32"))
    figures = json.loads((dataset / "bench.json").read_text())
    for part in parts.split(","):
        assert all(value > 0 for value in figures[part].values()), part
        assert f"{part}: " in out
    assert figures["hours"]["selftrain"] == figures["selftrain"]["seconds"] * 4 * 2 / 3600
    assert not list(dataset.glob("runs*"))


# ---------------------------------------------------------------- the built-in benchmark


def test_demo_data_is_a_pure_function_of_the_seed_and_shows_every_class():
    for split in make_demo_data.SPLITS:
        image, label = make_demo_data.render(0, split, 3)
        again = make_demo_data.render(0, split, 3)
        assert np.array_equal(image, again[0])
        assert np.array_equal(label, again[1])
        assert not np.array_equal(image, make_demo_data.render(1, split, 3)[0])
        labels = np.stack([label, *(make_demo_data.render(0, split, n)[1] for n in range(5))])
        shares = {name: (labels == value).mean() for name, value in make_demo_data.LABEL.items()}
        assert min(shares.values()) > 0.003, shares
        assert sum(shares.values()) == pytest.approx(1)
