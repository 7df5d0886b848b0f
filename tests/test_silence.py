"""Nonsense that would train in silence and files that would be lost, as a user's process tells."""

import os
import zlib

import cv2
import numpy as np
import pytest
import torch
from conftest import IDS, ROOT, Command, picture, save
from PIL import Image


@pytest.fixture
def process(dataset):
    """process("warmup", "key=value", ...) runs a script as a process of its own.

    Returns its exit code, stdout, and the lines on file descriptor 2, where C libraries write too.
    """

    def call(script, *arguments):
        cfg = [] if "--cfg" in arguments else ["--cfg", dataset / "test.yaml"]
        code, out, err = Command(script, *cfg, *arguments, cwd=ROOT, out=dataset).end(120)
        return code, out, err.splitlines()

    return call


PLAIN = ("warmup.crdomix=false", "warmup.distill=0", "warmup.steps=2", "bn_recalibrate=[source]")


def check(process, *arguments):
    return process("tools.own_data", "--check", "selftrain.diagnose=false", *arguments)


def refused(outcome, *parts):
    """Assert that a process ended with exit code 2 and one line, which holds these parts."""
    code, _, err = outcome
    assert (code, len(err)) == (2, 1), err
    for part in parts:
        assert part in err[0], err


# ---------------------------------------------------------------- nonsense


def test_good_data_and_a_short_training_leave_stderr_empty(process):
    code, out, err = check(process)
    assert (code, err) == (0, [])
    assert out.count("left out: nothing") == 3
    assert process("warmup", *PLAIN)[::2] == (0, [])


def test_labels_that_are_ignored_whole_are_refused(dataset, process):
    for i in range(6):
        save(dataset / f"game/labels/{i:05d}.png", np.full((48, 64), i % 6, np.uint8))
    for outcome in (process("warmup", *PLAIN), check(process)):
        refused(outcome, "source: no pixel of its labels belongs to a class", "source.ids")
    assert not (dataset / "runs/test/warmup.pth").exists()


def test_what_is_odd_is_a_warning_with_the_figure(dataset, process):
    for i in range(6):
        label = picture(i)[1]
        label[:40] = 0
        label[label == IDS["car"]] = IDS["road"]
        save(dataset / f"game/labels/{i:05d}.png", label)
        save(dataset / f"game/images/{i:05d}.png", picture(i)[0].astype(np.uint16) * 16)
    for code, _, err in (process("warmup", *PLAIN), check(process)):
        assert code == 0, err
        assert len(err) == 3, err
        assert "nearly black" in err[0]
        assert "83.3% of the labels' pixels are ignored" in err[1]
        assert "none of 6 labels holds car, sky" in err[2]


def test_a_label_in_a_jpeg_is_refused(dataset, process):
    (dataset / "game/labels/00002.png").unlink()
    save(dataset / "game/labels/00002.jpg", picture(2)[1])
    for outcome in (process("warmup", *PLAIN), check(process)):
        refused(outcome, "00002.jpg: is a JPEG", "PNG")


def test_sizes_with_the_width_first(process):
    wrong = ("crop=[32,32]", "source.sizes=[[56,40],[64,48]]")
    refused(process("warmup", *PLAIN, *wrong), "source.sizes = [56, 40] must be [height, width]")


MEANT_OTHERWISE = {
    "source.sizes=[[48,64],[40,56]]": ["source.sizes", "ascending"],
    "warmup.steps=1:30": ["warmup.steps = '1:30'", "integer"],
    "warmup.steps=1_000": ["warmup.steps = '1_000'", "integer"],
    "seed=010": ["seed=010", "'010'"],
    "warmup.crdomix=no": ["warmup.crdomix = 'no'", "True | False"],
    "classes={a: [1, 2, 3], b: [1, 2, 3]}": ["differ in their names and colours"],
    "classes=[road, car, road]": ["differ in their names and colours"],
}


def test_values_that_are_meant_otherwise(dataset, run, process):
    for override, parts in MEANT_OTHERWISE.items():
        code, _, err = run("warmup", override)
        refused((code, None, err.splitlines()), *parts)
    text = (dataset / "test.yaml").read_text()
    (dataset / "old.yaml").write_text(f"{text}compile: off\n")
    refused(process("warmup", "--cfg", dataset / "old.yaml", *PLAIN), "compile = 'off'")


