"""The commands, from files to files, on small data: all stages, resuming, results, demo data."""

import json
import os
import re
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
    PALETTE,
    ROOT,
    SIZE,
    SOURCE_ONLY,
    changed,
    files,
    log,
    ok,
    picture,
    refused,
    same_networks,
    save,
    state,
)

import losses
import models
from datasets import Crops, Images
from engine.command import command
from engine.images import read_image, read_label
from tools import bench, make_demo_data

PAINTED = ["overlays", "predictions"]
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
        assert (entry["scales"], entry["dataset"], entry["split"]) == ([1.0, 0.5], "val", "val")
        row = next(line for line in out.splitlines() if line.startswith(f"| {stage} "))
        assert f"{entry['miou']:.1f}" in row
    check_pictures(dataset, finished, config())
    check_log(finished)


@pytest.mark.parametrize(("kind", "number"), [("images", 0), ("labels", 1)])
def test_other_files_than_those_of_a_finished_stage_are_told(finished, run, kind, number):
    save(Path(f"game/{kind}/00003.png"), picture(50)[number])
    os.utime(f"game/{kind}/00003.png", (0, 0))
    refused(run("warmup"), "other source images: 1 files changed, as 00003.png", "--force")


def test_the_translation_of_a_replaced_image_is_made_anew(finished, run):
    """Where a translator's checkpoint says nothing of its inputs, as an older release's."""
    changed(finished / "translator.pth", lambda saved: saved["inputs"].clear())
    ok(run("translate_cyclegan"))
    before = files(finished / "translated")
    save(Path("game/images/00003.png"), picture(50)[0])
    ok(run("translate_cyclegan"))
    after = files(finished / "translated")
    assert [name for name in before if after[name] != before[name]] == ["00003.jpg"]
    ok(run("translate_cyclegan", "--force", "translation.steps=1"))  # another translator
    assert not before.items() & files(finished / "translated").items()


def test_a_finished_stage_is_left_alone_and_another_configuration_refused(finished, run):
    before = (finished / "warmup.pth").stat().st_mtime_ns
    assert "is finished" in ok(run("warmup", "workers=1", "log_every=1"))
    refused(run("warmup", "warmup.distill=2"), "warmup.distill = 0.5 instead of 2")
    assert (finished / "warmup.pth").stat().st_mtime_ns == before
    ok(run("warmup", "warmup.distill=2", "--force"))
    assert (finished / "warmup.pth").stat().st_mtime_ns != before


def check_pictures(dataset, folder, cfg):
    """Predictions have the classes' colours, overlays half of the image, ids label values."""
    name = "b/b_4_leftImg8bit.png"
    coloured = read_image(folder / "predictions/warmup" / name)
    ids = read_label(folder / "ids/warmup" / name)
    assert np.array_equal(coloured, PALETTE[ids])
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
    """Every term is logged, and how good the pseudo-labels were."""
    lines = [line for line in log(folder) if line["stage"] == "selftrain"]
    lines = [line for line in lines if "finished" not in line]
    assert [line["step"] for line in lines] == [2, 4]
    figures = {"loss", "ce", "ce_mix", "kd", "kept", "precision", "probability_accuracy", "lr"}
    figures |= {"images_per_second", "memory_gb"}
    for line in lines:
        assert figures <= line.keys()
        assert 0 <= line["kept"] <= 1
    assert json.loads((folder / "environment.json").read_text())["torch"] == torch.__version__
    assert (folder / "tensorboard/warmup").is_dir()


