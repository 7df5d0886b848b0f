"""Files that cannot be used end a command with one line, exit code 2 and nothing finished lost."""

import pickle
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import IDS, changed, ok, picture, refused, save

PLAIN = ("warmup.crdomix=false", "warmup.distill=0", "warmup.steps=2", "bn_recalibrate=[source]")


@pytest.fixture
def check(run):
    return lambda *more: run("tools.own_data", "--check", "selftrain.diagnose=false", *more)


# ---------------------------------------------------------------- images and labels

IMAGE, LABEL = Path("game/images/00003.png"), Path("game/labels/00003.png")


def cut(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def claim_60000_pixels(path):
    data = bytearray(path.read_bytes())
    data[16:24] = (60000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)


def one_pixel():
    save(IMAGE, np.zeros((1, 1, 3), np.uint8))
    save(LABEL, np.full((1, 1), 7, np.uint8))


def as_jpeg():
    LABEL.unlink()
    save(LABEL.with_suffix(".jpg"), picture(3)[1])


def value_77():
    label = picture(3)[1]
    label[9, 9] = 77
    save(LABEL, label)


def all_ignored():
    for i in range(6):
        save(Path(f"game/labels/{i:05d}.png"), np.full((48, 64), i % 6, np.uint8))


# what is done to the data -> parts of the line
DAMAGES = {
    "an image cut short": (lambda: cut(IMAGE), [IMAGE, "restore the file"]),
    "an image with a flipped bit": (lambda: flip(IMAGE), [IMAGE, "restore the file"]),
    "an empty image": (lambda: IMAGE.write_bytes(b""), [IMAGE]),
    "an image that is text": (lambda: IMAGE.write_text("no picture"), [IMAGE, "not an image"]),
    "an image of 60000 x 60000": (lambda: claim_60000_pixels(IMAGE), [IMAGE, "restore the file"]),
    "an image of one pixel": (one_pixel, [IMAGE, "too small"]),
    "two images of one name": (
        lambda: save(IMAGE.with_suffix(".bmp"), picture(3)[0]), ["00003", "rename one of them"]
    ),
    "a label cut short": (lambda: cut(LABEL), [LABEL, "restore the file"]),
    "a missing label": (LABEL.unlink, ["00003.png: has no label; add it"]),
    "an unknown value": (value_77, ["77"]),
    "a label in colours": (lambda: save(LABEL, picture(3)[0]), [LABEL, "see `ids: colours`"]),
    "a label in a JPEG": (as_jpeg, ["00003.jpg: is a JPEG", "PNG"]),
    "labels without a class": (
        all_ignored, ["source: no pixel of its labels belongs to a class", "source.ids"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_data_is_named_and_nothing_written(dataset, run, check, kind):
    damage, parts = DAMAGES[kind]
    damage()
    refused(run("warmup", *PLAIN), *parts)
    assert not list((dataset / "runs").rglob("*.pth"))
    refused(check(), *parts)


MISSING = {
    "source.root=/nowhere": "holds no images of layout gta5; are source.root, source.split and",
    "target.split=test": "leftImg8bit/test: holds no images of layout cityscapes; are target.root",
    "source.list=/nowhere.txt": "/nowhere.txt: this list of images cannot be read",
    "source.list=names.txt": "names.txt: names none.png; one path a line",
    "source.sizes=[[56,40],[64,48]]": "source.sizes = [56, 40] must be [height, width]",
}


@pytest.mark.parametrize("override", MISSING)
def test_a_missing_dataset_and_sizes_that_cannot_be(dataset, run, override):
    Path("names.txt").write_text("none.png\n")
    more = ("bn_recalibrate=[source,target]", "crop=[32,32]")
    refused(run("warmup", *PLAIN, *more, override), MISSING[override])
    assert not list((dataset / "runs").rglob("*.pth"))


def test_what_is_odd_is_a_warning_with_the_figure(run, check):
    for i in range(6):
        label = picture(i)[1]
        label[:40] = 0
        label[label == IDS["car"]] = IDS["road"]
        save(Path(f"game/labels/{i:05d}.png"), label)
        save(Path(f"game/images/{i:05d}.png"), picture(i)[0].astype(np.uint16) * 16)
    code, _, err = run("warmup", *PLAIN)
    again, _, more = check()  # a process says it once
    assert (code, again) == (0, 0)
    for part in (
        "source: half of the images are nearly black",
        "83.3% of the labels' pixels are ignored",
        "none of 6 labels holds car, sky",
    ):
        assert part in err + more


def test_linked_folders_are_read_without_what_is_hidden(dataset, run, check):
    for part in ("images", "labels"):
        Path(f"game/{part}").rename(f"{part}_elsewhere")
        Path(f"game/{part}").mkdir()
        Path(f"game/{part}/linked").symlink_to(dataset / f"{part}_elsewhere")
        save(Path(f"{part}_elsewhere/.ipynb_checkpoints/00000.png"), picture(0)[0])
    Path("images_elsewhere/00001.heic").write_bytes(b"x")
    save(Path("labels_elsewhere/99999.png"), picture(0)[1])
    lines = ok(check()).splitlines()
    assert lines[0].startswith("source: 6 images in ")
    for part in ("1 *.heic", "1 *.png"):
        assert part in lines[1], lines
    ok(run("warmup", *PLAIN))


# ---------------------------------------------------------------- checkpoints and other files


class Trace:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_with_code_in_it_is_refused(dataset, run):
    trace = dataset / "trace"
    torch.save({"student": Trace(trace), "config": {}}, "bomb.pth")
    Path("plain.pth").write_bytes(pickle.dumps(Trace(trace)))
    for path in ("bomb.pth", "plain.pth"):
        for command in (
            ("evaluate", "--weights", path),
            ("selftrain", "--init", path, "selftrain.crdomix=false"),
            ("warmup", "--init", path, "warmup.crdomix=false"),
            ("warmup", f"model.weights={path}", "warmup.crdomix=false"),
        ):
            refused(run(*command), path)
            assert not trace.exists()
    torch.load("bomb.pth", weights_only=False)
    assert trace.exists()  # so it would have


UNFIT = [
    lambda saved: saved.pop("optimizer"),
    lambda saved: saved["student"].popitem(),
    lambda saved: saved["optimizer"]["param_groups"].pop(),
]


@pytest.mark.parametrize("damage", UNFIT)
def test_an_unfinished_checkpoint_of_another_version(dataset, run, template, damage):
    path = dataset / "runs/test/warmup.unfinished.pth"
    path.parent.mkdir(parents=True)
    shutil.copy(template / "warmup.unfinished.pth", path)
    changed(path, damage)
    refused(run("warmup", "warmup.crdomix=false"), "unfinished.pth: does not fit this version")
    path.unlink()
    ok(run("warmup", "warmup.crdomix=false", "warmup.steps=1"))


def test_other_inputs_are_noticed(finished, run):
    ok(run("translate_cyclegan", "--force", "translation.cycle=5"))
    for script in ("warmup", "selftrain"):
        refused(run(script), "another translator.pth")
    ok(run("warmup", "--force"))
    changed(finished / "selftrain_round1.pth", lambda saved: saved["inputs"].pop("translator.pth"))
    refused(run("selftrain"), "selftrain_round1.pth: was made with another warmup.pth than")


def test_half_written_logs_and_results(finished, run):
    path, results = finished / "log.jsonl", finished / "results.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    ok(run("tools.report", finished))
    ok(run("warmup", "--force", "warmup.steps=1"))
    ok(run("tools.report", finished))
    results.write_bytes(results.read_bytes()[:-9])
    refused(run("tools.report", finished), "results.json", "remove")
    refused(run("evaluate"), "results.json", "remove")
    (finished / "warmup.pth").write_bytes(b"")
    refused(run("evaluate", "--weights", "warmup.pth"), "warmup.pth", "restore")


# ---------------------------------------------------------------- names and paths


def test_paths_as_people_give_them(dataset, run, monkeypatch):
    monkeypatch.setenv("HOME", str(dataset))
    text = Path("test.yaml").read_text().replace("root: game", "root: ~/game")
    Path("straße.yaml").write_text(text.replace("car:", "größe:"), encoding="utf-8")
    ids = "source.ids={7: road, 23: sky, 26: größe, 0: null}"
    more = ids, "val.root=~/camera", "output=~/ü"
    ok(run("warmup", "--cfg", "straße.yaml", *PLAIN, *more))
    assert (dataset / "ü/test/warmup.pth").is_file()
    refused(run("evaluate", "--weights", "a\n.pth"), "a .pth: there is no such file")
    refused(run("warmup", *PLAIN, "output=test.yaml"), "test.yaml")


def test_nothing_finished_is_lost_by_a_command_that_fails(finished, run):
    before = {path: path.read_bytes() for path in finished.glob("*.*")}
    refused(run("selftrain", "--force", "--init", "none.pth"), "none.pth")
    LABEL.unlink()
    refused(run("warmup", "--force"), "00003")
    assert all(path.read_bytes() == data for path, data in before.items())