OTHERS = ("translator", "evaluate", "selftrain", "selftrain_round1", "warmup.unfinished", "a_on_b")


def test_a_result_has_no_name_of_another_stage(run, process):
    for name in OTHERS:
        code, _, err = run("warmup", "--as", name)
        refused((code, None, err.splitlines()), "--as", name)
    refused(process("warmup", *PLAIN, "--as", "translator"), "--as", "translator")


def test_weights_that_are_not_finite_are_refused(dataset, process):
    assert process("warmup", *PLAIN)[0] == 0
    path = dataset / "runs/test/warmup.pth"
    saved = torch.load(path, weights_only=True)
    saved["student"]["classifier.weight"][0] = float("nan")
    torch.save(saved, path)
    for outcome in (
        process("evaluate"),
        process("selftrain", "selftrain.crdomix=false", "selftrain.diagnose=false"),
    ):
        refused(outcome, "warmup.pth: is not finite in classifier.weight")


# ---------------------------------------------------------------- files


def test_linked_folders_are_read_and_what_is_left_out_is_told(dataset, process):
    (dataset / "disk").mkdir()
    for part in ("images", "labels"):
        (dataset / f"game/{part}").rename(dataset / f"disk/{part}")
        (dataset / f"game/{part}").mkdir()
        (dataset / f"game/{part}/linked").symlink_to(dataset / f"disk/{part}")
        (dataset / f"disk/{part}/loop").symlink_to(dataset / f"game/{part}")
        save(dataset / f"disk/{part}/.ipynb_checkpoints/00000.png", picture(0)[0])
    (dataset / "disk/images/00001.heic").write_bytes(b"x")
    save(dataset / "disk/labels/99999.png", picture(0)[1])
    code, out, err = check(process)
    assert (code, err) == (0, [])
    lines = out.splitlines()
    assert lines[0] == f"source: 6 images in {dataset}/game/images"
    for part in ("1 hidden", "1 named *.heic", "1 labels without an image"):
        assert part in lines[1], lines
    assert "1 linked a second time" in lines[1]
    assert process("warmup", *PLAIN)[::2] == (0, [])


def test_a_link_to_a_disk_that_is_not_there_is_refused(dataset, process):
    (dataset / "game/images/more").symlink_to(dataset / "unmounted")
    refused(process("warmup", *PLAIN), "game/images/more: links to nothing")


def test_a_pipe_is_not_waited_for(dataset, process):
    (dataset / "game/images/00003.png").unlink()
    os.mkfifo(dataset / "game/images/00003.png")
    for outcome in (process("warmup", *PLAIN), check(process)):
        refused(outcome, "00003.png: is no regular file")
    os.mkfifo(dataset / "list.txt")
    outcome = process("warmup", *PLAIN, f"source.list={dataset}/list.txt")
    refused(outcome, "list.txt", "regular file")


def test_an_unreadable_folder_is_refused(dataset, process):
    locked = dataset / "game/images/locked"
    locked.mkdir(mode=0)
    if os.access(locked, os.R_OK):
        pytest.skip("this user may read everything")
    refused(process("warmup", *PLAIN), "locked: cannot be read (Permission denied)")


# ---------------------------------------------------------------- pictures


def damaged(kind, array):
    """Return the bytes of a picture of which a part is not as it was written."""
    extension = ".png" if "png" in kind else ".jpg"
    data = bytearray(cv2.imencode(extension, array)[1].tobytes())
    middle = len(data) // 2
    if kind == "jpeg, cut out":
        del data[middle : middle + 500]
    elif kind == "jpeg, early end":
        del data[middle:-2]
    elif kind == "png, flipped":
        data[middle] ^= 1
    return bytes(data)


DAMAGES = ["jpeg, cut out", "jpeg, early end", "png, flipped"]


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_picture_that_is_damaged_inside_is_named_in_one_line(dataset, process, kind):
    for i in range(6):
        (dataset / f"game/images/{i:05d}.png").unlink()
        good = cv2.imencode(".jpg", picture(i)[0])[1].tobytes()
        (dataset / f"game/images/{i:05d}.jpg").write_bytes(good)
    path = dataset / "game/images/00003.jpg"
    path.write_bytes(damaged(kind, picture(3)[0]))
    # by one of the four threads that read the samples
    refused(process("warmup", *PLAIN), f"{path}: is ", "restore the file")