def test_the_source_only_step_is_plain_supervised_training(dataset, run, config):
    """The whole command against a loop of a dozen lines."""
    overrides = ("bn_recalibrate=[]", "optimizer.lr_backbone=0.01")
    ok(run(*SOURCE_ONLY, *overrides))
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
    crops = Crops(cfg, "source_only", "source", Images(cfg, "source", True), [1, 1], 6)
    for step in range(6):
        for group, rate in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = rate * (1 - step / 6) ** 0.9
        samples = [crops[2 * step], crops[2 * step + 1]]
        x = torch.stack([torch.from_numpy(s["image"]) for s in samples]).permute(0, 3, 1, 2) / 255
        y = torch.stack([torch.from_numpy(s["label"]) for s in samples]).long()
        # dropout's mask is the one thing that the loop takes from the command: its seed
        sequence = np.random.SeedSequence([0, *b"source_only", step])
        torch.manual_seed(int(sequence.generate_state(1)[0]))
        # the loss is compared elsewhere; six steps from scratch would blow its rounding up
        loss = losses.supervised_loss(model(x)[0], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained = state(dataset / "runs/test/source_only.pth")["student"]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(
            trained[name], value, rtol=1e-3, atol=1e-5, msg=lambda t, name=name: f"{name}: {t}"
        )


def test_a_warm_up_goes_on_from_a_network_and_self_training_refuses_another(finished, run):
    images = f"translation.images={finished}/translated"
    still = ("optimizer.lr_backbone=0", "optimizer.lr_head=1e-9", "bn_recalibrate=[]")
    ok(run("warmup", "--init", finished / "selftrain.pth", "name=further", images, *still))
    first, last = state(finished / "selftrain.pth")["student"], state("runs/further/warmup.pth")
    for name in ("backbone.features.0.0.weight", "classifier.weight"):
        torch.testing.assert_close(last["student"][name], first[name], rtol=0, atol=1e-4)
    other = ("name=other", images, "model.channels=64")
    outcome = run("selftrain", "--init", finished / "warmup.pth", *other)
    refused(outcome, "warmup.pth: has model.channels = 32, not 64; set it")


def test_images_that_were_translated_elsewhere(finished, run):
    (finished / "translated").rename("elsewhere")
    refused(run("warmup", "--force"), "run translate_cyclegan.py first")
    out = ok(run("translate_cyclegan", "translation.images=elsewhere"))
    assert "6 translated images are in elsewhere" in out
    ok(run("warmup", "name=other", "translation.images=elsewhere"))
    assert same_networks(finished / "warmup.pth", "runs/other/warmup.pth")
    Path("elsewhere/00003.jpg").unlink()
    refused(run("warmup", "name=third", "translation.images=elsewhere"), "00003.png")


def test_translations_are_judged_and_spoiled_ones_named(dataset, run):
    folder = Path("moved")
    for i in range(6):
        save(folder / f"{i:05d}.jpg", picture(i)[0] // 2 + 60)
    given = f"translation.images={folder}"
    out = ok(run("translate_cyclegan", given))
    good = {path: read_image(path) for path in sorted(folder.glob("*.jpg"))}
    kept, noises = [], []
    for i, image in enumerate(good.values()):
        pair = (picture(i)[0], image)
        grey = [cv2.cvtColor(x, cv2.COLOR_RGB2GRAY).astype(np.float32) for x in pair]
        half = [x.reshape(24, 2, 32, 2).mean((1, 3)) for x in grey]
        edges = [np.hypot(cv2.Sobel(x, 5, 1, 0), cv2.Sobel(x, 5, 0, 1)).ravel() for x in half]
        kept.append(np.corrcoef(*edges)[0, 1])
        noises.append([np.median(np.abs(np.diff(np.diff(x, 2, 0), 2, 1))) for x in grey])
    before, after = np.mean(noises, 0)
    share, times = map(float, re.search(r"keep (\d+)% .* have ([\d.]+) x", out).groups())
    assert share == pytest.approx(100 * np.mean(kept), abs=1)
    assert times == pytest.approx(after / before, abs=0.15)  # the borders count in it, too
    noise = np.random.default_rng(0).normal(0, 60, (*SIZE, 3))
    for n, spoil in enumerate((lambda x: x[::-1], lambda x: (x + noise).clip(0, 255))):
        for path, image in good.items():
            save(path, spoil(image))
        _, _, err = run("warmup", given, f"name=test{n}")
        assert "their content may be lost; look at " in err


def test_images_without_labels_one_of_which_is_damaged(finished, run, config):
    """A folder: what can be read is segmented, with its confidence. One picture: its mask alone."""
    sizes = {"a": (60, 90), "trip/b": (140, 210)}
    save(Path("photos/a.jpg"), picture(7, sizes["a"])[0])
    save(Path("photos/trip/b.png"), picture(8, sizes["trip/b"])[0])
    Path("photos/broken.png").write_bytes(b"no image")
    given = ("--weights", finished / "warmup.pth", "--out", "out", "val.size=null")
    results = (finished / "results.json").read_bytes()
    code, _, err = run("evaluate", *given, "--images", "photos", "--confidence")
    first, last = err.splitlines()
    assert (code, last) == (2, "evaluate.py: 1 of 3 images could not be read; see above")
    assert "photos/broken.png: is broken" in first
    for kind in ("predictions", "overlays", "ids", "confidence"):
        found = {str(path.relative_to(f"out/{kind}/warmup")) for path in pictures(f"out/{kind}")}
        assert found == {"a.png", "trip/b.png"}
        for name, size in sizes.items():
            assert cv2.imread(f"out/{kind}/warmup/{name}.png", -1).shape[:2] == size
    assert (finished / "results.json").read_bytes() == results

    model = models.load_segmenter(finished / "warmup.pth", config())[0].eval()
    image = torch.from_numpy(read_image("photos/trip/b.png")).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        share = losses.upsample(model(image)[0], sizes["trip/b"]).softmax(1).amax(1)[0]
    written = cv2.imread("out/confidence/warmup/trip/b.png", -1)
    assert np.abs(written / 255 - share.numpy()).max() < 0.01

    ok(run("evaluate", *given, "--out", "one", "--images", "photos/a.jpg"))
    assert [path.name for path in pictures("one/ids")] == ["a.png"]
    for inside in ("photos", "photos/masks"):
        refused(run("evaluate", *given, "--images", "photos", "--out", inside), "folder elsewhere")


def pictures(folder):
    return sorted(Path(folder).rglob("*.png"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_video_gives_masks_and_a_film_of_every_frame(dataset, finished, run, workers):
    codec = cv2.VideoWriter_fourcc(*"MJPG")
    film = cv2.VideoWriter(str(dataset / "drive.avi"), codec, 12, (96, 64))
    for i in range(7):
        film.write(picture(i, (64, 96))[0][..., ::-1])
    film.release()
    out = dataset / "out"
    given = ("--weights", finished / "warmup.pth", "--out", out, f"workers={workers}")
    ok(run("evaluate", *given, "--images", dataset / "drive.avi"))
    assert sorted(x.name for x in out.iterdir()) == ["drive_warmup.mp4", "ids", *PAINTED]
    for kind in ("ids", *PAINTED):
        names = [path.name for path in pictures(out / kind / "warmup")]
        assert names == [f"drive_{i:06d}.png" for i in range(7)]
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

    for i in range(7):  # frame by frame, the masks too
        ours = read_image(out / f"ids/warmup/drive_{i:06d}.png")
        assert np.array_equal(ours, read_image(out / f"ids/warmup/{i}.png"))

    data = (dataset / "drive.avi").read_bytes()
    (dataset / "cut.avi").write_bytes(data[: len(data) // 2])
    code, _, err = run("evaluate", *given, "--images", dataset / "cut.avi", "--out", "cut")
    count = len(pictures("cut/ids"))
    assert code == 0
    assert 0 < count < 7
    assert f"cut.avi: {count} of 7 frames can be read" in err
    (dataset / "none.mp4").write_bytes(b"no video")
    refused(run("evaluate", *given, "--images", dataset / "none.mp4"), "no video")


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
    out = ok(run("evaluate", "val.root=null", "evaluation.pictures=1"))
    results = json.loads((finished / "results.json").read_text())
    assert 0 < results["warmup"]["information"] == results["selftrain"]["information"]
    assert out.splitlines()[-1].startswith("Without labels, selftrain is the one to use.")
    ok(run("tools.report", finished))
    assert "Without labels, self-training is" in (finished / "report.html").read_text()


def test_evaluation_takes_the_configuration_from_the_checkpoint(finished, run):
    """But not where to write: that is beside it."""
    moved = Path("moved")
    moved.mkdir()
    shutil.copy(finished / "warmup.pth", moved)
    changed(moved / "warmup.pth", lambda saved: saved["config"].update(output="elsewhere"))
    assert "| warmup |" in ok(run("evaluate", "--cfg", "", "--weights", moved / "warmup.pth"))
    assert (moved / "results.json").exists()
    assert not Path("elsewhere").exists()


def test_memory_that_is_not_enough_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["warmup.py"])
    with pytest.raises(SystemExit) as stop:
        command(lambda: torch.empty(2**46, dtype=torch.uint8))
    refused((stop.value.code, *capsys.readouterr()), "raise accumulate")


def test_a_loss_that_is_not_finite_stops_the_run_and_names_it(dataset, run):
    weights = models.build_segmenter("mobilenet_v2", 3).backbone.state_dict()
    weights["features.3.conv.0.0.weight"][:] = 3e38  # finite, but no sum of them is
    torch.save(weights, dataset / "weights.pth")
    outcome = run("warmup", "warmup.crdomix=false", f"model.weights={dataset}/weights.pth")
    refused(outcome, "loss became nan in the 2 steps before step 2")
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


@pytest.mark.skipif(not (LONG or torch.cuda.is_available()), reason="needs a GPU, or LONG=1")
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
    """At sizes at which its figures mean nothing."""
    out = ok(run("tools.bench", "--steps", "1", "model.channels=32"))
    for part in (*bench.VIEWS, "samples"):
        row = next(line for line in out.splitlines() if line.startswith(f"| {part} | "))
        seconds, bare, ratio, *more = map(float, row.strip("| ").split(" | ")[1:])
        assert min(seconds, bare, *more) > 0
        assert ratio == pytest.approx(seconds / bare, rel=0.01)
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