@pytest.mark.parametrize("workers", [0, 1])
def test_training_fails_on_damage_that_the_samples_missed(dataset, process, workers):
    for i in range(6, 520):
        for part in ("images", "labels"):
            link = dataset / f"game/{part}/{i:05d}.png"
            link.symlink_to(dataset / f"game/{part}/{i % 6:05d}.png")
    checked = set(np.unique(np.linspace(0, 519, 256, dtype=int)).tolist())
    for i in set(range(6, 520)) - checked:
        path = dataset / f"game/images/{i:05d}.png"
        path.unlink()
        path.write_bytes(damaged("jpeg, cut out", picture(i)[0]))
    outcome = process("warmup", *PLAIN, "warmup.steps=60", f"workers={workers}")
    refused(outcome, "is damaged inside")


def test_data_after_a_picture_and_odd_profiles_are_no_fault(dataset, process):
    for i in range(6):
        (dataset / f"game/images/{i:05d}.png").unlink()
        good = cv2.imencode(".jpg", picture(i)[0])[1].tobytes()
        (dataset / f"game/images/{i:05d}.jpg").write_bytes(good + b"ftypmp42" * 1000)
    image = Image.fromarray(picture(0)[0])
    image.save(dataset / "camera/leftImg8bit/train/a/a_0_leftImg8bit.png", icc_profile=b"none")
    assert check(process)[::2] == (0, [])
    assert process("warmup", *PLAIN, "bn_recalibrate=[source,target]")[::2] == (0, [])


def test_exif_turns_neither_image_nor_label(dataset, process):
    exif = Image.Exif()
    exif[274] = 3
    path = dataset / "game/images/00003.png"
    Image.fromarray(picture(3)[0]).save(path, exif=exif)
    assert process("warmup", *PLAIN)[::2] == (0, [])
    code, _, err = check(process)
    assert (code, len(err)) == (0, 1), err
    assert "source: 1 of 6 images have an EXIF orientation, which is not applied" in err[0]


# ---------------------------------------------------------------- sizes


def test_a_crop_or_scale_that_the_network_cannot_take_is_refused_before_training(dataset, process):
    crop = ("crop=[8,8]", "accumulate=2")
    refused(process("warmup", *PLAIN, *crop), "crop: [8, 8] pixels of 1 images", "mobilenet_v2")
    refused(
        process("warmup", *PLAIN, "evaluation.scales=[0.05]"), "evaluation.scales: [2, 3] pixels"
    )
    assert not (dataset / "runs/test/warmup.pth").exists()
    assert process("warmup", *PLAIN)[0] == 0
    refused(process("evaluate", "evaluation.scales=[0.05]"), "evaluation.scales: [2, 3] pixels")


def test_an_image_of_one_pixel_is_refused(dataset, process):
    save(dataset / "game/images/00003.png", np.zeros((1, 1, 3), np.uint8))
    save(dataset / "game/labels/00003.png", np.full((1, 1), 7, np.uint8))
    for outcome in (process("translate_cyclegan"), check(process)):
        refused(outcome, "00003.png: is 1x1 pixels")


# ---------------------------------------------------------------- bounds


def test_a_picture_of_60000_x_60000_in_its_header_is_one_line(dataset, process):
    data = bytearray((dataset / "game/images/00003.png").read_bytes())
    data[16:24] = (60000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    (dataset / "game/images/00003.png").write_bytes(data)
    for outcome in (process("warmup", *PLAIN), check(process)):
        refused(outcome, "00003.png: is broken, too large")


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
HOSTILE = {
    "aliases": BOMB.replace("a11:", "crop:"),
    "base": BOMB.replace("a11:", "base:"),
    "merge keys": BOMB.replace("[", "{<<: [").replace("]", "]}"),
    "entries": "\n".join(f"k{i}: 1" for i in range(100000)),
    "depth": "[" * 100000,
    "a long key": "x" * 500000 + ": 1",
    "a long value": "name: " + "x y " * 100000,
}


def test_a_hostile_configuration_is_one_short_line(dataset, run, process):
    for kind, text in HOSTILE.items():
        path = dataset / f"{kind}.yaml"
        path.write_text(text)
        code, _, err = run("warmup", "--cfg", path)
        refused((code, None, err.splitlines()))
        assert len(err) < 500, kind
    refused(process("warmup", "--cfg", dataset / "base.yaml"), "base", "must be a path")
    refused(process("warmup", "--cfg", "/dev/zero"), "/dev/zero: cannot be read")
